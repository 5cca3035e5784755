"""What all latents of an SAE do in a text: one pass over it, in memory that grows with the latents, not with the text.

Of each latent are kept: how often it is active, a histogram of its values in quarters of an octave, its strongest contexts (one
a sequence), and for every octave of values a few contexts drawn by chance, so that what it does when it is weakly active is
seen too (the strongest contexts alone flatter a latent: Bricken et al. 2023, Cunningham et al. 2309.08600 look at intervals).

A context is a position in the text and the latent's values around it.

Shapes: B sequences, S sequence, M d_model, J latents, N candidates, G groups, K kept of a group, W = 2 width + 1 tokens of a
window, R sequences of the whole text.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from steerscale.config import require
from steerscale.errors import LayoutError
from steerscale.interp.best import Best, Contexts, scatter_hash
from steerscale.interp.interventions import capture
from steerscale.interp.steering import Edit, Steering
from steerscale.language_model import LanguageModel
from steerscale.sae.weights import SAEWeights

OCTAVES = 12
"""Intervals of values that contexts are drawn from; the lowest takes what is below it, the highest what is above."""
BINS_PER_OCTAVE = 4
_HEADROOM = 2
"""Octaves above the largest value of the first batch."""
_ELEMENTS = 2**24
"""Values [b, S, J] that are looked at at once: 64 MiB in float32, and some copies."""


@dataclass(frozen=True, kw_only=True)
class LatentIndex:
    """What was found; on the CPU, whole on every rank."""

    latents: list[int]
    """Their numbers in the SAE, [J]."""
    tokens_RS: torch.Tensor
    """The text, int32."""
    num_tokens: int
    """That count: all but those spared."""
    active_J: torch.Tensor
    """Tokens on which each latent is active, int64."""
    total_J: torch.Tensor
    """Sum of its values, float64."""
    top: Contexts
    """The strongest contexts [J, K], one a sequence, the strongest first."""
    drawn: Contexts
    """By chance from each octave of values, [J, OCTAVES * K'], lowest octave first."""
    counts_JH: torch.Tensor
    """Histogram of values int32 [J, OCTAVES * BINS_PER_OCTAVE], lowest first; see `lowest_exponent`."""
    lowest_exponent: int
    """The first octave begins at 2 to this power."""
    width: int
    """Tokens of a context on either side."""

    @property
    def largest_J(self) -> torch.Tensor:
        """Largest value of each latent; 0 where it was never active."""
        return self.top.value_GK[:, 0].clamp_min(0)


def build_index(
    lm: LanguageModel,
    sae: SAEWeights,
    sequences: Iterable[torch.Tensor],
    *,
    latents: Sequence[int] | None = None,
    hook: str | None = None,
    spare_special: bool = True,
    spare_first: int = 0,
    num_top: int = 12,
    num_drawn: int = 2,
    width: int = 12,
    on_progress: Callable[[int], None] | None = None,
) -> LatentIndex:
    """Read `sequences` (int64 [B, S + 1], all of one length); no pipeline. Tokens that steering would spare do not count.

    Args:
        latents: to look at; None: all, and each tensor rank takes a share of them.
        num_top: strongest contexts of a latent.
        num_drawn: contexts drawn from each octave.
        width: tokens of a context on either side.
        on_progress: called with the number of sequences after each batch.
    Raises:
        LayoutError: under a pipeline.
        ConfigError: as `Steering` does; no text, or sequences of several lengths.
    """
    if lm.context.layout.pipeline > 1:
        raise LayoutError(
            f"parallel.pipeline must be 1 to look at latents, it is {lm.context.layout.pipeline}: their tops are kept "
            "where the activations are, the unembedding is on the last stage"
        )
    steering = Steering(
        sae,
        [Edit(latent=latent, value=0.0) for latent in ((0,) if latents is None else latents)],
        hook=hook,
        spare_special=spare_special,
        spare_first=spare_first,
    )
    steering.functions(lm)  # its width fits
    collector: _Collector | None = None
    rows: list[torch.Tensor] = []
    done, counted, values = 0, 0, _values_of(lm, sae, steering, latents)
    numbers = list(range(*_share(lm, sae.num_latents)) if latents is None else latents)
    encoded = sae.num_latents if sae.architecture == "topk" else len(numbers)
    for batch_BT in sequences:
        tokens_BS = batch_BT[:, :-1].contiguous()
        require(not rows or rows[0].shape[1] == tokens_BS.shape[1], "sequences of a text must have one length")
        x_BSM = capture(lm, tokens_BS, [steering.hook])[steering.hook]
        acts_BS = steering.acts(lm, tokens_BS)
        collector = collector or _Collector(lm, numbers, num_top=num_top, num_drawn=num_drawn, width=width)
        step = max(1, _ELEMENTS // (tokens_BS.shape[1] * encoded))
        for begin in range(0, len(tokens_BS), step):
            part = slice(begin, begin + step)
            values_BSJ = (values(x_BSM[part]) * acts_BS[part].unsqueeze(-1)).float()
            collector.add(values_BSJ, first_row=done + begin)
        rows.append(tokens_BS.to("cpu", torch.int32))
        done, counted = done + len(tokens_BS), counted + int(acts_BS.sum())
        if on_progress is not None:
            on_progress(done)
    require(collector is not None and counted > 0, "there is no text to look at latents in: give more of it")
    assert collector is not None
    return collector.result(lm, torch.cat(rows), counted, gather=latents is None)


def _share(lm: LanguageModel, count: int) -> tuple[int, int]:
    """First latent of this tensor rank, and the one after its last."""
    size, rank = lm.context.layout.tensor, lm.context.at.tensor
    require(count >= size, f"parallel.tensor must not be larger than the SAE's {count} latents, it is {size}")
    return rank * count // size, (rank + 1) * count // size


def _values_of(
    lm: LanguageModel, sae: SAEWeights, steering: Steering, latents: Sequence[int] | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Function from activations [..., M] to the latents' values [..., J]."""
    if latents is not None:
        return steering.values
    first, last = _share(lm, sae.num_latents)
    if sae.architecture == "topk":  # which are the k largest is known from all of them only
        whole = sae.to(lm.context.device)
        return lambda x: whole.encode(x)[..., first:last]
    return sae.slice_latents(first, last).to(lm.context.device).encode


class _Collector:
    """State of the pass."""

    def __init__(self, lm: LanguageModel, latents: list[int], *, num_top: int, num_drawn: int, width: int) -> None:
        self._group, device, count = lm.context.groups.tp, lm.context.device, len(latents)
        self._latents, self._width = latents, width
        self._numbers = torch.tensor(latents, device=device)
        self._active = torch.zeros(count, dtype=torch.int64, device=device)
        self._total = torch.zeros(count, dtype=torch.float64, device=device)
        self._counts = torch.zeros(count * OCTAVES * BINS_PER_OCTAVE, dtype=torch.int32, device=device)
        self._top = Best(count, num_top, width, device)
        self._drawn = Best(count * OCTAVES, num_drawn, width, device)
        self._lowest: int | None = None

    def add(self, values_BSJ: torch.Tensor, *, first_row: int) -> None:
        """Take in values of whole sequences, from the text's row `first_row`."""
        length = values_BSJ.shape[1]
        self._active += (values_BSJ > 0).sum(dim=(0, 1))
        self._total += values_BSJ.double().sum(dim=(0, 1))
        lowest = self._lowest_exponent(values_BSJ)
        if lowest is None:
            return
        best = values_BSJ.max(dim=1)
        row, latent = (best.values > 0).nonzero().T
        at, value = best.indices[row, latent], best.values[row, latent]
        self._top.offer(latent, value, values_BSJ, row, at, latent, first_row=first_row)
        row, at, latent = values_BSJ.nonzero().T
        value = values_BSJ[row, at, latent]
        bins = ((value.log2() - lowest) * BINS_PER_OCTAVE).floor().long().clamp(0, OCTAVES * BINS_PER_OCTAVE - 1)
        flat = latent * OCTAVES * BINS_PER_OCTAVE + bins
        self._counts += torch.bincount(flat, minlength=len(self._counts)).int()
        # By a hash of place and latent, not by a generator: the same choice whatever the batches and the layout are.
        chance = scatter_hash((row + first_row) * length + at, self._numbers[latent])
        octave = latent * OCTAVES + bins // BINS_PER_OCTAVE
        self._drawn.offer(octave, chance, values_BSJ, row, at, latent, first_row=first_row)

    def result(self, lm: LanguageModel, tokens_RS: torch.Tensor, counted: int, *, gather: bool) -> LatentIndex:
        """All of it, from all tensor ranks if each has a share: one all-gather a tensor, 1 to 4 KB a latent in all."""
        count = len(self._latents)

        def whole(tensor: torch.Tensor) -> torch.Tensor:
            return _gathered(tensor, self._group if gather else None)

        def contexts(best: Best) -> Contexts:
            found = best.contexts()
            return Contexts(*(whole(part.reshape(count, -1, *part.shape[2:])) for part in found))

        return LatentIndex(
            latents=whole(self._numbers).tolist(),
            tokens_RS=tokens_RS,
            num_tokens=counted,
            active_J=whole(self._active),
            total_J=whole(self._total),
            top=contexts(self._top),
            drawn=contexts(self._drawn),
            counts_JH=whole(self._counts.view(count, -1)),
            lowest_exponent=self._lowest or 0,
            width=self._width,
        )

    def _lowest_exponent(self, values_BSJ: torch.Tensor) -> int | None:
        """Where octaves begin, by the first values that are not zero; one all-reduce of a number until then."""
        if self._lowest is None:
            largest = values_BSJ.max()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
            if largest > 0:
                self._lowest = int(torch.frexp(largest).exponent) + _HEADROOM - OCTAVES
        return self._lowest


def _gathered(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Rows of all ranks, one after the other, on the CPU; they may have different numbers of them."""
    if group is None or group.size() == 1:
        return tensor.cpu()
    tensor = tensor.contiguous()
    rows = torch.tensor(len(tensor), device=tensor.device)
    counts = [torch.empty_like(rows) for _ in range(group.size())]
    dist.all_gather(counts, rows, group=group)
    most = max(int(count) for count in counts)
    padded = torch.cat([tensor, tensor.new_zeros(most - len(tensor), *tensor.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(group.size())]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts)]).cpu()
