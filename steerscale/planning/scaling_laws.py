"""Published scaling laws: how large a model, and on how many tokens, for a compute budget.

Symbols: N parameters, D training tokens, C training FLOPs, L loss in nats a token. C = 6 N D throughout, as the papers
take it (`flops.model_flops_per_token` is exact). A loss holds for its paper's text and tokenizer and compares settings,
not models of others. What N counts differs and matters: Kaplan leaves embeddings out, the others count everything.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import linear_regression

from steerscale.config import require

FLOPS_PER_PARAMETER_AND_TOKEN = 6
"""2 forward, 4 backward (Kaplan et al. 2020, section 2.1)."""
PF_DAY = 1e15 * 86400
"""FLOPs in a petaFLOP/s-day, Kaplan's unit of compute."""


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """What a law makes of a budget."""

    parameters: float
    """As the law counts them."""
    tokens: float

    @property
    def flops(self) -> float:
        """6 N D."""
        return FLOPS_PER_PARAMETER_AND_TOKEN * self.parameters * self.tokens

    @property
    def tokens_per_parameter(self) -> float:
        """D / N."""
        return self.tokens / self.parameters


@dataclass(frozen=True, kw_only=True)
class ParametricLaw:
    """`L = E + A / N^alpha + B / D^beta` (Hoffmann et al. 2022, equation 2), N in total parameters."""

    E: float
    """Irreducible loss, nats a token."""
    A: float
    B: float
    alpha: float
    beta: float

    def __post_init__(self) -> None:
        for name in ("A", "B", "alpha", "beta"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"law.{name} must be positive, got {value}")
        require(math.isfinite(self.E) and self.E >= 0, f"law.E must not be negative, got {self.E}")

    @property
    def exponent(self) -> float:
        """a of the optimal `N ~ C^a`: beta / (alpha + beta); tokens grow with 1 - a."""
        return self.beta / (self.alpha + self.beta)

    def loss(self, parameters: float, tokens: float) -> float:
        """L, nats a token."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def optimum(self, flops: float) -> Optimum:
        """Least loss at `6 N D = flops` (equation 4): `N = G (C/6)^a`, `G = (alpha A / beta B)^(1/(alpha+beta))`."""
        scale = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = scale * (flops / FLOPS_PER_PARAMETER_AND_TOKEN) ** self.exponent
        return Optimum(parameters=parameters, tokens=tokens_for(flops, parameters))

    def tokens_for_loss(self, loss: float, parameters: float) -> float | None:
        """Tokens that bring `parameters` to `loss`; None if no number does."""
        rest = loss - self.E - self.A / parameters**self.alpha
        return (self.B / rest) ** (1 / self.beta) if rest > 0 else None


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """`N = parameters (C / flops)^exponent`: a law that says which size is best, not how good it is."""

    flops: float
    """Where the line is anchored."""
    parameters: float
    """N there."""
    exponent: float
    tokens: float | None = None
    """D there, growing as C^(1 - exponent); None: what 6 N D = C leaves."""

    def optimum(self, flops: float) -> Optimum:
        """N and D for a budget."""
        ratio = flops / self.flops
        parameters = self.parameters * ratio**self.exponent
        tokens = tokens_for(flops, parameters) if self.tokens is None else self.tokens * ratio ** (1 - self.exponent)
        return Optimum(parameters=parameters, tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A law, and where it comes from."""

    name: str
    title: str
    source: str
    law: ParametricLaw | PowerLaw
    counts_embeddings: bool
    """Whether N counts embeddings."""
    parameters: tuple[float, float]
    """Smallest and largest model behind it, N as the law counts; beyond, it extrapolates."""


# Kaplan et al. 2020 (arXiv 2001.08361). Table 6: budgets with C in PF-days, N without embeddings, D at the critical
# batch size, where a run costs 6 N D, about twice the C that it is the optimum of.
KAPLAN = PowerLaw(flops=PF_DAY, parameters=1.3e9, exponent=0.73, tokens=2e10)


def kaplan_loss(*, parameters: float | None = None, tokens: float | None = None, flops: float | None = None) -> float:
    """Loss limited by one thing alone (equations 1.1 to 1.3): N without embeddings, D, or C spent best.

    `(8.8e13/N)^.076`, `(5.4e13/D)^.095`, `(3.1e8 PF-days/C)^.050`. Fitted to N of 768 to 1.5e9, D of 2.2e7 to 2.3e10.
    """
    laws = ((8.8e13, 0.076, parameters), (5.4e13, 0.095, tokens), (3.1e8 * PF_DAY, 0.050, flops))
    given = [(scale / value) ** exponent for scale, exponent, value in laws if value is not None]
    require(len(given) == 1, "kaplan_loss takes exactly one of parameters, tokens and flops")
    return given[0]


def kaplan_batch_tokens(flops: float) -> float:
    """Critical batch size in tokens for an optimal run (table 6): `2e6 C^.24`, C in PF-days."""
    return 2e6 * (flops / PF_DAY) ** 0.24


# Hoffmann et al. 2022, "Chinchilla" (arXiv 2203.15556). Exponents: table 2. Approaches 1 and 2 are anchored at the 10B row
# of tables 3 and A3; N of table 3's other rows lies within 2.2 % of the line, as the exponent has two digits.
CHINCHILLA_1 = PowerLaw(flops=1.23e22, parameters=10e9, exponent=0.50)
CHINCHILLA_2 = PowerLaw(flops=6 * 10e9 * 219.5e9, parameters=10e9, exponent=0.49)
CHINCHILLA_3 = ParametricLaw(E=1.6934, A=406.4, B=410.7, alpha=0.33917, beta=0.28491)
"""Approach 3. The paper prints .34, .28 and 1.69; those exponents move D / N at 5.76e23 from 59 to 93, so these are the
unrounded ones of the paper's LaTeX source (Besiroglu et al. 2024)."""
CHINCHILLA_TABLE_3: Sequence[tuple[float, float, float]] = (
    (400e6, 1.92e19, 8.0e9),
    (1e9, 1.21e20, 20.2e9),
    (10e9, 1.23e22, 205.1e9),
    (67e9, 5.76e23, 1.5e12),
    (175e9, 3.85e24, 3.7e12),
    (280e9, 9.90e24, 5.9e12),
    (520e9, 3.43e25, 11.0e12),
    (1e12, 1.27e26, 21.2e12),
)
"""Table 3, approach 1: parameters, FLOPs, tokens."""

