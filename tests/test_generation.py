"""Text from models: the same on every layout, with and without a cache, and as transformers makes it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from steerscale.cli import main
from steerscale.errors import ConfigError
from steerscale.generation import _Text, generate, next_logits
from steerscale.language_model import LanguageModel, load_language_model
from steerscale.models.hf.export import export_hf
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.sampling import GREEDY, Sampling
from steerscale.testing.ranks import RankPool
from steerscale.testing.smollm2 import smollm2_directory
from tests.models.gpts import GPT2, MODELS, build_random

ONE = ParallelLayout()
LAYOUTS = {
    "TP2": ParallelLayout(tensor=2),
    "PP2": ParallelLayout(pipeline=2),
    "TP2+SPxPP2": ParallelLayout(tensor=2, sequence=True, pipeline=2),
}
PROMPTS = [[5, 17, 3], [60, 2, 9, 9, 31, 44, 8], [1]]
DRAWN = Sampling(temperature=1.3, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=7)
SETTINGS = {"greedy": GREEDY, "drawn": DRAWN}


def go_on(layout: ParallelLayout, cache: bool = True, max_tokens: int = 9) -> dict[str, list[list[int]]]:
    """New tokens by model and settings, from one rank."""
    with initialize(layout) as context:
        found = {}
        for name, model in MODELS.items():
            lm = LanguageModel(build_random(model, context), context)
            for kind, sampling in SETTINGS.items():
                results = generate(lm, PROMPTS, sampling, max_tokens=max_tokens, cache=cache)
                found[f"{name} {kind}"] = [result.tokens for result in results]
        return found


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    return go_on(ONE)


def test_one_process_greedy_is_transformers(
    expected: dict[str, list[list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    for name, model in MODELS.items():
        directory = tmp_path_factory.mktemp("hf") / name
        with initialize(ONE) as context:
            export_hf(build_random(model, context), context, directory)
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        for prompt, tokens in zip(PROMPTS, expected[f"{name} greedy"]):
            output = theirs.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, pad_token_id=0)
            assert output[0, len(prompt) :].tolist() == tokens


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_tokens(layout: str, expected: dict[str, list[list[int]]], pool: RankPool) -> None:
    for found in pool.run(go_on, LAYOUTS[layout], ranks=LAYOUTS[layout].world_size):
        assert found == expected


def test_cache_changes_nothing_even_where_the_text_outgrows_the_model() -> None:
    longer = go_on(ONE, max_tokens=14)
    assert longer == go_on(ONE, cache=False, max_tokens=14)
    assert len(longer["gpt2 greedy"][1]) == 14 > GPT2.seq_len - len(PROMPTS[1])


def test_batches_do_not_change_a_text() -> None:
    with initialize(ONE) as context:
        lm = LanguageModel(build_random(GPT2, context), context)
        together = generate(lm, PROMPTS, GREEDY, max_tokens=6)
        for prompt, result in zip(PROMPTS, together):
            (alone,) = generate(lm, [prompt], GREEDY, max_tokens=6)
            assert alone.tokens == result.tokens


def test_functions_act_the_same_with_and_without_a_cache() -> None:
    def push(x_BSM: torch.Tensor) -> torch.Tensor:
        return x_BSM + torch.linspace(-3, 3, x_BSM.shape[-1])

    with initialize(ONE) as context:
        lm = LanguageModel(build_random(GPT2, context), context)
        run = partial(generate, lm, PROMPTS, GREEDY, max_tokens=8, functions={"blocks.2.hook_resid_post": push})
        pushed = [result.tokens for result in run()]
        assert pushed == [result.tokens for result in run(cache=False)]
        assert pushed != [result.tokens for result in generate(lm, PROMPTS, GREEDY, max_tokens=8)]


@pytest.mark.parametrize("prompts", [[], [[]], [[61]], [[-1]]], ids=str)
def test_generate_refuses_what_is_no_prompt(prompts: list[list[int]]) -> None:
    with initialize(ONE) as context:
        lm = LanguageModel(build_random(GPT2, context), context)
        with pytest.raises(ConfigError, match="prompt"):
            generate(lm, prompts, max_tokens=1)
        with pytest.raises(ConfigError, match="max_tokens"):
            generate(lm, PROMPTS, max_tokens=0)


def broken(layout: ParallelLayout) -> str:
    """What one rank says of a model whose activations are no numbers."""
    functions = {"blocks.1.hook_resid_post": lambda x_BSM: x_BSM * float("nan")}
    with initialize(layout) as context:
        lm = LanguageModel(build_random(GPT2, context), context)
        for sampling in (GREEDY, DRAWN):
            with pytest.raises(ConfigError, match="not finite") as caught:
                generate(lm, PROMPTS, sampling, max_tokens=3, functions=functions)
        return str(caught.value)


def test_logits_that_are_no_numbers_are_an_error_on_every_rank(pool: RankPool) -> None:
    assert pool.run(broken, LAYOUTS["PP2"], ranks=2) == [broken(ONE)] * 2


def test_a_text_longer_than_learned_positions_is_refused() -> None:
    with initialize(ONE) as context:
        lm = LanguageModel(build_random(GPT2, context), context)
        with pytest.raises(ConfigError, match=r"17 tokens.* positions for 16"):
            lm.logits(torch.zeros(1, 17, dtype=torch.int64))


PROMPT = "Once upon a time, there was a little girl who"


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return smollm2_directory()


def test_smollm2_greedy_text_stops_and_streams(smollm2: Path) -> None:
    with initialize(ONE) as context:
        lm = load_language_model(smollm2, context)
        prompts = [lm.encode(PROMPT), lm.encode("The capital of France is")]
        pieces: list[tuple[int, str]] = []
        found = generate(
            lm,
            prompts,
            GREEDY,
            max_tokens=16,
            stop=["toys", "\n\n"],
            on_text=lambda row, piece: pieces.append((row, piece)),
        )
        logits_V = next_logits(lm, prompts[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for prompt, result in zip(prompts, found):
        output = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=16,
            do_sample=False,
            stop_strings=["toys", "\n\n"],
            tokenizer=tokenizer,
            pad_token_id=0,
        )
        assert output[0, len(prompt) :].tolist() == result.tokens
        assert result.end == "stop"
    assert found[0].text == " loved to play with her "
    assert found[1].text == " Paris."
    for row, result in enumerate(found):
        assert "".join(piece for at, piece in pieces if at == row) == result.text
    assert len(pieces) > 6, "text comes while it is made"
    with torch.no_grad():
        expected_V = theirs(torch.tensor([prompts[0]])).logits[0, -1]
    torch.testing.assert_close(logits_V, expected_V, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prompt", ["It is \ufffd", "It is \ufffd\ufffd", "\ufffd"])
def test_a_prompt_may_end_with_what_stands_for_damaged_characters(smollm2: Path, prompt: str) -> None:
    with initialize(ONE) as context:
        lm = load_language_model(smollm2, context)
        tokens = lm.encode(prompt)
        (found,) = generate(lm, [tokens], GREEDY, max_tokens=5)
    assert found.text == lm.tokenizer.decode([*tokens, *found.tokens])[len(prompt) :]


def test_a_prompt_may_end_within_a_character(smollm2: Path) -> None:
    with initialize(ONE) as context:
        lm = load_language_model(smollm2, context)
        whole = lm.encode("A smile: \N{GRINNING FACE}")
        missing = whole[-1]
        text = _Text(lm, whole[:-1], [])
    assert not text.add(missing)
    assert text.take(all=True) == "\N{GRINNING FACE}"


def test_sample_command_streams_text_and_shows_tokens(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample", str(smollm2), "--prompt", PROMPT, "--max-tokens", "4", "--temperature", "0"]
    assert main(command) == 0
    assert capsys.readouterr().out == PROMPT + " loved to play with\n"
    assert main([*command, "--top-tokens", "3"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[2].split()[0] == "Ġloved"
    assert table[2].split()[2] == "1.0000"
    assert len(table) == 5
    assert main([*command, "--prompt", "\udcff"]) == 2
    assert "is no text" in capsys.readouterr().err
    assert main([*command, "--tensor", "2"]) == 2
    assert "1 ranks were started" in capsys.readouterr().err


@pytest.mark.parametrize("make", [lambda path: path, lambda path: path / "nothing"], ids=["empty", "absent"])
def test_sample_command_refuses_what_is_no_model(
    make: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(make(tmp_path))]) == 2
    assert "neither a run directory" in capsys.readouterr().err
