"""Import and export of Hugging Face directories: the same logits as transformers, every bit back."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from steerscale.errors import CheckpointError, ConfigError, DataError
from steerscale.models.config import ModelConfig
from steerscale.models.hf.export import export_hf
from steerscale.models.hf.families import config_from_hf, family_of
from steerscale.models.hf.load import load_hf
from steerscale.models.hf.tensors import TensorFiles
from steerscale.models.sharding import gather_parameters, named_shards
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.testing.ranks import RankPool
from tests.disks import small_disk
from tests.models.conftest import export_random
from tests.models.gpts import GPT2, LLAMA, MODELS, build, build_random, infer

ATOL = 1e-5  # fp32 logits of order 1 to 10
LAYOUTS = {
    "TP1": ParallelLayout(),
    "TP2": ParallelLayout(tensor=2),
    "PP2x2": ParallelLayout(pipeline=2, virtual_pipeline=2, gradient_accumulation_steps=2),
    "TP2xPP2": ParallelLayout(tensor=2, pipeline=2),
}
ONE = LAYOUTS["TP1"]
TOKENS = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(3))


def export_failing(model: ModelConfig, layout: ParallelLayout, directory: Path) -> str:
    with initialize(layout) as context:
        chunks = build_random(model, context)
        with pytest.raises((DataError, CheckpointError)) as caught:
            export_hf(chunks, context, directory)
        return f"{caught.type.__name__}: {caught.value}"


def import_and_run(
    model: ModelConfig, layout: ParallelLayout, directory: Path, tokens: np.ndarray
) -> dict[str, np.ndarray | None]:
    """Logits, on the last stage."""
    with initialize(layout) as context:
        chunks = build(model, context)
        load_hf(directory, chunks, context)
        logits = infer(chunks, torch.from_numpy(tokens))
        return {"logits": None if logits is None else logits.numpy()}


def import_and_gather(model: ModelConfig, layout: ParallelLayout, directory: Path) -> dict[str, np.ndarray]:
    with initialize(layout) as context:
        chunks = build(model, context)
        load_hf(directory, chunks, context)
        return {name: tensor.numpy() for name, tensor in gather_parameters(chunks, context).items()}


def random_parameters(model: ModelConfig) -> dict[str, np.ndarray]:
    """What `build_random` makes in one process, with the padding that every import makes zero."""
    with initialize(ONE) as context:
        parameters = gather_parameters(build_random(model, context), context)
    for name in {"embedding.word_embeddings.weight", "output_layer.weight"} & parameters.keys():
        parameters[name][model.tokens :] = 0.0
    return {name: tensor.numpy() for name, tensor in parameters.items()}


def transformers_logits(directory: Path, tokens_BS: torch.Tensor) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        return model(tokens_BS).logits.numpy()


def model_logits(model: ModelConfig) -> np.ndarray:
    with initialize(ONE) as context:
        logits = infer(build_random(model, context), TOKENS)
        assert logits is not None
        return logits.numpy()


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        np.testing.assert_array_equal(found[name], parameter, err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_export_from_tp2_pp2_gives_transformers_the_same_logits(exported: Callable, name: str) -> None:
    logits = transformers_logits(exported(name), TOKENS)
    np.testing.assert_allclose(logits, model_logits(MODELS[name]), atol=ATOL)
    assert np.abs(logits).max() > 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*MODELS, "gpt2 split", "llama split"])
def test_parity_export_and_import_are_bitwise(pool: RankPool, exported: Callable, name: str, layout: str) -> None:
    model = MODELS[name.split()[0]]
    ranks = pool.run(import_and_gather, model, LAYOUTS[layout], exported(name), ranks=LAYOUTS[layout].world_size)
    expected = random_parameters(model)
    for found in ranks:
        assert_equal(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_files_are_the_same_from_every_layout(
    pool: RankPool, exported: Callable, tmp_path: Path, layout: str
) -> None:
    pool.run(export_random, LLAMA, LAYOUTS[layout], tmp_path / "hf", 20_000, ranks=LAYOUTS[layout].world_size)
    written = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert written == {path.name: path.read_bytes() for path in exported("llama split").iterdir()}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_config_survives_the_way_there_and_back(exported: Callable, name: str) -> None:
    model = MODELS[name]
    found = dataclasses.replace(config_from_hf(exported(name)), pad_vocab_to=model.pad_vocab_to)
    for field in dataclasses.fields(found):
        if field.name not in ("num_kv_groups", "d_head", "d_ff"):  # None and its meaning are the same
            assert getattr(found, field.name) == getattr(model, field.name), field.name
    assert (found.kv_groups, found.head_width, found.ffn_width) == (
        model.kv_groups,
        model.head_width,
        model.ffn_width,
    )


def test_files_are_split_by_size_with_an_index(exported: Callable) -> None:
    directory = exported("gpt2 split")
    files = sorted(directory.glob("model-*.safetensors"))
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 20_000 + 2_000 for path in files)
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    np.testing.assert_allclose(transformers_logits(directory, TOKENS), model_logits(GPT2), atol=ATOL)


def test_files_are_readable_by_those_who_may_read_the_directory(exported: Callable) -> None:
    modes = {path.stat().st_mode for path in exported("llama split").iterdir()}
    assert len(modes) == 1


def test_export_refuses_an_existing_directory_on_every_rank(pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    layout = LAYOUTS["TP2xPP2"]
    errors = pool.run(export_failing, LLAMA, layout, tmp_path, ranks=4)
    assert errors[0].startswith("DataError")
    assert str(tmp_path) in errors[0]
    assert all(error.startswith(f"CheckpointError: {tmp_path} was not written: ") for error in errors[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_failing_export_leaves_nothing_behind(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=64) as disk, initialize(ONE) as context:
        chunks = build_random(GPT2, context)
        with pytest.raises(DataError, match="No space left"):
            export_hf(chunks, context, disk / "hf")
        assert list(disk.iterdir()) == []


def test_export_copies_the_tokenizer(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "notes.txt").write_text("no part of it")
    with initialize(ONE) as context:
        chunks = build_random(GPT2, context)
        with pytest.raises(ConfigError, match=r"holds no Hugging Face tokenizer: no tokenizer\.json"):
            export_hf(chunks, context, tmp_path / "hf", tokenizer_directory=source)
        (source / "tokenizer.json").write_text("{}")
        (source / "generation_config.json").write_text("{}")
        export_hf(chunks, context, tmp_path / "hf", tokenizer_directory=source)
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_export_in_bfloat16_names_its_type(tmp_path: Path) -> None:
    with initialize(ONE) as context:
        chunks = [chunk.bfloat16() for chunk in build_random(LLAMA, context)]
        export_hf(chunks, context, tmp_path / "hf")
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("model", "needs"),
    [
        (dataclasses.replace(GPT2, activation="swiglu"), r"GPT2LMHeadModel needs model\.activation=gelu or gelu_tanh$"),
        (dataclasses.replace(GPT2, qkv_bias=False), r"GPT2LMHeadModel needs model\.qkv_bias=true$"),
        (dataclasses.replace(GPT2, num_kv_groups=2), "GPT2LMHeadModel needs a key/value head for each query head$"),
        (dataclasses.replace(GPT2, d_head=8), r"GPT2LMHeadModel needs model\.d_head=d_model/num_heads$"),
        (dataclasses.replace(LLAMA, position="learned"), r"LlamaForCausalLM needs model\.position=rotary;"),
        (dataclasses.replace(LLAMA, norm="layernorm"), r"LlamaForCausalLM needs model\.norm=rmsnorm;"),
        (dataclasses.replace(LLAMA, qkv_bias=True), r"LlamaForCausalLM needs model\.qkv_bias=false;"),
        (
            dataclasses.replace(LLAMA, d_model=26, d_head=8),
            "LlamaForCausalLM needs a model.d_model that model.num_heads",
        ),
    ],
)
def test_model_that_no_family_expresses_is_refused(model: ModelConfig, needs: str) -> None:
    with pytest.raises(ConfigError, match=f"no Hugging Face architecture can express this model: .*{needs}"):
        family_of(model)


@pytest.mark.parametrize("layout", ["TP1", "TP2xPP2"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_import_of_what_transformers_wrote(
    pool: RankPool, tmp_path: Path, name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only our own files: transformers' own config.json and tensors, in several files."""
    torch.manual_seed(0)
    common = {"vocab_size": 61, "tie_word_embeddings": True}
    if name == "llama":
        shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
        rope = {"rope_type": "default", "rope_theta": 123.0}
        config = transformers.LlamaConfig(**shape, **heads, **common, rope_parameters=rope, initializer_range=0.2)
    else:
        pdrop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(
            n_embd=24, n_layer=4, n_head=4, n_positions=32, **common, **pdrop, initializer_range=0.2
        )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        expected = theirs(TOKENS).logits.numpy()
    # Fewer positions than the file has.
    model = dataclasses.replace(config_from_hf(tmp_path), pad_vocab_to=16, seq_len=16)
    ranks = pool.run(import_and_run, model, LAYOUTS[layout], tmp_path, TOKENS.numpy(), ranks=LAYOUTS[layout].world_size)
    np.testing.assert_allclose(ranks[-1]["logits"], expected, atol=ATOL)


