"""Steer a language model by latents of an SAE.

A latent j with value f_j in the activation x is changed to f_j', and x becomes

    x + strength * sum_j s_j (f_j' - f_j) W_dec[j] / t        s_j: the edit's own strength, t: the SAE's output scale

a *delta* on the activation as it is: nothing else of x changes, neither what other latents say nor what the SAE cannot
reconstruct. (Putting the changed reconstruction in x's place would lose its error; adding the error of the changed features
back would undo the change.)

Shapes: B sequences, S sequence, M d_model, V vocabulary, E edits, L latents that edits read.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from steerscale.config import require
from steerscale.errors import ConfigError
from steerscale.generation import next_logits
from steerscale.interp.combine import acting
from steerscale.language_model import LanguageModel
from steerscale.models.hooks import HookFunction
from steerscale.sae.weights import SAEWeights


@dataclass(frozen=True, kw_only=True)
class When:
    """A condition on another latent's value at the same token."""

    latent: int
    """Its number in the same SAE."""
    above: float = 0.0
    """The edit is made where the latent's value is larger than this."""

    def __post_init__(self) -> None:
        require(self.latent >= 0, f"when.latent must not be negative, got {self.latent}")
        require(not math.isnan(self.above), "when.above must be a number, got nan")


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What becomes of one latent's value f."""

    latent: int
    """Its number in the SAE."""
    value: float
    """In units of f (clamp, add), or a factor (scale)."""
    mode: Literal["clamp", "add", "scale"] = "clamp"
    """clamp: f' = value; add: f' = max(f + value, 0); scale: f' = value * f, 0 suppresses it."""
    where: Literal["all", "active"] = "all"
    """active: only where f > 0."""
    when: When | None = None
    """Another latent that decides where."""
    strength: float = 1.0
    """Factor of this edit's part of the delta."""

    def __post_init__(self) -> None:
        require(self.latent >= 0, f"latent must not be negative, got {self.latent}")
        for name in ("value", "strength"):
            number = getattr(self, name)
            require(math.isfinite(number), f"{name} of latent {self.latent} must be a finite number, got {number}")

    def change(self, f: torch.Tensor) -> torch.Tensor:
        """f' - f."""
        if self.mode == "clamp":
            change = self.value - f
        elif self.mode == "add":
            change = (f + self.value).clamp_min(0) - f
        else:
            change = self.value * f - f
        return change if self.where == "all" else torch.where(f > 0, change, 0)


