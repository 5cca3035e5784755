"""What the superposition experiment can be told."""

from dataclasses import dataclass, field

from steerscale.config import require
from steerscale.experiments.stages import ExperimentConfig


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Toys over sparsity: how many features are stored."""

    features: int = 20
    """Of a toy."""
    hidden: int = 5
    """Its dimensions."""
    importance_decay: float = 0.9
    """Importance of feature i: this to the power of i."""
    active: list[float] = field(default_factory=lambda: [1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01])
    """Probabilities of a feature being active: 1 - sparsity."""
    steps: int = 2000
    """Of training."""
    batch_size: int = 512
    """Samples a step."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """Two features in one dimension, over sparsity and relative importance."""

    points: int = 15
    """Of either axis."""
    starts: int = 4
    """Initial weights; the toy with the least loss counts."""
    steps: int = 1000
    """Of training."""
    batch_size: int = 256
    """Samples a step."""


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """A toy whose features are to be found again, and SAEs on its hidden activations."""

    features: int = 48
    """Of the toy; equally important. Even: they make pairs."""
    hidden: int = 16
    """Its dimensions."""
    active: list[float] = field(default_factory=lambda: [0.1, 0.04, 0.02])
    """Probabilities of a feature being active."""
    main: float = 0.04
    """The one of them for all architectures and for steering."""
    toy_steps: int = 2000
    """Of the toy's training."""
    expansion: int = 6
    """SAEs' latents for each dimension."""
    sparsity: dict[str, float] = field(default_factory=lambda: {"relu": 0.05, "gated": 0.05, "jumprelu": 0.01})
    """Penalties of the architectures that have one; the others select as many latents as features are active on average."""
    sae_steps: int = 800
    """Of an SAE's training."""
    batch_size: int = 512
    """Vectors a step."""
    lr: float = 3e-3
    """Of SAEs."""
    vectors: int = 20_000
    """For means, PCA and probes."""

    def __post_init__(self) -> None:
        require(self.features % 2 == 0, f"dictionary.features must be even, got {self.features}")
        require(self.main in self.active, f"dictionary.main={self.main} must be one of dictionary.active={self.active}")


@dataclass(frozen=True, kw_only=True)
class SteeringConfig:
    """Switching a feature on, by directions from data in which another one goes with it."""

    correlations: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.9, 1.0])
    """Probabilities that feature 2i switches on feature 2i + 1 in the data that directions come from."""
    value: float = 0.75
    """What the feature is to be."""
    samples: int = 2000
    """On which the effect is measured, a distribution."""
    architecture: str = "batch_topk"
    """Of the SAEs."""


@dataclass(frozen=True, kw_only=True)
class SuperpositionConfig(ExperimentConfig):
    """The experiment."""

    seeds: int = 3
    """Repetitions of everything; error bars are standard errors over them."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """Features stored over sparsity."""
    phase: PhaseConfig = field(default_factory=PhaseConfig)
    """The phase picture."""
    dictionary: DictionaryConfig = field(default_factory=DictionaryConfig)
    """Recovery of the features."""
    steering: SteeringConfig = field(default_factory=SteeringConfig)
    """Steering in and out of distribution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.seeds >= 2, f"seeds must be at least 2, or there are no error bars, got {self.seeds}")
