"""Which family is a directory, or a model, of? To add one: a file like `llama.py`, and a line here."""

from pathlib import Path

from steerscale.errors import ConfigError
from steerscale.models.config import ModelConfig
from steerscale.models.hf.fields import ConfigFields
from steerscale.models.hf.gpt2 import GPT2
from steerscale.models.hf.llama import LLAMA
from steerscale.models.hf.recipes import Family

FAMILIES: dict[str, Family] = {"llama": LLAMA, "gpt2": GPT2}
"""By `model_type` in config.json."""


def read_config(directory: Path) -> tuple[Family, ModelConfig]:
    """Family and shape of the model in a Hugging Face directory.

    `seq_len` is the longest the model was made for, `pad_vocab_to` our default; replace them as needed.

    Raises ConfigError naming the field of config.json that is missing, wrong or not understood.
    """
    fields = ConfigFields(directory / "config.json")
    model_type = fields.take("model_type", str)
    if model_type not in FAMILIES:
        raise fields.unsupported("model_type", model_type, f"these are: {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    architectures = fields.raw("architectures")
    if architectures not in (None, [family.architecture]):
        raise fields.unsupported("architectures", architectures, f"only {family.architecture} is")
    return family, family.read_config(fields)


def config_from_hf(directory: Path) -> ModelConfig:
    """Shape of the model in a Hugging Face directory; see `read_config`. Torch is not needed."""
    return read_config(directory)[1]


def family_of(model: ModelConfig) -> tuple[str, Family]:
    """`model_type` and family of a model of ours. Raises ConfigError naming what each family would need."""
    wanting = []
    for model_type, family in FAMILIES.items():
        unmet = [need for need, met in family.requirements(model).items() if not met]
        if not unmet:
            return model_type, family
        wanting.append(f"{family.architecture} needs {', '.join(unmet)}")
    raise ConfigError(f"no Hugging Face architecture can express this model: {'; '.join(wanting)}")