# Besiroglu et al. 2024 (arXiv 2404.10102): approach 3 fitted again to the points of Chinchilla's figure 4.
REFIT = ParametricLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)

EMBEDDING_FACTOR = 47491.0
"""Pearce & Song 2024 (arXiv 2406.12907): `N_total = N + 47491 N^(1/3)`, N without embeddings; a vocabulary of 32,000 on
Chinchilla's shapes."""

LAWS: tuple[Published, ...] = (
    Published(
        name="kaplan",
        title="Kaplan",
        source="Kaplan et al. 2020, arXiv 2001.08361, table 6",
        law=KAPLAN,
        counts_embeddings=False,
        parameters=(768, 1.5e9),
    ),
    Published(
        name="chinchilla1",
        title="Chinchilla 1",
        source="Hoffmann et al. 2022, arXiv 2203.15556, approach 1 (envelope of training curves)",
        law=CHINCHILLA_1,
        counts_embeddings=True,
        parameters=(70e6, 10e9),
    ),
    Published(
        name="chinchilla2",
        title="Chinchilla 2",
        source="Hoffmann et al. 2022, approach 2 (IsoFLOP parabolas)",
        law=CHINCHILLA_2,
        counts_embeddings=True,
        parameters=(70e6, 16e9),
    ),
    Published(
        name="chinchilla3",
        title="Chinchilla 3",
        source="Hoffmann et al. 2022, approach 3 (parametric), unrounded",
        law=CHINCHILLA_3,
        counts_embeddings=True,
        parameters=(44e6, 16e9),
    ),
    Published(
        name="refit",
        title="refit",
        source="Besiroglu et al. 2024, arXiv 2404.10102",
        law=REFIT,
        counts_embeddings=True,
        parameters=(57e6, 16.2e9),
    ),
)

PORIAN_EXPONENTS: Sequence[tuple[str, float]] = (
    ("as Kaplan", 0.835),
    ("the last layer counted", 0.707),
    ("shorter warm-up", 0.602),
    ("cosine decay to each run's end", 0.572),
    ("optimizer tuned by size", 0.497),
)
"""Porian et al. 2024 (arXiv 2406.19146): exponent of N on RefinedWeb as one cause of the gap after the other is removed."""


def tokens_for(flops: float, parameters: float) -> float:
    """D of `6 N D = flops`."""
    return flops / (FLOPS_PER_PARAMETER_AND_TOKEN * parameters)


def total_parameters(non_embedding: float) -> float:
    """Pearce & Song: all parameters of a model with `non_embedding` ones beside its embeddings."""
    return non_embedding + EMBEDDING_FACTOR * non_embedding ** (1 / 3)


def non_embedding_parameters(total: float) -> float:
    """The inverse of `total_parameters`: x^3 with the real root of `x^3 + 47491 x = total` (Cardano)."""
    half, third = total / 2, EMBEDDING_FACTOR / 3
    high = half + math.sqrt(half**2 + third**3)
    root = high ** (1 / 3)
    return (root - third / root) ** 3


def local_exponent(law: ParametricLaw, total: float) -> float:
    """d log N / d log C at a model of `total` parameters, N and C = 6 N D counted without embeddings (Pearce & Song).

    The budget that N is best for follows from `dL/dN = 0` at fixed C; its logarithmic derivative is a finite difference.
    """

    def log_flops(n: float) -> float:
        whole = total_parameters(n)
        slope = 1 + EMBEDDING_FACTOR / 3 * n ** (-2 / 3)  # of N_total by N
        ratio = law.beta * law.B * n ** (law.beta - 1) / (law.alpha * law.A * slope * whole ** (-law.alpha - 1))
        return math.log(FLOPS_PER_PARAMETER_AND_TOKEN) + math.log(ratio) / law.beta

    n, step = non_embedding_parameters(total), 1e-4
    return 2 * step / (log_flops(n * math.exp(step)) - log_flops(n * math.exp(-step)))


def simulated_exponent(law: ParametricLaw, *, embeddings: bool) -> float:
    """The exponent a of `N ~ C^a` that Kaplan's study would find in a world that obeys `law` (Pearce & Song, section 3).

    20 models of 10^2.9 to 10^9.2 parameters without embeddings, as in Kaplan's study; at each of 100 budgets up to
    10^20.7 FLOPs the one with the least loss; a line through log N over log C. Both counted with or without embeddings.
    The lowest budgets, 10^13.4 and 10^12.95, are the paper's.
    """
    sizes = [10 ** (2.9 + 6.3 * index / 19) for index in range(20)]
    lowest = 13.4 if embeddings else 12.95
    logs_c, logs_n = [], []
    for index in range(100):
        flops = 10 ** (lowest + (20.7 - lowest) * index / 99)
        counted = [(total_parameters(n) if embeddings else n, total_parameters(n)) for n in sizes]
        _, best = min((law.loss(total, tokens_for(flops, n)), n) for n, total in counted)
        logs_c.append(math.log(flops))
        logs_n.append(math.log(best))
    return linear_regression(logs_c, logs_n).slope