def read_elements(model: ModelConfig, layout: ParallelLayout, directory: Path) -> tuple[int, int]:
    """Elements read from files by this rank, and elements of its parameters that are not padding."""
    count = 0
    read = TensorFiles.read

    def counting(files: TensorFiles, name: str, *slices: slice) -> torch.Tensor:
        nonlocal count
        tensor = read(files, name, *slices)
        count += tensor.numel()
        return tensor

    with initialize(layout) as context, pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorFiles, "read", counting)
        chunks = build(model, context)
        load_hf(directory, chunks, context)
        held = 0
        for shard, parameter in named_shards(chunks):
            held += parameter.numel()
            if "word_embeddings" in shard.name or "output_layer" in shard.name:
                end = (context.at.tensor + 1) * len(parameter)
                held -= max(0, end - model.tokens) * parameter.shape[1]
        return count, held


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_rank_reads_only_what_it_holds(pool: RankPool, exported: Callable, name: str) -> None:
    for layout in LAYOUTS.values():
        for read, held in pool.run(read_elements, MODELS[name], layout, exported(name), ranks=layout.world_size):
            assert read == held


def test_tensors_without_the_models_prefix_and_old_buffers_are_accepted(exported: Callable, tmp_path: Path) -> None:
    """As in the first files published for GPT-2."""
    weights = load_file(exported("gpt2") / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    weights |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.3.attn.masked_bias": torch.ones(())}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((exported("gpt2") / "config.json").read_text())
    assert_equal(import_and_gather(GPT2, ONE, tmp_path), random_parameters(GPT2))
