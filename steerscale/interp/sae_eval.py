"""How good is an SAE? Reconstruction, sparsity, and what the language model loses when it reads the reconstruction.

For each SAE, over held-out text:

    l0              mean active latents of a vector
    fvu             sum |x - x_hat|^2 / sum |x - mean x|^2, the mean over the evaluated vectors; explained variance is 1 - fvu
    mse             mean |x - x_hat|^2, in the activations' own scale
    cosine          mean cosine of x and x_hat
    norm_ratio      sum |x_hat| / sum |x|: below 1 where the SAE shrinks
    dead            share of latents that no vector activates
    ce_clean, ce_spliced, ce_zero, ce_mean
                    the model's loss a token as it is, with x_hat, zeros or the mean of x in x's place
    ce_recovered    (ce_zero - ce_spliced) / (ce_zero - ce_clean)

Tokens that the stream drops are left as they are, and are not counted except in the losses. A crosscoder is not spliced.

    B sequences, S sequence, d width, V vectors that count, N latents of this tensor rank
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from steerscale.activations.config import StreamConfig
from steerscale.activations.order import keeps
from steerscale.activations.source import ActivationSource
from steerscale.activations.stream import left_out
from steerscale.data.config import DataConfig
from steerscale.data.dataset import SampleStream, inspect_data
from steerscale.data.loader import MicroBatch, MicroBatchLoader
from steerscale.models.hooks import HookFunction
from steerscale.parallel.context import ParallelContext
from steerscale.sae.base import SparseAutoencoder
from steerscale.sae.config import SAESpec

SUMS = ("count", "squared_error", "l0", "norm", "norm_hat", "cosine", "square")
LOSSES = ("clean", "spliced", "zero", "mean")


@dataclass
class Evaluation:
    """What was found about one SAE."""

    values: dict[str, float]
    """By the names above; nan or absent where it could not be measured."""
    frequency_N: torch.Tensor | None
    """[N] share of the vectors that activate each of this rank's latents; None on other stages."""


