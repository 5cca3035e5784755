"""What a source reads: against transformers, on every layout, and no further than the last hook."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from steerscale.activations.config import StreamConfig
from steerscale.activations.loading import load_source
from steerscale.activations.shape import find_kind, language_model
from steerscale.activations.source import GPTSource, TransformersSource
from steerscale.errors import ConfigError, DataError, LayoutError
from steerscale.models.config import ModelConfig
from steerscale.models.hf.export import export_hf
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.testing.parity import ACTIVATIONS
from steerscale.testing.ranks import RankPool
from steerscale.testing.smollm2 import smollm2_directory
from tests.activations.streams import ONE
from tests.models.gpts import LLAMA, build_random, infer

TOKENS = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(0))
LAYERS = {f"blocks.{layer}.hook_resid_post": layer for layer in (0, 2)}
LAYOUTS = {
    "TP2": ParallelLayout(tensor=2),
    "TP2+SP": ParallelLayout(tensor=2, sequence=True),
    "PP2": ParallelLayout(pipeline=2),
    "PP4": ParallelLayout(pipeline=4),
    "TP2xPP2": ParallelLayout(tensor=2, pipeline=2),
}


def hidden_states(directory: Path, tokens_BS: torch.Tensor) -> list[np.ndarray]:
    """transformers' residual stream: before block 0, then after each block (after the last one: normed)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return [x.numpy() for x in model(tokens_BS, output_hidden_states=True).hidden_states]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in transformers' format."""
    directory = tmp_path_factory.mktemp("llama") / "hf"
    with initialize(ONE) as context:
        export_hf(build_random(LLAMA, context), context, directory)
    return directory


def read(layout: ParallelLayout, lm: Path, hooks: list[str], batches: list[torch.Tensor], kind: str) -> list[dict]:
    """Activations of each batch on this rank."""
    with initialize(layout) as context:
        source = load_source(StreamConfig(lm=str(lm), lm_kind=kind, seq_len=8), hooks, context)
        answer = [{hook: x.numpy() for hook, x in found.items()} for found in source.run(batches)]
        source.close()
        assert all(found.keys() == source.owned for found in answer)
        return answer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_imported_model_against_transformers(layout: str, llama: Path, pool: RankPool) -> None:
    degrees, batches = LAYOUTS[layout], [TOKENS, TOKENS.flip(0), TOKENS[:1], TOKENS, TOKENS]
    expected = [hidden_states(llama, tokens) for tokens in batches]
    ranks = pool.run(read, degrees, llama, list(LAYERS), batches, "gpt", ranks=degrees.world_size)
    seen = set()
    for answer in ranks:
        for found, states in zip(answer, expected, strict=True):
            for hook, x_BSM in found.items():
                seen.add(hook)
                np.testing.assert_allclose(x_BSM, states[LAYERS[hook] + 1], rtol=0, atol=ACTIVATIONS)
    assert seen == set(LAYERS)


def test_transformers_source_reads_modules(llama: Path, pool: RankPool) -> None:
    paths = {"model.layers.2": 3, "model.embed_tokens": 0, "model.layers.0": 1}
    states = hidden_states(llama, TOKENS)
    (one,) = read(ONE, llama, list(paths), [TOKENS], "transformers")
    for path, index in paths.items():
        np.testing.assert_array_equal(one[path], states[index])
    degrees = ParallelLayout(tensor=2)
    for ((rank),) in pool.run(read, degrees, llama, list(paths), [TOKENS], "transformers", ranks=2):
        for path in paths:
            np.testing.assert_array_equal(rank[path], one[path])


def test_smollm2_through_both_sources_against_transformers() -> None:
    try:
        directory = smollm2_directory()
    except DataError as error:
        pytest.skip(str(error))
    tokens = torch.randint(40000, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = hidden_states(directory, tokens)[16]
    config = StreamConfig(lm=str(directory), seq_len=16)
    with initialize(ONE) as context:
        source = load_source(config, ["blocks.15.hook_resid_post"], context)
        ((ours,),) = (found.values() for found in source.run([tokens]))
        assert source.special_ids == {0, 1, 2}  # <|endoftext|>, <|im_start|>, <|im_end|>
        assert source.widths == {"blocks.15.hook_resid_post": 576}
        other = load_source(replace(config, lm_kind="transformers"), ["model.layers.15"], context)
        ((theirs,),) = (found.values() for found in other.run([tokens]))
        assert (other.special_ids, other.tokenizer_hash) == (source.special_ids, source.tokenizer_hash)
    np.testing.assert_array_equal(theirs.numpy(), expected)
    # Residuals of SmolLM2 reach several hundred at the first position.
    np.testing.assert_allclose(ours.numpy(), expected, rtol=ACTIVATIONS, atol=1e-3)


def test_forward_ends_behind_the_last_hook_and_the_model_stays_whole() -> None:
    reached: list[str] = []
    with initialize(ONE) as context:
        chunks = build_random(LLAMA, context)
        before = infer(chunks, TOKENS)
        for name in ("decoder.layers.2.mlp", "decoder.layers.3", "decoder.final_layernorm", "output_layer"):
            chunks[0].get_submodule(name).register_forward_hook(lambda *_, name=name: reached.append(name))
        for hook in ("blocks.2.hook_attn_out", "blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"):
            source = GPTSource(chunks, ["blocks.1.hook_mlp_out", hook], context, seq_len=8)
            (found,) = source.run([TOKENS])
            assert list(found) == ["blocks.1.hook_mlp_out", hook]
            assert not any(x.requires_grad for x in found.values())
        assert reached == ["decoder.layers.2.mlp"]
        after = infer(chunks, TOKENS)
    assert torch.equal(after, before)
    assert len(reached) == 5


def test_bf16_model_gives_bf16_activations(llama: Path) -> None:
    with initialize(ONE) as context:
        config = StreamConfig(lm=str(llama), seq_len=8, precision="bf16")
        source = load_source(config, list(LAYERS), context)
        (found,) = source.run([TOKENS])
    assert source.dtype == torch.bfloat16
    for hook, layer in LAYERS.items():
        assert found[hook].dtype == torch.bfloat16
        torch.testing.assert_close(
            found[hook].float(), torch.from_numpy(hidden_states(llama, TOKENS)[layer + 1]), rtol=0.1, atol=0.2
        )


def refusal(layout: ParallelLayout, llama: Path, kind: str, hooks: list[str], seq_len: int) -> str:
    with initialize(layout) as context, pytest.raises((ConfigError, LayoutError)) as caught:
        load_source(StreamConfig(lm=str(llama), lm_kind=kind, seq_len=seq_len), hooks, context)
    return str(caught.value)


HOOK, MODULE = ["blocks.2.hook_resid_post"], ["model.layers.2"]
REFUSED_LAYOUTS = {
    "interleaved": (
        (ParallelLayout(pipeline=2, virtual_pipeline=2, gradient_accumulation_steps=2), "gpt", HOOK, 8),
        "parallel.virtual_pipeline must be 1",
    ),
    "pipeline": ((ParallelLayout(pipeline=2), "transformers", MODULE, 8), "parallel.pipeline must be 1 for a transf"),
    "sequence": ((ParallelLayout(tensor=2, sequence=True), "gpt", HOOK, 7), "2 does not divide 7"),
}


@pytest.mark.parametrize("case", REFUSED_LAYOUTS)
def test_layouts_that_cannot_stream_are_refused(case: str, llama: Path, pool: RankPool) -> None:
    (layout, kind, hooks, seq_len), text = REFUSED_LAYOUTS[case]
    for answer in pool.run(refusal, layout, llama, kind, hooks, seq_len, ranks=2):
        assert text in answer


@pytest.mark.parametrize(
    ("kind", "hooks", "text"),
    [
        ("gpt", ["blocks.9.hook_resid_post"], "no hook point 'blocks.9.hook_resid_post'"),
        ("gpt", [], "no hook point is given"),
        ("gpt", HOOK * 2, "hook points must differ"),
        (
            "transformers",
            ["model.layer.2"],
            "no module 'model.layer.2' in LlamaForCausalLM: did you mean 'model.layers.2'",
        ),
        ("transformers", ["model.layers"], "does not come through 'model.layers'"),
        ("transformers", ["model"], "'model' returns no activation"),
    ],
)
def test_hooks_that_are_not_there_are_refused(kind: str, hooks: list[str], text: str, llama: Path) -> None:
    assert text in refusal(ONE, llama, kind, hooks, 8)


def test_learned_positions_end() -> None:
    model = ModelConfig(num_layers=1, d_model=8, num_heads=1, seq_len=16, vocab_size=10)
    with (
        initialize(ONE) as context,
        pytest.raises(ConfigError, match=r"stream\.seq_len=17 is longer than .* 16 learned"),
    ):
        GPTSource(build_random(model, context), ["blocks.0.hook_mlp_out"], context, seq_len=17)


def test_kind_of_a_language_model(llama: Path, tmp_path: Path) -> None:
    config = StreamConfig(lm=str(llama))
    assert find_kind(config) == "family"
    assert find_kind(replace(config, lm_kind="transformers")) == "transformers"
    with pytest.raises(ConfigError, match=r"neither a run directory \(no config\.yaml\)"):
        find_kind(StreamConfig(lm=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"stream\.checkpoint chooses among a run's"):
        find_kind(replace(config, checkpoint="step_00000001"))
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert find_kind(StreamConfig(lm=str(tmp_path))) == "transformers"
    with pytest.raises(
        ConfigError, match=r"of model_type 'mamba', which stream\.lm_kind=gpt cannot be; it can be llama, gpt2"
    ):
        find_kind(StreamConfig(lm=str(tmp_path), lm_kind="gpt"))


@pytest.mark.parametrize(("text", "wrong"), [("[1]", "must hold a JSON object, got list"), ("{", "cannot be read")])
def test_damaged_config_is_named(text: str, wrong: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    for ask in (find_kind, language_model):
        with pytest.raises(ConfigError, match=wrong):
            ask(StreamConfig(lm=str(tmp_path)))


def test_loss_of_a_model_without_a_head_is_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Activations it has all the same: training on them must not end in an error of the evaluation."""
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=1, vocab_size=10, n_positions=16)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    with initialize(ONE) as context:
        source = load_source(StreamConfig(lm=str(tmp_path), lm_kind="transformers"), ["h.0"], context)
        tokens = torch.zeros(2, 5, dtype=torch.int64)
        losses = source.losses(tokens, tokens, {"h.0": torch.zeros_like})
    assert losses is not None
    assert losses.shape == (2, 5)
    assert losses.isnan().all()
    assert "GPT2Model, which has no output head" in caplog.text


def test_transformers_source_is_whole_modules() -> None:
    with initialize(ONE) as context:
        config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=1, vocab_size=10, n_positions=16)
        source = TransformersSource(transformers.GPT2LMHeadModel(config), ["transformer.h.0.mlp"], context, seq_len=16)
        assert (source.widths, source.owned) == ({"transformer.h.0.mlp": 8}, {"transformer.h.0.mlp"})
