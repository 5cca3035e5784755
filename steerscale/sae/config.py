"""What a user writes under `sae:`. Torch-free."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from steerscale.config import require

Name = Literal["relu", "gated", "topk", "batch_topk", "jumprelu", "matryoshka"]


@dataclass(frozen=True, kw_only=True)
class VariantConfig:
    """One more SAE on the same stream: what differs from `sae`; null keeps what is there."""

    architecture: Name | None = None
    """As sae.architecture."""
    width: int | None = None
    """As sae.width."""
    expansion: int | None = None
    """As sae.expansion."""
    k: int | None = None
    """As sae.k."""
    sparsity: float | None = None
    """As sae.sparsity."""

    @property
    def given(self) -> dict[str, Any]:
        """What it changes."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def label(self) -> str:
        """What tells it from the others: `k=64`."""
        return ",".join(f"{name}={value}" for name, value in self.given.items())


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Sparse autoencoders on activations of a language model: one for each hook point, or one for all of them."""

    hooks: list[str]
    """Where activations are read, e.g. blocks.15.hook_resid_post; each gets an SAE of its own unless `crosscoder` is set."""
    targets: list[str] | None = None
    """Transcoders: what is reconstructed, one hook point for each of `hooks`; null: the input itself."""
    crosscoder: bool = False
    """One SAE that reads and reconstructs all of `hooks` at once (Lindsey et al. 2024)."""
    variants: list[VariantConfig] = field(default_factory=list)
    """Several SAEs for each hook point, all trained on the one stream: a sweep for the price of one language model."""
    architecture: Name = "topk"
    """relu: L1 penalty (Cunningham et al. 2023); gated (Rajamanoharan et al. 2024a); topk (Gao et al. 2024); batch_topk
    (Bussmann et al. 2024); jumprelu (Rajamanoharan et al. 2024b, Gemma Scope); matryoshka: batch_topk with nested widths
    (Bussmann et al. 2025)."""
    width: int | None = None
    """Latents; null: expansion times the width of the activations."""
    expansion: int = 16
    """Latents for each dimension of the activations."""
    k: int = 32
    """topk: latents active for each vector; batch_topk, matryoshka: on average over a micro-batch of all replicas."""
    sparsity: float = 1e-3
    """relu, gated, jumprelu: weight of the sparsity penalty (L1, or L0 for jumprelu)."""
    sparsity_warmup_steps: int = 0
    """Steps over which `sparsity` rises linearly from 0."""
    aux_k: int | None = None
    """topk, batch_topk, matryoshka: dead latents that reconstruct the error (AuxK); null: half the input's width; 0: none."""
    aux_coefficient: float = 1 / 32
    """Weight of AuxK's loss."""
    dead_after: int = 1_000_000
    """A latent is dead when this many vectors passed since it was last active."""
    bandwidth: float = 1e-3
    """jumprelu: width of the straight-through estimator's window, in units of scaled pre-activations."""
    initial_threshold: float = 1e-3
    """jumprelu: threshold at the beginning."""
    prefixes: list[float] = field(default_factory=lambda: [0.0625, 0.125, 0.25, 0.5, 1.0])
    """matryoshka: nested widths as shares of the latents, ascending to 1."""
    threshold_decay: float = 0.99
    """batch_topk, matryoshka: decay of the running mean of the smallest selected value, which is the threshold at inference."""
    subtract_b_dec: bool = True
    """The encoder sees activations less b_dec; never in a transcoder."""
    unit_norm_decoder: bool = True
    """Keep decoder rows at norm 1, their gradients free of the component along them."""
    tied_init: bool = True
    """Begin with the encoder in the decoder's directions, its transpose times `encoder_scale`, where the widths allow."""
    encoder_scale: float = 1.0
    """Times the encoder's initial weights. Below 1 the many latents that are active at first do not add up to more than the
    input; jumprelu: `initial_threshold` shrinks with it."""
    normalize: Literal["none", "unit", "width"] = "unit"
    """Scale activations so that their mean squared norm is 1 (unit) or their width (width); undone in exports."""
    b_dec_init: Literal["zero", "mean", "geometric_median"] = "geometric_median"
    """Begin with b_dec there, taken over the first global batch."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights kept beside them; 0: none."""

    def __post_init__(self) -> None:
        require(
            bool(self.hooks), "sae.hooks must name at least one hook point, e.g. sae.hooks=[blocks.3.hook_resid_post]"
        )
        require(len(set(self.hooks)) == len(self.hooks), f"sae.hooks must differ, got {self.hooks}")
        if self.targets is not None:
            require(
                len(self.targets) == len(self.hooks),
                f"sae.targets must name one hook point for each of sae.hooks: {len(self.targets)} for {len(self.hooks)}",
            )
            require(not self.crosscoder, "sae.crosscoder reconstructs what it reads: leave sae.targets null")
        require(not self.crosscoder or len(self.hooks) > 1, "sae.crosscoder=true needs several sae.hooks")
        for name in ("expansion", "k", "dead_after"):
            require(getattr(self, name) >= 1, f"sae.{name} must be at least 1, got {getattr(self, name)}")
        require(self.width is None or self.width >= 1, f"sae.width must be at least 1 or null, got {self.width}")
        require(self.aux_k is None or self.aux_k >= 0, f"sae.aux_k must not be negative, got {self.aux_k}")
        for name in ("sparsity", "sparsity_warmup_steps", "aux_coefficient", "initial_threshold"):
            require(getattr(self, name) >= 0, f"sae.{name} must not be negative, got {getattr(self, name)}")
        require(self.encoder_scale > 0, f"sae.encoder_scale must be positive, got {self.encoder_scale}")
        require(self.bandwidth > 0, f"sae.bandwidth must be positive, got {self.bandwidth}")
        for name in ("ema", "threshold_decay"):
            require(0 <= getattr(self, name) < 1, f"sae.{name} must be in [0, 1), got {getattr(self, name)}")
        ascending = sorted(set(self.prefixes))
        require(
            ascending == self.prefixes and bool(ascending) and ascending[0] > 0 and ascending[-1] == 1,
            f"sae.prefixes must be ascending shares that end with 1, got {self.prefixes}",
        )
        labels = [variant.label for variant in self.variants]
        require(len(set(labels)) == len(labels), f"sae.variants must differ, got {labels}")

    @property
    def all_hooks(self) -> list[str]:
        """Every hook point to be read, targets included, each once."""
        return list(dict.fromkeys([*self.hooks, *(self.targets or [])]))


