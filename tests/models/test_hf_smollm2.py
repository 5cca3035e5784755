"""A real model through import and export: SmolLM2-135M, 30 layers, 9 heads in 3 key/value groups, tied embeddings."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from steerscale.models.hf.export import export_hf
from steerscale.models.hf.families import config_from_hf
from steerscale.models.hf.load import load_hf
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.testing.ranks import RankPool
from tests.models.gpts import build, infer

ATOL = 1e-4  # fp32 logits of order 10 to 30, after 30 layers
LAYOUTS = {
    "TP1": ParallelLayout(),
    "TP3": ParallelLayout(tensor=3),
    "TP3+SPxPP2": ParallelLayout(tensor=3, sequence=True, pipeline=2),
}
TEXT = """The sun is a star at the center of the solar system. It is a massive ball of hot gas, and it gives light and heat to
the planets that orbit around it. The Earth takes about one year to travel around the sun. Without the sun, there would be no
life on Earth, because plants need sunlight to grow, and animals need plants for food. Scientists study the sun with
telescopes and satellites to learn more about how it works. The sun is about 4.6 billion years old, and it will continue to
shine for several billion years before it runs out of fuel."""


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [1, S] of the text, and transformers' logits for them [1, S, V]."""
    tokens = transformers.AutoTokenizer.from_pretrained(smollm2)(TEXT, return_tensors="pt")["input_ids"]
    tokens = tokens[:, : tokens.shape[1] // 3 * 3]  # whole slices for three sequence-parallel ranks
    return tokens.numpy(), reference_logits(smollm2, tokens)


def reference_logits(directory: Path, tokens_BS: torch.Tensor) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens_BS).logits.numpy()


def import_and_run(
    layout: ParallelLayout, source: Path, tokens_BS: np.ndarray, target: Path | None = None
) -> np.ndarray | None:
    """Logits of the imported model on the last stage; exports it again to `target`."""
    with initialize(layout) as context:
        chunks = build(dataclasses.replace(config_from_hf(source), seq_len=tokens_BS.shape[1]), context)
        load_hf(source, chunks, context)
        if target is not None:
            export_hf(chunks, context, target, tokenizer_directory=source, max_file_bytes=10**8)
        logits = infer(chunks, torch.from_numpy(tokens_BS))
        return None if logits is None else logits.numpy()


def test_text_is_english_to_the_reference(reference: tuple[np.ndarray, np.ndarray]) -> None:
    tokens, logits = reference
    assert tokens.shape[1] > 100
    loss = F.cross_entropy(torch.from_numpy(logits[0, :-1]), torch.from_numpy(tokens[0, 1:]))
    assert loss < 3  # 10.8 is chance


@pytest.mark.parametrize("layout", ["TP1", "TP3"])
def test_parity_smollm2_logits(
    pool: RankPool, smollm2: Path, reference: tuple[np.ndarray, np.ndarray], layout: str
) -> None:
    tokens, expected = reference
    ranks = pool.run(import_and_run, LAYOUTS[layout], smollm2, tokens, ranks=LAYOUTS[layout].world_size)
    for logits in ranks:
        np.testing.assert_allclose(logits, expected, rtol=0, atol=ATOL)


def test_parity_smollm2_pipeline_logits_and_export(
    pool: RankPool, smollm2: Path, reference: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    tokens, expected = reference
    layout, target = LAYOUTS["TP3+SPxPP2"], tmp_path / "exported"
    ranks = pool.run(import_and_run, layout, smollm2, tokens, target, ranks=layout.world_size)
    for logits in ranks[layout.tensor :]:
        np.testing.assert_allclose(logits, expected, rtol=0, atol=ATOL)
    files = sorted(target.glob("*.safetensors"))
    assert len(files) > 5
    written = {name: tensor for path in files for name, tensor in load_file(path).items()}
    source = load_file(smollm2 / "model.safetensors")
    assert written.keys() == source.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in source.items())
    assert_transformers_agree(target, tokens, expected)


def assert_transformers_agree(directory: Path, tokens_BS: np.ndarray, expected: np.ndarray) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    np.testing.assert_array_equal(tokenizer(TEXT)["input_ids"][: tokens_BS.shape[1]], tokens_BS[0])
    np.testing.assert_array_equal(reference_logits(directory, torch.from_numpy(tokens_BS)), expected)
