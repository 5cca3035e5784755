"""What a pass over a text finds about all latents, against the same computed from all values at once."""

import pytest
import torch

from steerscale.errors import ConfigError, LayoutError
from steerscale.interp.best import Best
from steerscale.interp.features import decoder_neighbours, token_effects
from steerscale.interp.interventions import capture
from steerscale.interp.latent_index import BINS_PER_OCTAVE, OCTAVES, LatentIndex, build_index
from steerscale.language_model import LanguageModel
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.testing.ranks import RankPool
from tests.interp.saes import HOOK, random_sae
from tests.models.gpts import GPT2, build_random

ONE = ParallelLayout()
TEXT = torch.randint(61, (7, 13), generator=torch.Generator().manual_seed(8))
SPECIAL = int(TEXT[0, 0])
D, WIDTH, TOP, DRAWN = GPT2.d_model, 3, 4, 2


def model(context: object) -> LanguageModel:
    return LanguageModel(build_random(GPT2, context), context, special_ids=frozenset({SPECIAL}))  # type: ignore[arg-type]


def look(lm: LanguageModel, architecture: str, sizes: tuple[int, ...] = (4, 3), latents: int = 97) -> LatentIndex:
    sae = random_sae(D, architecture, latents=latents)
    return build_index(lm, sae, TEXT.split(sizes), spare_first=1, num_top=TOP, num_drawn=DRAWN, width=WIDTH)


