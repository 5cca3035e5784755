"""Probes: classifiers that read a label from an activation. What they are and how they lie on disk; `probes.fit` makes them.

A linear probe is logits = x W' + b. An MLP probe has one hidden layer of ReLUs before that: for contrast, since what only it
can read is no direction, and it cannot edit.

On disk a probe is NAME.safetensors (tensors) and NAME.json (the rest), NAME = hook point and kind; no pickles.

Shapes: V vectors, M d_model, C classes, H hidden.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from steerscale.config import require
from steerscale.errors import ConfigError, DataError
from steerscale.tokenizers.base import write_json

KINDS = ("logistic", "ridge", "diff_means", "mass_mean", "mlp")
POSITIONS = ("last", "first", "mean", "all")
FORMAT = 1
_TENSORS = ("weight_CM", "bias_C", "means_CM", "hidden_weight_HM", "hidden_bias_H")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A fitted probe of one hook point."""

    hook: str
    """Where its activations come from, like blocks.15.hook_resid_post."""
    kind: str
    """One of KINDS."""
    classes: tuple[str, ...]
    """In the order of the logits."""
    weight_CM: torch.Tensor
    """[C, M], of an MLP [C, H]."""
    bias_C: torch.Tensor
    """[C]"""
    means_CM: torch.Tensor
    """Mean activation of each class in training: the unit of edits."""
    hidden_weight_HM: torch.Tensor | None = None
    """Of an MLP."""
    hidden_bias_H: torch.Tensor | None = None
    """Of an MLP."""
    position: str = "last"
    """Which tokens of a labelled span it was trained on, one of POSITIONS."""
    about: dict[str, Any] = field(default_factory=dict)
    """How it was made and what it was worth; JSON values."""

    def __post_init__(self) -> None:
        require(self.kind in KINDS, f"a probe's kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        require(
            self.position in POSITIONS,
            f"a probe's position must be one of {', '.join(POSITIONS)}, got {self.position!r}",
        )
        number = len(self.classes)
        require(
            number > 1 and len(set(self.classes)) == number, f"a probe needs classes that differ, got {self.classes}"
        )
        if (self.kind == "mlp") != (self.hidden_weight_HM is not None and self.hidden_bias_H is not None):
            raise ConfigError("a probe has a hidden layer if and only if its kind is mlp")
        inner = self.weight_CM.shape[1] if self.is_linear else self.width
        expected = {"weight_CM": (number, self.weight_CM.shape[1]), "bias_C": (number,), "means_CM": (number, inner)}
        if self.hidden_weight_HM is not None:
            expected |= {
                "hidden_weight_HM": (self.weight_CM.shape[1], self.width),
                "hidden_bias_H": (self.weight_CM.shape[1],),
            }
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            require(found == shape, f"a probe's {name} must have shape {list(shape)}, got {list(found)}")

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.hook}.{self.kind}"

    @property
    def is_linear(self) -> bool:
        """Whether it has directions."""
        return self.hidden_weight_HM is None

    @property
    def width(self) -> int:
        """M."""
        return self.means_CM.shape[1]

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Activations [..., M] -> float32 [..., C]. Its softmax is the probe's confidence."""
        x = x.float()
        if self.hidden_weight_HM is not None and self.hidden_bias_H is not None:
            x = torch.relu(x @ self.hidden_weight_HM.T + self.hidden_bias_H)
        return x @ self.weight_CM.T + self.bias_C

    def class_index(self, name: str) -> int:
        """Place of a class. Raises ConfigError with the known ones."""
        if name not in self.classes:
            raise ConfigError(f"the probe {self.name} has no class {name!r}: one of {', '.join(self.classes)}")
        return self.classes.index(name)

    def to(self, device: torch.device | str) -> "Probe":
        """The same on another device."""
        return Probe(**{**vars(self), **{name: tensor.to(device) for name, tensor in self.tensors().items()}})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those it has, by field."""
        return {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}


def write_probe(probe: Probe, directory: Path) -> None:
    """Write its two files; the json file, without which a probe is not read, comes last. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.float().cpu().contiguous() for name, tensor in probe.tensors().items()}
    weights, rest = (directory / f"{probe.name}.{kind}" for kind in ("safetensors", "json"))
    try:
        save_file(tensors, weights)
    except SafetensorError as error:
        raise OSError(str(error)) from error  # a full disk, which has no error of its own there
    about = {key: value for key, value in vars(probe).items() if key not in _TENSORS}
    write_json(rest, {"format_version": FORMAT, **about, "classes": list(probe.classes)})
    shutil.copymode(rest, weights)  # safetensors makes files private