@dataclass(frozen=True, kw_only=True)
class SAESpec:
    """One SAE to be trained, everything decided."""

    name: str
    """Its hook points, and its variant after an @."""
    inputs: tuple[str, ...]
    """Hook points it reads, side by side."""
    outputs: tuple[str, ...]
    """Hook points it reconstructs, side by side."""
    d_in: int
    """Width of what it reads."""
    d_out: int
    """Width of what it reconstructs."""
    width: int
    """Latents."""
    config: SAEConfig
    """Its own settings, the variant's included."""

    def __post_init__(self) -> None:
        config = self.config
        if config.architecture in ("topk", "batch_topk", "matryoshka"):
            require(
                config.k <= self.width,
                f"sae.k={config.k} must be at most the number of latents {self.width} of {self.name}",
            )

    @property
    def is_transcoder(self) -> bool:
        """Whether it reconstructs something else than it reads."""
        return self.inputs != self.outputs

    @property
    def shape(self) -> dict[str, Any]:
        """What every tensor of it depends on: another shape is another SAE."""
        return {
            "architecture": self.config.architecture,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "width": self.width,
        }

    @property
    def subtracts_b_dec(self) -> bool:
        """Whether the encoder sees its input less b_dec."""
        return self.config.subtract_b_dec and not self.is_transcoder

    @property
    def aux_k(self) -> int:
        """Dead latents that AuxK uses."""
        return self.d_in // 2 if self.config.aux_k is None else self.config.aux_k


def specs_of(config: SAEConfig, widths: dict[str, int]) -> list[SAESpec]:
    """All SAEs that `config` asks for, by the `widths` of the hook points' activations. Raises ConfigError."""
    places = [tuple(config.hooks)] if config.crosscoder else [(hook,) for hook in config.hooks]
    targets = places if config.targets is None else [(target,) for target in config.targets]
    specs = []
    for inputs, outputs in zip(places, targets):
        for variant in config.variants or [VariantConfig()]:
            given = variant.given
            if "expansion" in given:  # counts, whatever width the others have
                given = {"width": None, **given}
            own = replace(config, **given)
            d_in = sum(widths[hook] for hook in inputs)
            specs.append(
                SAESpec(
                    name="+".join(inputs) + (f"@{variant.label}" if variant.label else ""),
                    inputs=inputs,
                    outputs=outputs,
                    d_in=d_in,
                    d_out=sum(widths[hook] for hook in outputs),
                    width=own.width or own.expansion * d_in,
                    config=own,
                )
            )
    return specs
