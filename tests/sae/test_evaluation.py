"""What `evaluate_saes` measures, against a plain transformers model with a hook, and on every layout."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from steerscale.activations.config import StreamConfig
from steerscale.activations.loading import load_source
from steerscale.data.config import DataConfig
from steerscale.data.dataset import SampleStream
from steerscale.interp.sae_eval import evaluate_saes, held_out
from steerscale.load import load_gpt
from steerscale.metrics import read_records
from steerscale.models.hf.export import export_hf
from steerscale.parallel.context import initialize, stage_context
from steerscale.parallel.layout import ParallelLayout
from steerscale.sae.architectures import ARCHITECTURES
from steerscale.sae.config import SAEConfig, specs_of
from steerscale.testing.ranks import RankPool
from steerscale.train.config import TrainConfig
from tests.sae.training import MODEL, sae_config, trained

D, SAMPLES, DROP_FIRST = MODEL.d_model, 6, 2
"""Width; sequences; first positions left out."""
HOOKS = {"blocks.1.hook_resid_post": "transformer.h.1", "blocks.2.hook_mlp_out": "transformer.h.2.mlp"}
"""Ours, and the same places in transformers' GPT-2."""
ONE = ParallelLayout()
LAYOUTS = {
    "TP2": ParallelLayout(tensor=2),
    "TP2+SP": ParallelLayout(tensor=2, sequence=True),
    "PP2": ParallelLayout(pipeline=2),
    "PP4": ParallelLayout(pipeline=4),
    "DP2": ParallelLayout(data=2),
    "TP2 DP2": ParallelLayout(tensor=2, data=2),
}


@dataclass(frozen=True)
class Weights:
    """An SAE by its dense weights; only those that `evaluate` is to be told by a name."""

    kind: str
    architecture: str = "relu"
    scale: float = 0.7

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        both = torch.cat([torch.eye(D), -torch.eye(D)])
        if self.kind == "perfect":
            return {"W_enc": both, "W_dec": both}
        if self.kind == "zero":
            return {"W_enc": both, "W_dec": torch.zeros_like(both)}
        generator = torch.Generator().manual_seed(0)
        normal = [torch.randn(shape, generator=generator) for shape in ((2 * D, D), (2 * D, D), (D,), (2 * D,))]
        return {"W_enc": normal[0] / D, "W_dec": normal[1] / D, "b_dec": normal[2] * 0.1, "b_enc": normal[3] * 0.1}

    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(latents, reconstruction), densely."""
        p = {"b_dec": torch.zeros(D), "b_enc": torch.zeros(2 * D), **self.tensors}
        f = ((x * self.scale - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]).relu()
        if self.architecture == "topk":
            f = f * torch.zeros_like(f).scatter(-1, f.topk(4).indices, 1.0)
        return f, (f @ p["W_dec"] + p["b_dec"]) / self.scale


PERFECT, ZERO, RANDOM, TOPK = Weights("perfect"), Weights("zero"), Weights("random"), Weights("random", "topk")
Found = dict[str, tuple[dict[str, float], np.ndarray | None]]


def evaluate(layout: ParallelLayout, lm: Path, data: Path, weights: Weights, hooks: list[str], kind: str) -> Found:
    """On the ranks of the current process group: by hook, values and this rank's frequencies. For `RankPool.run`."""
    stream = StreamConfig(lm=str(lm), lm_kind=kind, seq_len=MODEL.seq_len, micro_batch_size=2, drop_first=DROP_FIRST)  # type: ignore[arg-type]
    with initialize(layout) as context:
        source = load_source(stream, hooks, context)
        text = held_out(stream, DataConfig(path=str(data)), source, samples=SAMPLES)
        assert text is not None
        text = replace(text, special_ids=(common_token(text.samples),))
        config = SAEConfig(hooks=hooks, architecture=weights.architecture, width=2 * D, k=4)  # type: ignore[arg-type]
        specs, saes = specs_of(config, source.widths), {}
        for spec in specs:
            if spec.inputs[0] not in source.owned:
                continue
            sae = ARCHITECTURES[weights.architecture](spec, stage_context(context))
            for shard, parameter in sae.shards():
                whole = weights.tensors.get(shard.name.removeprefix(f"{spec.name}."))
                if whole is not None:
                    cut = whole.chunk(layout.tensor)[context.at.tensor] if shard.dim == 0 else whole
                    parameter.data.copy_(cut)
            for scale in (sae.scales.input, sae.scales.output):
                scale.fill_(weights.scale)
            sae.scales.mean.fill_(0.1)
            saes[spec.name] = sae
        found = evaluate_saes(specs, saes, source, text, context)
        source.close()
        return {
            name: (one.values, None if one.frequency_N is None else one.frequency_N.numpy())
            for name, one in found.items()
        }