@dataclass
class _Sums:
    """Of one SAE on one rank; `loss` is of the last stage."""

    sums: torch.Tensor
    total_d: torch.Tensor
    active_N: torch.Tensor
    losses: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Text to evaluate on, and which of its tokens count."""

    samples: SampleStream
    """Finite."""
    micro_batch_size: int
    """Sequences in one forward pass on one replica."""
    special_ids: tuple[int, ...]
    """Token ids that the stream leaves out."""
    drop_first: int
    """First positions that it leaves out."""

    def batches(self, context: ParallelContext) -> Iterator[MicroBatch]:
        """This replica's part, as many batches on each."""
        size, replicas = self.micro_batch_size, context.layout.data
        loader = MicroBatchLoader(
            self.samples, data_rank=context.at.data, data_size=replicas, micro_batch_size=size, num_prefetch=0
        )
        with closing(loader):
            for begin in range(0, self.samples.num_samples or 0, size * replicas):
                yield from loader.step(begin, 1)

    def keeps(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """bool [B, S] on the tokens' device."""
        kept = keeps(tokens_BS.cpu().numpy(), special_ids=self.special_ids, drop_first=self.drop_first)
        return torch.from_numpy(kept).to(tokens_BS.device)


def held_out(
    stream: StreamConfig, data: DataConfig, source: ActivationSource, *, samples: int | None
) -> HeldOut | None:
    """The first `samples` sequences of the held-out split (None: all of them); None where a dataset has no such split."""
    manifests = inspect_data(data, seq_len=source.seq_len)
    if any("valid" not in manifest.splits for manifest in manifests.values()):
        return None
    valid = SampleStream(data, seq_len=source.seq_len, split="valid", shuffle=False)
    valid.limit(samples)
    return HeldOut(
        samples=valid,
        micro_batch_size=stream.micro_batch_size,
        special_ids=left_out(stream, source, valid),
        drop_first=stream.drop_first,
    )


@torch.no_grad()
def evaluate_saes(
    specs: Sequence[SAESpec],
    saes: Mapping[str, SparseAutoencoder],
    source: ActivationSource,
    text: HeldOut,
    context: ParallelContext,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Evaluation]:
    """Evaluate all SAEs of a run; a collective of all ranks, with the same result on each.

    Args:
        saes: those of this rank's stage, by name.
        on_progress: called with the sequences that have been read and their number, after each batch.
        should_stop: asked between batches, on all ranks alike; the answer True ends the evaluation with nothing.
    Runs 1 + (2 for each hook point) + (1 for each SAE) forward passes of the language model for each batch.
    """
    evaluator = _Evaluator(specs, saes, source, text, context)
    total, done = text.samples.num_samples or 0, 0
    for batch in text.batches(context):
        if should_stop():
            return {}
        evaluator.add(batch.to(context.device))
        done = min(done + text.micro_batch_size * context.layout.data, total)
        if on_progress is not None:
            on_progress(done, total)
    return evaluator.result()


class _Evaluator:
    def __init__(
        self,
        specs: Sequence[SAESpec],
        saes: Mapping[str, SparseAutoencoder],
        source: ActivationSource,
        text: HeldOut,
        context: ParallelContext,
    ) -> None:
        self._specs, self._saes, self._source, self._text, self._context = specs, saes, source, text, context
        self._tokens = torch.zeros((), dtype=torch.float64, device=context.device)
        double = {"dtype": torch.float64, "device": context.device}
        self._sums = {
            spec.name: _Sums(
                sums=torch.zeros(len(SUMS), **double),
                total_d=torch.zeros(spec.d_out, **double),
                active_N=torch.zeros(len(saes[spec.name].W_enc) if spec.name in saes else 0, **double),
                losses={name: torch.zeros((), **double) for name in LOSSES},
            )
            for spec in specs
        }

    def add(self, batch: MicroBatch) -> None:
        """One micro-batch through the model, once for each thing that is put in its way."""
        # Rows that only fill up a batch have no label that counts.
        kept_BS = self._text.keeps(batch.tokens_BS) & batch.loss_mask_BS.bool().any(dim=1, keepdim=True)
        (activations,) = self._source.run([batch.tokens_BS])
        for name, sae in self._saes.items():
            self._measure(self._sums[name], sae, activations, kept_BS)
        self._tokens += batch.loss_mask_BS.sum()
        clean = self._loss(batch, {})
        done: dict[tuple[str, str], torch.Tensor] = {}
        for spec in self._specs:
            if len(spec.outputs) != 1:
                continue
            target = spec.outputs[0]
            losses = self._sums[spec.name].losses
            losses["clean"] += clean
            for kind in ("zero", "mean"):
                if (kind, target) not in done:
                    done[kind, target] = self._loss(batch, {target: partial(self._ablate, spec, kind, kept_BS)})
                losses[kind] += done[kind, target]
            losses["spliced"] += self._loss(batch, self._splice(spec, kept_BS))

    def _measure(
        self, sums: _Sums, sae: SparseAutoencoder, activations: Mapping[str, torch.Tensor], kept_BS: torch.Tensor
    ) -> None:
        x_Vd, y_Vd = (
            torch.cat([activations[hook][kept_BS] for hook in hooks], dim=1)
            for hooks in (sae.spec.inputs, sae.spec.outputs)
        )
        sae.eval()
        selection, values = sae.features(sae.encode(x_Vd).pre_BN)
        sae.train()
        active = values > 0
        sums.active_N += torch.bincount(selection.latents[active], minlength=len(sums.active_N))
        hat_Vd = sae.decode(selection, values).double()
        y_Vd = y_Vd.double()
        l0 = active.sum().double()
        if sae.group is not None:
            dist.all_reduce(l0, group=sae.group)
        norm_V, norm_hat_V = y_Vd.norm(dim=1), hat_Vd.norm(dim=1)
        cosine_V = (y_Vd * hat_Vd).sum(1) / (norm_V * norm_hat_V).clamp_min(1e-30)
        of_vectors = [(y_Vd - hat_Vd).square(), l0, norm_V, norm_hat_V, cosine_V, y_Vd.square()]
        sums.sums += torch.stack([l0.new_tensor(len(y_Vd)), *(part.sum() for part in of_vectors)])
        sums.total_d += y_Vd.sum(0)

    def _loss(self, batch: MicroBatch, functions: Mapping[str, HookFunction]) -> torch.Tensor:
        """Sum of the losses that count, on the last stage; 0 elsewhere."""
        losses_BS = self._source.losses(batch.tokens_BS, batch.labels_BS, functions)
        return self._tokens.new_zeros(()) if losses_BS is None else (losses_BS.double() * batch.loss_mask_BS).sum()

    def _ablate(self, spec: SAESpec, kind: str, kept_BS: torch.Tensor, x_BSd: torch.Tensor) -> torch.Tensor:
        scales = self._saes[spec.name].scales
        value = torch.zeros_like(scales.mean) if kind == "zero" else scales.mean / scales.output
        return torch.where(kept_BS.unsqueeze(2), value.to(x_BSd.dtype), x_BSd)

    def _splice(self, spec: SAESpec, kept_BS: torch.Tensor) -> dict[str, HookFunction]:
        source, target = spec.inputs[0], spec.outputs[0]
        read: list[torch.Tensor] = []

        def keep(x_BSd: torch.Tensor) -> None:
            read[:] = [x_BSd]

        def put(x_BSd: torch.Tensor) -> torch.Tensor:
            sae = self._saes[spec.name].eval()
            hat_Vd = sae.reconstruct((read[0] if spec.is_transcoder else x_BSd)[kept_BS])
            sae.train()
            x_BSd[kept_BS] = hat_Vd.to(x_BSd.dtype)
            return x_BSd

        return {source: keep, target: put} if spec.is_transcoder else {target: put}

    def result(self) -> dict[str, Evaluation]:
        """Everything over all replicas, told to all stages: one all-reduce of the sums, one of the counts an SAE."""
        dist.all_reduce(self._tokens, group=self._context.groups.dp)
        found = {}
        for spec in self._specs:
            mine, sae = self._sums[spec.name], self._saes.get(spec.name)
            active_N = mine.active_N
            if sae is not None and sae.replicas is not None:
                dist.all_reduce(active_N, group=sae.replicas)
            never = (active_N == 0).sum().double().reshape(1) if sae is not None else mine.sums.new_zeros(1)
            first = self._context.at.data == 0
            told = sae is not None and sae.context.at.tensor == 0
            counted = self._context.counts_once
            sums = torch.cat(
                [
                    torch.cat([mine.sums, mine.total_d]) * told,
                    never * first,
                    torch.stack(list(mine.losses.values())) * counted,
                ]
            )
            dist.all_reduce(sums)
            frequency = None if sae is None else active_N / sums[0]
            found[spec.name] = Evaluation(values=self._values(spec, sums), frequency_N=frequency)
        return found

    def _values(self, spec: SAESpec, sums: torch.Tensor) -> dict[str, float]:
        of = dict(zip(SUMS, sums[: len(SUMS)].tolist()))
        total_d = sums[len(SUMS) : len(SUMS) + spec.d_out]
        never, *losses = sums[len(SUMS) + spec.d_out :].tolist()
        count = of["count"]
        variance = of["square"] - _quotient(float(total_d.square().sum()), count)
        values = {
            "l0": _quotient(of["l0"], count),
            "fvu": _quotient(of["squared_error"], variance),
            "mse": _quotient(of["squared_error"], count),
            "cosine": _quotient(of["cosine"], count),
            "norm_ratio": _quotient(of["norm_hat"], of["norm"]),
            "dead": never / spec.width,
            "vectors": count,
        }
        if len(spec.outputs) == 1:
            ce = {name: loss / float(self._tokens) for name, loss in zip(LOSSES, losses)}
            values |= {f"ce_{name}": loss for name, loss in ce.items()}
            values["ce_recovered"] = _quotient(ce["zero"] - ce["spliced"], ce["zero"] - ce["clean"])
        return values


def _quotient(part: float, whole: float) -> float:
    """nan where there is nothing to take a part of: no vectors, all of them equal, a model that does not read them."""
    return part / whole if whole else math.nan
