"""An SAE and what belongs to it: its language model, its hook point, a text, the tokens it knows nothing of."""

from dataclasses import dataclass
from pathlib import Path

from steerscale.config import from_mapping
from steerscale.errors import ConfigError
from steerscale.language_model import LanguageModel, load_language_model
from steerscale.load import newest_checkpoint
from steerscale.parallel.context import ParallelContext
from steerscale.rundir import CONFIG, read_config
from steerscale.sae.formats import read_sae
from steerscale.sae.trained import read_trained
from steerscale.sae.weights import SAEWeights
from steerscale.train.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class SAESource:
    """An SAE, its language model and a text it can be tried on."""

    sae: SAEWeights
    hook: str
    lm: Path | None
    """Its language model, as far as that is known."""
    checkpoint: Path | None
    """Of the language model, if it is a run and not to be its newest."""
    text: Path | None
    """A dataset or text file."""
    spare_special: bool
    """Whether it knows nothing of begin, end, padding and unknown tokens."""
    spare_first: int
    """First positions that it knows nothing of."""

    def language_model(self, context: ParallelContext) -> LanguageModel:
        """Load it. Raises ConfigError if it is not known, and what `load_language_model` raises."""
        if self.lm is None:
            model = f", which says it is {self.sae.model}" if self.sae.model else ""
            raise ConfigError(f"the SAE does not bring its language model{model}: name its directory (--model, model:)")
        return load_language_model(self.lm, context, checkpoint=self.checkpoint)

    def text_path(self, text: str | Path | None = None) -> Path:
        """`text`, or the one that the SAE brings. Raises ConfigError if there is none."""
        if text is not None:
            return Path(text)
        if self.text is None:
            raise ConfigError("the SAE does not bring a text: name a dataset or a text file")
        return self.text


def open_sae(path: Path, *, name: str | None = None, hook: str | None = None) -> SAESource:
    """Read an SAE of a run of ours, or one in a public format.

    Args:
        name: which one, if a run trained several.
        hook: where it belongs; None: where it says.
    Raises:
        ConfigError: nothing like that is there, a name is missing or wrong, no hook point is known.
        CheckpointError: the run has no whole checkpoint.
    """
    lm, checkpoint, text, spare_special, spare_first = None, None, None, True, 0
    if (path / CONFIG).is_file():
        config = from_mapping(RunConfig, read_config(path))
        sae = read_trained(newest_checkpoint(path), name)
        if config.stream is not None:
            spare_special, spare_first = config.stream.drop_special, config.stream.drop_first
            lm = Path(config.stream.lm)
            checkpoint = None if config.stream.checkpoint is None else Path(config.stream.checkpoint)
        if config.data is not None:
            text = Path(next(iter(config.data.weights)))
    else:
        if name is not None:
            raise ConfigError(f"SAE {name} was asked for, but {path} is no run, and holds one SAE: leave the name out")
        sae = read_sae(path)
    hook = hook or sae.hook
    if hook is None:
        raise ConfigError(f"{path} does not say which hook point it belongs to: name it, like blocks.3.hook_resid_post")
    return SAESource(
        sae=sae,
        hook=hook,
        lm=lm,
        checkpoint=checkpoint,
        text=text,
        spare_special=spare_special,
        spare_first=spare_first,
    )