def _read(valid: SampleStream) -> np.ndarray:
    return valid.read(*valid.locate(np.arange(SAMPLES)))


def common_token(valid: SampleStream) -> int:
    """A token that comes up several times: here it is taken for a special one."""
    return int(np.bincount(_read(valid)[:, :-1].ravel()).argmax())


def export(lm: Path, directory: Path) -> None:
    """For `RankPool.run`."""
    with initialize(ONE) as context:
        export_hf(load_gpt(lm, context).chunks, context, directory)


@pytest.fixture(scope="module")
def exported(pool: RankPool, lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language model in transformers' format."""
    directory = tmp_path_factory.mktemp("exported") / "hf"
    pool.run(export, lm, directory, ranks=1)
    return directory


@pytest.fixture(scope="module")
def valid(german_data: Path) -> SampleStream:
    """The held-out text."""
    return SampleStream(DataConfig(path=str(german_data)), seq_len=MODEL.seq_len, split="valid", shuffle=False)


def _by_hand(directory: Path, valid: SampleStream, module: str, weights: Weights) -> dict[str, float]:
    """All of it by a forward hook of torch's."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    sequences, special = torch.from_numpy(_read(valid)), common_token(valid)
    tokens, labels = sequences[:, :-1], sequences[:, 1:]
    kept = (tokens != special) & (torch.arange(MODEL.seq_len) >= DROP_FIRST)
    assert 0 < kept.sum() < (SAMPLES * (MODEL.seq_len - DROP_FIRST))
    read: list[torch.Tensor] = []

    def run(replacement: Any) -> float:
        def hook(_: Any, args: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            read[:] = [x]
            y = torch.where(kept[..., None], replacement(x), x)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        handle = model.get_submodule(module).register_forward_hook(hook)
        with torch.no_grad():
            logits = model(tokens).logits
        handle.remove()
        return float(F.cross_entropy(logits.flatten(0, 1), labels.flatten()))

    ce = {
        "ce_clean": run(lambda x: x),
        "ce_spliced": run(lambda x: weights.reconstruct(x)[1]),
        "ce_zero": run(torch.zeros_like),
        "ce_mean": run(lambda x: torch.full_like(x, 0.1 / weights.scale)),
    }
    run(lambda x: x)
    x = read[0][kept].double()
    f, hat = weights.reconstruct(x.float())
    error = (x - hat).square().sum()
    return {
        **ce,
        "ce_recovered": (ce["ce_zero"] - ce["ce_spliced"]) / (ce["ce_zero"] - ce["ce_clean"]),
        "l0": float((f > 0).sum(1).double().mean()),
        "fvu": float(error / (x - x.mean(0)).square().sum()),
        "mse": float(error / len(x)),
        "cosine": float(F.cosine_similarity(x, hat.double(), dim=1).mean()),
        "norm_ratio": float(hat.norm(dim=1).sum() / x.norm(dim=1).sum()),
        "dead": float((f > 0).any(0).logical_not().double().mean()),
        "vectors": len(x),
    }


@pytest.mark.parametrize("weights", [RANDOM, TOPK], ids=lambda weights: weights.architecture)
@pytest.mark.parametrize("kind", ["gpt", "transformers"])
@pytest.mark.parametrize("hook", HOOKS)
def test_measures_what_a_hook_in_transformers_shows(
    hook: str,
    kind: str,
    weights: Weights,
    pool: RankPool,
    lm: Path,
    exported: Path,
    german_data: Path,
    valid: SampleStream,
) -> None:
    """Of our own GPT, and of the same model read by transformers."""
    name, model = (hook, lm) if kind == "gpt" else (HOOKS[hook], exported)
    ((found),) = pool.run(evaluate, ONE, model, german_data, weights, [name], kind, ranks=1)
    values, _ = found[name]
    expected = _by_hand(exported, valid, HOOKS[hook], weights)
    assert values.keys() == expected.keys()
    assert expected["ce_spliced"] != pytest.approx(expected["ce_clean"], rel=1e-4)
    for key, value in expected.items():
        # A quotient of small differences of losses.
        assert values[key] == pytest.approx(value, rel=1e-2 if key == "ce_recovered" else 2e-5), key


@pytest.mark.parametrize("hook", HOOKS)
def test_perfect_sae_loses_nothing(hook: str, pool: RankPool, lm: Path, german_data: Path) -> None:
    ((found),) = pool.run(evaluate, ONE, lm, german_data, PERFECT, [hook], "gpt", ranks=1)
    values, _ = found[hook]
    assert values["fvu"] == pytest.approx(0, abs=1e-10)
    assert values["ce_spliced"] == pytest.approx(values["ce_clean"], rel=1e-6)
    assert values["ce_recovered"] == pytest.approx(1, abs=1e-2)
    assert values["cosine"] == pytest.approx(1, abs=1e-6)
    assert values["norm_ratio"] == pytest.approx(1, abs=1e-6)
    assert values["l0"] == D  # of each pair, one


@pytest.mark.parametrize("hook", HOOKS)
def test_zero_sae_recovers_nothing(hook: str, pool: RankPool, lm: Path, german_data: Path) -> None:
    ((found),) = pool.run(evaluate, ONE, lm, german_data, ZERO, [hook], "gpt", ranks=1)
    values, _ = found[hook]
    assert values["ce_spliced"] == values["ce_zero"] != values["ce_clean"]
    assert values["ce_recovered"] == 0
    assert values["norm_ratio"] == values["cosine"] == 0
    assert values["fvu"] >= 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights", [RANDOM, TOPK], ids=lambda weights: weights.architecture)
def test_layouts_measure_the_same(weights: Weights, layout: str, pool: RankPool, lm: Path, german_data: Path) -> None:
    arguments = (lm, german_data, weights, list(HOOKS), "gpt")
    (expected,) = pool.run(evaluate, ONE, *arguments, ranks=1)
    degrees = LAYOUTS[layout]
    ranks = pool.run(evaluate, degrees, *arguments, ranks=degrees.world_size)
    for hook in HOOKS:
        whole, frequencies = expected[hook]
        for found in ranks:
            values, _ = found[hook]
            assert values == ranks[0][hook][0]
            for key, value in whole.items():
                assert values[key] == pytest.approx(value, rel=1e-2 if key == "ce_recovered" else 1e-5), key
        assert frequencies is not None
        # Of the first replica, in the order of the tensor ranks.
        shards = [frequency for found in ranks for frequency in [found[hook][1]] if frequency is not None]
        np.testing.assert_allclose(np.concatenate(shards[: degrees.tensor]), frequencies, rtol=0, atol=1e-12)
        assert 0 < frequencies.max() <= 1


def test_what_cannot_be_measured_is_unknown(pool: RankPool, lm: Path, german_data: Path, tmp_path: Path) -> None:
    """One vector has no variance; with no token left that counts, there is nothing to measure at all. Training goes on."""
    config = sae_config(lm, german_data, tmp_path / "run", sections={"train": TrainConfig(steps=4, eval_samples=1)})
    assert config.stream is not None
    trained(pool, replace(config, stream=replace(config.stream, drop_first=MODEL.seq_len - 1)))
    (one,) = read_records(tmp_path / "run", "eval")
    values = {key.rpartition("/")[2]: value for key, value in one.items()}
    assert values["vectors"] == 1
    assert values["fvu"] is None
    assert values["mse"] > 0
    ((found),) = pool.run(evaluate_nothing, lm, german_data, ranks=1)
    assert found["vectors"] == 0
    assert math.isnan(found["l0"])
    assert math.isnan(found["ce_recovered"])
    assert found["ce_spliced"] == found["ce_clean"] > 0


def evaluate_nothing(lm: Path, data: Path) -> dict[str, float]:
    """As `evaluate`, where every token is special. For `RankPool.run`."""
    (hook,) = list(HOOKS)[:1]
    with initialize(ONE) as context:
        source = load_source(StreamConfig(lm=str(lm), micro_batch_size=2), [hook], context)
        text = held_out(StreamConfig(lm=str(lm)), DataConfig(path=str(data)), source, samples=2)
        assert text is not None
        (spec,) = specs_of(SAEConfig(hooks=[hook], width=2 * D, k=4), source.widths)
        saes = {spec.name: ARCHITECTURES["topk"](spec, stage_context(context))}
        text = replace(text, special_ids=tuple(range(text.samples.vocab_size)))
        return evaluate_saes([spec], saes, source, text, context)[spec.name].values
