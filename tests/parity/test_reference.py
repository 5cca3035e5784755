"""The engine in one process against a plain PyTorch model with the same initial weights and samples."""

import pytest
import torch
import torch.nn.functional as F

from steerscale.data.dataset import SampleStream
from steerscale.data.loader import MicroBatchLoader
from steerscale.models.sharding import gather_parameters
from steerscale.optim import learning_rate
from steerscale.parallel.context import initialize
from steerscale.testing.parity import Curve, assert_parity
from steerscale.testing.ranks import RankPool
from steerscale.testing.reference import ReferenceGPT, train_reference
from steerscale.train.config import RunConfig
from steerscale.train.gpt import build_gpt_task
from tests.parity.conftest import Run
from tests.parity.runs import MODELS, SEQUENCES, STEPS, layout, run_config


def reference_curve(config: RunConfig) -> Curve:
    """What the reference makes of the weights and samples that the framework would begin with."""
    with initialize(config.layout()) as context:
        task = build_gpt_task(config, context)
        model = ReferenceGPT(config.model)
        model.load_state_dict(gather_parameters(task.engine.unwrapped, context))
        accumulation = config.layout().gradient_accumulation_steps
        steps = [task.micro_batches(step * SEQUENCES, accumulation) for step in range(STEPS)]
        task.close()
        trained = train_reference(model, steps, config.optim, total_steps=STEPS)
        return Curve(
            losses=[loss for loss, _ in trained],
            grad_norms=[norm for _, norm in trained],
            valid_loss=valid_loss(model, config),
            parameters={name: tensor.numpy() for name, tensor in model.state_dict().items()},
            reach=sum(learning_rate(config.optim, step, STEPS) for step in range(STEPS)),
            consumed_hash=f"{task.consumed():016x}",
            disagreements=[],
        )


@torch.no_grad()
def valid_loss(model: ReferenceGPT, config: RunConfig) -> float:
    """Mean over the tokens of the held-out samples."""
    stream = SampleStream(config.data, seq_len=config.model.seq_len, split="valid", shuffle=False)
    samples = config.train.eval_samples or 0
    documents = config.data.reset_at_document_end
    loader = MicroBatchLoader(
        stream,
        data_rank=0,
        data_size=1,
        micro_batch_size=samples,
        reset_at_document_end=documents,
        mask_document_end=documents,
        num_prefetch=0,
    )
    (batch,) = loader.step(0, 1)
    losses = F.cross_entropy(model(batch).transpose(1, 2), batch.labels_BS, reduction="none")
    return float((losses * batch.loss_mask_BS).sum() / batch.loss_mask_BS.sum())


@pytest.mark.parametrize("documents", [False, True], ids=["running text", "documents"])
@pytest.mark.parametrize("model", MODELS)
def test_parity_reference(pool: RankPool, german_data, tmp_path, alone: Run, model: str, documents: bool) -> None:
    # Other micro-batches than the engine's, so that the normalisation of losses is compared as well.
    config = run_config(
        german_data, tmp_path / "unused", MODELS[model], layout(micro_batch_size=4), documents=documents
    )
    (expected,) = pool.run(reference_curve, config, ranks=1)
    assert_parity(alone(model, documents=documents) if documents else alone(model), expected)
