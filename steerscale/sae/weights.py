"""One sparse autoencoder as plain tensors, in the public ecosystem's names and orientation: what formats read and write.

For every architecture, with s the input scale, t the output scale, [b_dec] there if `subtract_b_dec`:

    z = (s x - [b_dec]) W_enc + b_enc                      pre-activations
    f = act(z)                                             features (latents' values)
    y = (f W_dec + b_dec + [s x W_skip]) / t               reconstruction

    relu                  act(z) = max(z, 0)                                 Cunningham, 2309.08600
    topk                  the k largest of max(z, 0), the others zero        Gao, 2406.04093
    jumprelu              z where z > threshold, else 0                      Rajamanoharan, 2407.14435; 2408.05147
    batch_topk            jumprelu: the batch's k n-th largest value is replaced by a fixed threshold at inference
                                                                             Bussmann, 2412.06410
    matryoshka            as batch_topk; any prefix of the latents is an SAE of its own     Bussmann, 2503.17547
    gated                 max(exp(r_mag) (z - b_gate) + b_mag, 0) where z > 0, b_gate in b_enc's place
                                                                             Rajamanoharan, 2404.16014

Shapes: n latents, d_in and d_out widths of the activations read and reconstructed.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from steerscale.errors import ConfigError

ARCHITECTURES = ("relu", "gated", "topk", "batch_topk", "jumprelu", "matryoshka")
_THRESHOLDED = ("jumprelu", "batch_topk", "matryoshka")
_PER_LATENT = ("b_enc", "threshold", "b_gate", "r_mag", "b_mag")

_EQUAL_NORMS = 1e-5
"""Decoder norms this close (relative) count as equal: float32 rounding of a normalization, with room to spare."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SAEWeights:
    """A whole SAE, or a range of its latents. Raises ConfigError if the tensors do not fit the architecture or each other."""

    architecture: str
    """One of ARCHITECTURES."""
    W_enc: torch.Tensor
    """[d_in, n]; the gate's matrix if gated."""
    W_dec: torch.Tensor
    """[n, d_out]"""
    b_dec: torch.Tensor
    """[d_out]"""
    b_enc: torch.Tensor | None = None
    """[n]; None if gated."""
    threshold: torch.Tensor | None = None
    """[n], in units of z; of jumprelu, batch_topk and matryoshka."""
    b_gate: torch.Tensor | None = None
    """[n]; gated."""
    r_mag: torch.Tensor | None = None
    """[n], log of magnitude over gate; gated."""
    b_mag: torch.Tensor | None = None
    """[n]; gated."""
    W_skip: torch.Tensor | None = None
    """[d_in, d_out], a transcoder's linear path past the latents."""
    k: float | None = None
    """Active latents per vector: an integer for topk, a mean for batch_topk and matryoshka (unused at inference)."""
    subtract_b_dec: bool = True
    """Whether the encoder sees s x - b_dec."""
    input_scale: float = 1.0
    """s; 1 after folding."""
    output_scale: float | None = None
    """t; None means s, as in an autoencoder."""
    hook: str | None = None
    """Where x comes from, e.g. blocks.15.hook_resid_post."""
    hook_out: str | None = None
    """What is reconstructed, if not x itself: a transcoder's target."""
    model: str | None = None
    """Name of the language model."""
    first_latent: int = 0
    """Index of the first latent here in the whole SAE."""
    total_latents: int | None = None
    """Latents of the whole SAE; None if these are all."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Whatever else a format says about the SAE; JSON values."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ConfigError(f"SAE architecture {self.architecture!r} is unknown: one of {', '.join(ARCHITECTURES)}")
        self._check_parts()
        self._check_shapes()
        if self.input_scale <= 0 or (self.output_scale is not None and self.output_scale <= 0):
            raise ConfigError(f"SAE scales must be positive, got {self.input_scale} and {self.output_scale}")
        if self.subtract_b_dec and self.output_scale not in (None, self.input_scale):
            raise ConfigError(
                f"subtract_b_dec=True needs one scale for input and output, got {self.input_scale} and {self.output_scale}"
            )
        if self.subtract_b_dec and (self.hook_out is not None or self.d_in != self.d_out):
            raise ConfigError(
                "subtract_b_dec=True needs b_dec to be of the input, which a transcoder's is not: set False"
            )
        if self.architecture == "topk":
            total = self.total_latents or self.num_latents
            if self.k is None or not 1 <= self.k <= total or self.k != int(self.k):
                raise ConfigError(f"a topk SAE needs an integer k from 1 to its {total} latents, got {self.k}")

    def _check_parts(self) -> None:
        gated = ("b_gate", "r_mag", "b_mag")
        needed = gated if self.architecture == "gated" else ("b_enc",)
        if self.architecture in _THRESHOLDED:
            needed = (*needed, "threshold")
        for name in _PER_LATENT:
            there = getattr(self, name) is not None
            if there != (name in needed):
                raise ConfigError(f"a {self.architecture} SAE {'has no' if there else 'needs'} {name}")

    def _check_shapes(self) -> None:
        if self.W_enc.ndim != 2 or self.W_dec.ndim != 2:
            raise ConfigError(
                f"W_enc and W_dec must be matrices, got {list(self.W_enc.shape)} and {list(self.W_dec.shape)}: "
                "SAEs that read or write several hooks at once are not understood"
            )
        expected = {
            "W_enc": (self.d_in, self.num_latents),
            "W_dec": (self.num_latents, self.d_out),
            "b_dec": (self.d_out,),
            "W_skip": (self.d_in, self.d_out),
            **dict.fromkeys(_PER_LATENT, (self.num_latents,)),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ConfigError(f"SAE tensor {name} must have shape {list(shape)}, got {list(tensor.shape)}")

    @property
    def d_in(self) -> int:
        """Width of x."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.W_dec.shape[1]

    @property
    def num_latents(self) -> int:
        """Latents here."""
        return self.W_enc.shape[1]

    @property
    def is_whole(self) -> bool:
        """Whether these are all latents."""
        return self.total_latents is None or self.total_latents == self.num_latents

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Features of activations: [..., d_in] -> [..., n], in the type of W_enc.

        Raises ConfigError for a range of a topk SAE: which latents are among the k largest is known from all of them only.
        """
        if self.architecture == "topk" and not self.is_whole:
            raise ConfigError(
                f"latents {self.first_latent} to {self.first_latent + self.num_latents} of a topk SAE cannot encode "
                "alone: selection needs all latents"
            )
        x = x.to(self.W_enc.dtype) * self.input_scale
        if self.subtract_b_dec:
            x = x - self.b_dec
        projected = x @ self.W_enc
        if self.b_gate is not None:
            assert self.r_mag is not None
            assert self.b_mag is not None
            magnitudes = (projected * self.r_mag.exp() + self.b_mag).relu()
            return torch.where(projected + self.b_gate > 0, magnitudes, 0)
        assert self.b_enc is not None
        z = projected + self.b_enc
        if self.threshold is not None:
            return torch.where(z > self.threshold, z.relu(), 0)
        if self.architecture == "topk":
            assert self.k is not None
            values, indices = z.relu().topk(int(self.k), dim=-1, sorted=False)
            return torch.zeros_like(z).scatter(-1, indices, values)
        return z.relu()

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """Reconstruction from features, without a skip path: [..., n] -> [..., d_out]. A range of latents adds all of b_dec."""
        return (features @ self.W_dec + self.b_dec) / self._output_scale

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """Encode, decode, and a skip path's part if there is one: [..., d_in] -> [..., d_out]."""
        y = self.decode(self.encode(x))
        if self.W_skip is None:
            return y
        return y + x.to(y.dtype) @ self.W_skip * (self.input_scale / self._output_scale)

    @property
    def _output_scale(self) -> float:
        return self.input_scale if self.output_scale is None else self.output_scale

    def fold_scale(self) -> "SAEWeights":
        """The same SAE for activations as they are: scales in the weights, features unchanged."""
        s, t = self.input_scale, self._output_scale
        if s == t == 1:
            return replace(self, output_scale=None)
        return replace(
            self,
            W_enc=self.W_enc * s,
            W_dec=self.W_dec / t,
            b_dec=self.b_dec / t,
            W_skip=None if self.W_skip is None else self.W_skip * (s / t),
            input_scale=1.0,
            output_scale=None,
        )

    def fold_b_dec(self) -> "SAEWeights":
        """The same SAE with an encoder that sees x itself: b_dec's part in z is moved into the encoder's biases."""
        if not self.subtract_b_dec:
            return self
        shift = self.b_dec @ self.W_enc
        changed: dict[str, torch.Tensor] = {}
        if self.b_enc is not None:
            changed["b_enc"] = self.b_enc - shift
        if self.b_gate is not None and self.r_mag is not None and self.b_mag is not None:
            changed |= {"b_gate": self.b_gate - shift, "b_mag": self.b_mag - shift * self.r_mag.exp()}
        return replace(self, subtract_b_dec=False, **changed)

    def fold_decoder_norm(self) -> "SAEWeights":
        """The same reconstruction with decoder rows of norm 1: features are multiplied by their rows' norms.

        Rows of zeros stay. Raises ConfigError for a topk SAE with rows of different norms, whose selection would change.
        """
        norms = self.W_dec.float().norm(dim=1)
        norms = torch.where(norms > 0, norms, 1)
        if self.architecture == "topk" and float(norms.max()) > float(norms.min()) * (1 + _EQUAL_NORMS):
            raise ConfigError(
                f"decoder norms from {norms.min():.4g} to {norms.max():.4g} of a topk SAE cannot be folded: "
                "which latents are the k largest would change"
            )
        W_dec = (self.W_dec / norms[:, None]).to(self.W_dec.dtype)
        if self.r_mag is not None and self.b_mag is not None:
            # Gates see signs only; the magnitudes' matrix is W_enc times exp(r_mag).
            return replace(self, W_dec=W_dec, r_mag=self.r_mag + norms.log(), b_mag=self.b_mag * norms)
        return self._rescaled(norms, W_dec)

    def _rescaled(self, factors: torch.Tensor, W_dec: torch.Tensor) -> "SAEWeights":
        """With z and thresholds times `factors` [n], and another decoder."""
        assert self.b_enc is not None
        return replace(
            self,
            W_enc=(self.W_enc * factors).to(self.W_enc.dtype),
            W_dec=W_dec,
            b_enc=self.b_enc * factors,
            threshold=None if self.threshold is None else self.threshold * factors,
        )

    def to(self, device: torch.device | str) -> "SAEWeights":
        """The same on another device."""
        tensors = {name: tensor for name, tensor in vars(self).items() if isinstance(tensor, torch.Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def slice_latents(self, start: int, stop: int) -> "SAEWeights":
        """Latents [start, stop) of those here, as views. Raises ConfigError if they are not there."""
        if not 0 <= start < stop <= self.num_latents:
            raise ConfigError(f"latents {start} to {stop} are not among the SAE's {self.num_latents}")
        per_latent = {name: getattr(self, name) for name in _PER_LATENT}
        return replace(
            self,
            W_enc=self.W_enc[:, start:stop],
            W_dec=self.W_dec[start:stop],
            first_latent=self.first_latent + start,
            total_latents=self.total_latents or self.num_latents,
            **{name: None if tensor is None else tensor[start:stop] for name, tensor in per_latent.items()},
        )