@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu"])
def test_index_is_what_all_values_say(architecture: str) -> None:
    sae = random_sae(D, architecture, latents=97)
    inputs = TEXT[:, :-1]
    with initialize(ONE) as context:
        lm = model(context)
        index = look(lm, architecture)
        counts = (inputs != SPECIAL) & (torch.arange(12) > 0)
        values_RSJ = sae.encode(capture(lm, inputs, [HOOK])[HOOK]) * counts.unsqueeze(-1)
    active_RSJ = values_RSJ > 0
    assert index.latents == list(range(97))
    assert index.num_tokens == int(counts.sum())
    assert torch.equal(index.tokens_RS, inputs.int())
    assert torch.equal(index.active_J, active_RSJ.sum(dim=(0, 1)))
    torch.testing.assert_close(index.total_J, values_RSJ.double().sum(dim=(0, 1)))
    assert torch.equal(index.counts_JH.sum(dim=1).long(), index.active_J)
    best_RJ = values_RSJ.max(dim=1)
    tops = best_RJ.values.topk(TOP, dim=0).values.T
    torch.testing.assert_close(index.top.value_GK.clamp_min(0), tops, rtol=1e-5, atol=1e-6)
    padded = torch.nn.functional.pad(values_RSJ, (0, 0, WIDTH, WIDTH))
    seen = 0
    for contexts, octaves in ((index.top, None), (index.drawn, OCTAVES)):
        assert contexts.value_GK.shape[1] == (TOP if octaves is None else octaves * DRAWN)
        for latent, place in (contexts.position_GK >= 0).nonzero().tolist():
            row, at = divmod(int(contexts.position_GK[latent, place]), 12)
            value = float(contexts.value_GK[latent, place])
            assert value == pytest.approx(float(values_RSJ[row, at, latent]), rel=1e-5)
            window = padded[row, at : at + 2 * WIDTH + 1, latent]
            torch.testing.assert_close(contexts.window_GKW[latent, place].float(), window, rtol=1e-2, atol=1e-6)
            if octaves is not None:
                lowest = 2.0 ** (index.lowest_exponent + place // DRAWN)
                assert value < 2 * lowest
                assert value >= lowest or place < DRAWN
                seen += 1
    assert seen > 97


def test_drawn_contexts_fill_every_octave_that_has_values_and_differ() -> None:
    with initialize(ONE) as context:
        index = look(model(context), "relu")
    octaves_JO = index.counts_JH.view(97, OCTAVES, BINS_PER_OCTAVE).sum(dim=-1)
    drawn = index.drawn.position_GK.view(97, OCTAVES, DRAWN)
    assert torch.equal((drawn >= 0).sum(dim=-1), octaves_JO.clamp_max(DRAWN))
    both = (drawn >= 0).all(dim=-1)
    assert (drawn[both][:, 0] != drawn[both][:, 1]).all()


def test_batches_do_not_change_what_is_found() -> None:
    with initialize(ONE) as context:
        lm = model(context)
        one, other = look(lm, "relu"), look(lm, "relu", sizes=(4, 1, 1, 1))
    assert_same(one, other)


def assert_same(one: LatentIndex, other: LatentIndex) -> None:
    assert one.latents == other.latents
    assert (one.num_tokens, one.lowest_exponent) == (other.num_tokens, other.lowest_exponent)
    assert torch.equal(one.active_J, other.active_J)
    for mine, theirs in zip((*one.top, *one.drawn), (*other.top, *other.drawn)):
        torch.testing.assert_close(mine, theirs, rtol=1e-2 if mine.dtype == torch.bfloat16 else 1e-4, atol=1e-5)


def look_on_ranks(layout: ParallelLayout, architecture: str) -> tuple[LatentIndex, list[list[int]]]:
    with initialize(layout) as context:
        lm = model(context)
        index = look(lm, architecture)
        promoted, suppressed = token_effects(lm, random_sae(D, architecture, latents=97), index.latents, 5)
        return index, [promoted.tokens_JC.tolist(), suppressed.tokens_JC.tolist()]


@pytest.mark.parametrize("architecture", ["relu", "topk"])
def test_parity_index_TP2(architecture: str, pool: RankPool) -> None:
    expected, tokens = look_on_ranks(ONE, architecture)
    for index, found in pool.run(look_on_ranks, ParallelLayout(tensor=2), architecture, ranks=2):
        assert_same(index, expected)
        assert found == tokens


def refuse_pipeline() -> str:
    with initialize(ParallelLayout(pipeline=2)) as context, pytest.raises(LayoutError) as caught:
        look(model(context), "relu")
    return str(caught.value)


def test_index_refuses_what_it_cannot_do(pool: RankPool) -> None:
    for message in pool.run(refuse_pipeline, ranks=2):
        assert message.startswith("parallel.pipeline must be 1")
    with initialize(ONE) as context:
        lm = model(context)
        with pytest.raises(ConfigError, match="no text"):
            build_index(lm, random_sae(D), [])
        with pytest.raises(ConfigError, match="one length"):
            build_index(lm, random_sae(D), [TEXT, TEXT[:, :9]])
        with pytest.raises(ConfigError, match="width 8"):
            build_index(lm, random_sae(8), [TEXT])


def test_best_keeps_the_best_and_of_equal_ones_the_first() -> None:
    best = Best(2, 3, 0, torch.device("cpu"))
    scores = torch.tensor([[1.0, 5.0, 2.0, 5.0], [7.0, 1.0, 5.0, 0.5]])
    for row in range(2):
        values_BSJ = scores[row].view(1, 4, 1)
        at = torch.arange(4)
        group, zero = torch.tensor([0, 0, 1, 0]), torch.zeros(4, dtype=torch.int64)
        best.offer(group, scores[row], values_BSJ, zero, at, zero, first_row=row)
    contexts = best.contexts()
    assert contexts.value_GK.tolist() == [[7.0, 5.0, 5.0], [5.0, 2.0, float("-inf")]]
    assert contexts.position_GK.tolist() == [[4, 1, 3], [6, 2, -1]]


def test_neighbours_are_the_largest_cosines() -> None:
    sae = random_sae(D, latents=40)
    latents, cosines = decoder_neighbours(sae, 5, torch.device("cpu"))
    unit = torch.nn.functional.normalize(sae.W_dec, dim=-1)
    expected = (unit @ unit.T - 2 * torch.eye(40)).topk(5)
    assert torch.equal(latents, expected.indices)
    torch.testing.assert_close(cosines, expected.values)
    assert decoder_neighbours(sae, 0, torch.device("cpu"))[0].shape == (40, 0)