class Steering:
    """Edits of one SAE's latents at its hook point."""

    def __init__(
        self,
        sae: SAEWeights,
        edits: Sequence[Edit],
        *,
        strength: float = 1.0,
        hook: str | None = None,
        spare_special: bool = True,
        spare_first: int = 0,
    ) -> None:
        """Every rank has the whole SAE: selection of a TopK SAE needs all latents, the other kinds compute the edited only.

        Args:
            strength: factor of the delta; 0 changes nothing, bit by bit.
            hook: where the SAE belongs; None: where it says.
            spare_special: leave begin, end, padding and unknown tokens as they are.
            spare_first: leave so many first positions as they are. Both are what `stream.drop_special` and `stream.drop_first`
                keep from an SAE: activations there are outliers, and what it says about them means nothing.
        Raises:
            ConfigError: not an autoencoder of one hook, no hook known, no edits, or latents it has not.
        """
        if sae.hook_out is not None or "+" in (sae.hook or ""):
            raise ConfigError(
                f"steering needs an SAE that reads and reconstructs one hook point; this one reads {sae.hook} and "
                f"reconstructs {sae.hook_out or sae.hook}"
            )
        if hook is None and sae.hook is None:
            raise ConfigError(
                "the SAE does not say which hook point it belongs to: name it, like blocks.3.hook_resid_post"
            )
        require(bool(edits), "there is nothing to steer: give at least one latent")
        require(math.isfinite(strength), f"strength must be a finite number, got {strength}")
        for edit in edits:
            for latent in (edit.latent, *([edit.when.latent] if edit.when else [])):
                require(latent < sae.num_latents, f"latent {latent} is not among the SAE's {sae.num_latents}")
        latents = [edit.latent for edit in edits]
        require(len(set(latents)) == len(latents), f"latents must differ, got {', '.join(map(str, latents))}")
        self.hook: str = hook or sae.hook or ""
        self.edits, self.strength = list(edits), strength
        self._spare_special, self._spare_first = spare_special, spare_first
        scale = sae.input_scale if sae.output_scale is None else sae.output_scale
        self.directions_EM = sae.W_dec[latents] / scale
        # Edited latents first, in their order, then those that only conditions read.
        self._read = list(dict.fromkeys([*latents, *(edit.when.latent for edit in edits if edit.when)]))
        self._whole = sae if sae.architecture == "topk" else None
        self._parts = [sae.slice_latents(latent, latent + 1) for latent in self._read] if self._whole is None else []

    def values(self, x_BSM: torch.Tensor) -> torch.Tensor:
        """The edited latents' values [..., E] in activations [..., M]."""
        return self._values(x_BSM)[..., : len(self.edits)]

    def _values(self, x_BSM: torch.Tensor) -> torch.Tensor:
        """[..., L]"""
        if self._whole is not None:
            return self._whole.encode(x_BSM)[..., self._read]
        return torch.cat([part.encode(x_BSM) for part in self._parts], dim=-1)

    def delta(self, x_BSM: torch.Tensor) -> torch.Tensor:
        """What is added to activations [..., M], of the same shape; float32."""
        f, changes = self._values(x_BSM), []
        for index, edit in enumerate(self.edits):
            change = edit.strength * edit.change(f[..., index])
            if edit.when is not None:
                holds = f[..., self._read.index(edit.when.latent)] > edit.when.above
                change = torch.where(holds, change, 0)
            changes.append(change)
        return self.strength * torch.stack(changes, dim=-1) @ self.directions_EM

    def acts(
        self, lm: LanguageModel, tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None = None
    ) -> torch.Tensor:
        """bool [B, S]: which tokens are not spared; see `acting`."""
        return acting(lm, tokens_BS, positions_BS, spare_special=self._spare_special, spare_first=self._spare_first)

    def functions(self, lm: LanguageModel) -> dict[str, HookFunction]:
        """For everything of `lm` that takes functions by hook point; none if the strength is 0.

        Raises ConfigError if the SAE's width is another than the model's.
        """
        width = self.directions_EM.shape[1]
        if width != lm.model.d_model:
            raise ConfigError(
                f"the SAE is of activations of width {width}, {self.hook} of this model has {lm.model.d_model}"
            )
        return {self.hook: partial(self._steer, lm)} if self.strength else {}

    def _steer(self, lm: LanguageModel, x_BSM: torch.Tensor) -> torch.Tensor:
        self._to(x_BSM.device)
        delta_BSM = self.delta(x_BSM)
        acts_BS1 = (delta_BSM != 0).any(dim=-1, keepdim=True)  # adding zero would turn -0 into 0
        if lm.tokens_BS is not None:
            acts_BS1 &= self.acts(lm, lm.tokens_BS, lm.positions_BS).unsqueeze(-1)
        return torch.where(acts_BS1, (x_BSM + delta_BSM).to(x_BSM.dtype), x_BSM)

    def _to(self, device: torch.device) -> None:
        if self.directions_EM.device != device:
            self.directions_EM = self.directions_EM.to(device)
            self._parts = [part.to(device) for part in self._parts]
            self._whole = None if self._whole is None else self._whole.to(device)


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The next token's distribution without and with steering."""

    before_V: torch.Tensor
    """Probabilities float32 [V]."""
    after_V: torch.Tensor
    """The same, steered."""

    @property
    def kl(self) -> float:
        """Kullback-Leibler divergence of the steered from the unsteered distribution, sum after * ln(after / before), nats."""
        after, before = self.after_V.double(), self.before_V.double()
        # Where a probability has gone to 0 in float32, its smallest normal number stands for it.
        tiny = torch.finfo(torch.float32).tiny
        return float((after * (after.clamp_min(tiny).log() - before.clamp_min(tiny).log())).sum())

    def rows(self, count: int) -> list[tuple[int, float, float]]:
        """(token, before, after): the `count` most probable before or after, by the larger of both."""
        largest = torch.maximum(self.before_V, self.after_V)
        tokens = largest.topk(min(count, len(largest))).indices.tolist()
        return [(token, float(self.before_V[token]), float(self.after_V[token])) for token in tokens]


def effect(lm: LanguageModel, functions: Mapping[str, HookFunction], prompt: Sequence[int]) -> Effect | None:
    """The next token after `prompt` with and without `functions`; None but on the last stage."""
    before_V, after_V = next_logits(lm, prompt), next_logits(lm, prompt, functions)
    if before_V is None or after_V is None:
        return None
    return Effect(before_V=before_V.softmax(dim=-1), after_V=after_V.softmax(dim=-1))


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """What steering costs on text it is not for."""

    before: float
    """Mean loss a token in nats."""
    after: float
    """The same, steered."""
    tokens: int
    """That were predicted."""


def held_out_loss(
    lm: LanguageModel,
    functions: Mapping[str, HookFunction],
    sequences: Iterable[torch.Tensor],
    *,
    on_progress: Callable[[int], None] | None = None,
) -> HeldOutLoss | None:
    """Loss of a text with and without `functions`; None but on the last stage.

    Args:
        sequences: tokens int64 [B, S + 1] on the device; each token but the first is predicted from those before it.
        on_progress: called with the number of sequences after each batch.
    """
    sums, tokens, done = [0.0, 0.0], 0, 0
    for batch_BT in sequences:
        inputs_BS, labels_BS = batch_BT[:, :-1].contiguous(), batch_BT[:, 1:].contiguous()
        for index, chosen in enumerate(({}, functions)):
            losses_BS = lm.losses(inputs_BS, labels_BS, chosen)
            sums[index] += 0.0 if losses_BS is None else float(losses_BS.double().sum())
        tokens += labels_BS.numel()
        done += len(batch_BT)
        if on_progress is not None:
            on_progress(done)
    lm.close()
    require(tokens > 0, "the held-out text has no token to predict: give more of it")
    if not lm.context.is_last_stage:
        return None
    return HeldOutLoss(before=sums[0] / tokens, after=sums[1] / tokens, tokens=tokens)