def probe_names(directory: Path) -> list[str]:
    """Names of the probes in a directory. Raises DataError if there are none."""
    names = sorted(path.stem for path in directory.glob("*.safetensors") if path.with_suffix(".json").is_file())
    if not names:
        raise DataError(
            f"{directory} holds no probes: make some with `steerscale probe MODEL --task ... -o {directory}`"
        )
    return names


def read_probe(directory: Path, *, hook: str | None = None, kind: str | None = None) -> Probe:
    """Read the one probe of this hook point and kind; either may be None where that leaves one.

    Raises:
        ConfigError: none or several are like that.
        DataError: the directory holds no probes, or the files are damaged or of another format.
    """
    names = probe_names(directory)
    fitting = [
        name
        for name in names
        if (hook is None or name.rpartition(".")[0] == hook) and (kind is None or name.rpartition(".")[2] == kind)
    ]
    if len(fitting) != 1:
        how = "several probes fit" if fitting else "no probe fits"
        raise ConfigError(
            f"{how} hook {hook or 'any'} and kind {kind or 'any'} in {directory}: name both of one of "
            f"{', '.join(fitting or names)}"
        )
    return _read(directory / f"{fitting[0]}.json")


def _read(path: Path) -> Probe:
    try:
        about: Any = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(path.with_suffix(".safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{path} and its .safetensors cannot be read as a probe: {error}") from error
    if not isinstance(about, Mapping) or about.get("format_version") != FORMAT:
        raise DataError(f"{path} is no probe of format_version {FORMAT}: make it again")
    try:
        values: dict[str, Any] = {key: value for key, value in about.items() if key != "format_version"}
        return Probe(**{**values, "classes": tuple(about["classes"]), **tensors})
    except (TypeError, KeyError, ConfigError) as error:
        raise DataError(f"{path} is not a valid probe: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a probe is worth on text that it was not trained on."""

    accuracy: float
    """Share of right answers."""
    balanced_accuracy: float
    """Mean over classes of the share of right answers: 1 / C for a guess, however frequent the classes are."""
    ece: float
    """Expected calibration error, see `calibration_error`."""
    vectors: int
    """That were asked."""

    def values(self) -> dict[str, float]:
        """By name."""
        return asdict(self)


def score(logits_VC: torch.Tensor, y_V: torch.Tensor) -> Score:
    """Compare answers with labels; classes without an example do not count in the balanced accuracy."""
    right_V = (logits_VC.argmax(dim=1) == y_V).double()
    counts_C = torch.bincount(y_V, minlength=logits_VC.shape[1])
    rights_C = torch.bincount(y_V, weights=right_V, minlength=logits_VC.shape[1])
    there_C = counts_C > 0
    return Score(
        accuracy=float(right_V.mean()),
        balanced_accuracy=float((rights_C[there_C] / counts_C[there_C]).mean()),
        ece=calibration_error(logits_VC, y_V),
        vectors=len(y_V),
    )


def calibration_error(logits_VC: torch.Tensor, y_V: torch.Tensor, *, bins: int = 15) -> float:
    """Expected calibration error: sum over bins of confidence of share x |accuracy - mean confidence|.

    Confidence is the largest softmax probability, bins are equally wide (Guo et al. 2017, equation 3).
    """
    confidence_V, answer_V = logits_VC.double().softmax(dim=1).max(dim=1)
    gap_V = (answer_V == y_V).double() - confidence_V
    bin_V = (confidence_V * bins).long().clamp_max(bins - 1)
    return float(torch.bincount(bin_V, weights=gap_V, minlength=bins).abs().sum() / len(y_V))
