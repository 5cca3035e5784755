"""litgpt in gpt_cpu.py: its own `pretrain.fit` on Lightning's Fabric, the model under torch.compile as `pretrain` has it."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.gpt_overhead import Size
from steerscale.data.dataset import SampleStream
from steerscale.train.config import RunConfig


def is_installed() -> bool:
    """litgpt and what it trains by."""
    return all(importlib.util.find_spec(name) is not None for name in ("litgpt", "lightning", "jsonargparse"))


class Batches:
    """Micro-batches in the order of every side; `begin_step` is called before the first one of each step."""

    def __init__(self, stream: SampleStream, size: Size, begin_step: Callable[[], None]) -> None:
        self._stream, self._size, self._begin_step = stream, size, begin_step

    def __iter__(self) -> Iterator[torch.Tensor]:
        position = 0
        while True:
            self._begin_step()
            for _ in range(self._size.micro_batches):
                rows = [self._stream.tokens(position + row) for row in range(self._size.micro_batch_size)]
                position += len(rows)
                yield torch.from_numpy(np.stack(rows).astype(np.int64))


def train(
    config: RunConfig, size: Size, weights: Path, begin_step: Callable[[], None], on_loss: Callable[[float], None]
) -> None:
    """Train until `begin_step` raises, what it raises; each step's loss goes to `on_loss`."""
    import lightning
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.pretrain import fit

    fabric: Any = lightning.Fabric(accelerator="cpu", devices=1, precision="32-true")
    fabric.log_dict = lambda metrics, step: on_loss(metrics["loss"])
    fabric.print = lambda *args, **kwargs: None
    model: Any = fabric.setup(torch.compile(_model(size, weights)))
    optim = config.optim
    optimizer: Any = fabric.setup_optimizers(
        torch.optim.AdamW(
            model.parameters(),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
    )
    assert config.data is not None
    stream = SampleStream(config.data, seq_len=size.model.seq_len, seed=config.seed)
    validation: Any = [torch.zeros(size.micro_batch_size, size.model.seq_len + 1, dtype=torch.int64)]
    arguments = TrainArgs(
        save_interval=None,
        log_interval=1,
        global_batch_size=size.micro_batches * size.micro_batch_size,
        micro_batch_size=size.micro_batch_size,
        lr_warmup_steps=0,
        max_tokens=10**12,
        max_norm=optim.clip,
        min_lr=optim.lr,
    )
    fit(
        fabric=fabric,
        devices=1,
        state={"model": model, "optimizer": optimizer, "iter_num": 0, "step_count": 0},
        train_dataloader=Batches(stream, size, begin_step),  # type: ignore[arg-type]
        val_dataloader=validation,
        out_dir=weights,  # nothing is saved
        tokenizer_dir=None,
        train=arguments,
        eval=EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False),
    )


def _model(size: Size, weights: Path) -> torch.nn.Module:
    from litgpt import GPT, Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

    model = size.model
    config = Config(
        name="benchmark",
        block_size=model.seq_len,
        vocab_size=model.tokens,
        padded_vocab_size=model.tokens,
        n_layer=model.num_layers,
        n_head=model.num_heads,
        n_query_groups=model.kv_groups,
        n_embd=model.d_model,
        intermediate_size=model.ffn_width,
        rotary_percentage=1.0,
        rope_base=int(model.rope_theta),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=model.norm_eps,
        mlp_class_name="LLaMAMLP",
    )
    gpt, state = GPT(config), {}
    copy_weights_hf_llama(config, {}, state, load_file(weights / "model.safetensors"))
    gpt.load_state_dict(state, strict=not model.tie_embeddings)
    if model.tie_embeddings:
        gpt.lm_head.weight = gpt.transformer.wte.weight  # type: ignore[union-attr]
    return gpt
