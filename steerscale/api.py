"""The library in ten lines, for notebooks: `import steerscale as ss` finds these functions, and torch when one is called.

    lm = ss.load_model("runs/my_gpt")                       # a run of ours, or a Hugging Face directory
    sae = ss.load_sae("runs/my_sae")                        # a run of SAEs, or one in a public format
    x = ss.capture(lm, "Das Modell", sae.hook)
    print(ss.evaluate(lm, sae, "text.txt"))
    functions = ss.steer(lm, sae, {123: 8.0})
    print(ss.effect(lm, "Das Modell", functions).kl)
    print(ss.generate(lm, "Das Modell", functions))

Everything is a thin way to the modules named in docs/steering.md. The process groups that Megatron-Core wants are made by the
first `load_model` and kept until `close()` or the end of the process.

Shapes: S sequence, M d_model.
"""

import atexit
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from steerscale import generation
from steerscale.errors import LayoutError
from steerscale.interp import interventions, steering
from steerscale.interp.recipes import load_recipe
from steerscale.interp.sources import SAESource, open_sae
from steerscale.interp.splice import Splice, evaluate_splice
from steerscale.interp.steering import Edit, Effect, Steering
from steerscale.interp.text import sequences_of
from steerscale.language_model import LanguageModel, load_language_model
from steerscale.models.hooks import HookFunction
from steerscale.parallel.context import ParallelContext, initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.sampling import GREEDY, Sampling

Functions = Mapping[str, HookFunction]
"""What changes a model, by hook point: of `steer` and `recipe`, or of one's own."""


class _Process:
    """The process groups of this process: there can be one set."""

    def __init__(self) -> None:
        self._stack, self._context = ExitStack(), None

    def context(self, layout: ParallelLayout) -> ParallelContext:
        if self._context is None:
            self._context = self._stack.enter_context(initialize(layout))
        if self._context.layout != layout:
            raise LayoutError(
                f"this process runs {self._context.layout}: call close() before loading a model as {layout}"
            )
        return self._context

    def close(self) -> None:
        self._context = None
        self._stack.close()


_PROCESS = _Process()
atexit.register(_PROCESS.close)


def load_model(
    path: str | Path, *, checkpoint: str | Path | None = None, tensor: int = 1, pipeline: int = 1
) -> LanguageModel:
    """A run of ours or a Hugging Face model; see `load_language_model`. `tensor`, `pipeline`: under torchrun.

    Raises what that raises, and LayoutError if an earlier model of this process was cut in another way.
    """
    context = _PROCESS.context(ParallelLayout(tensor=tensor, pipeline=pipeline))
    return load_language_model(Path(path), context, checkpoint=None if checkpoint is None else Path(checkpoint))


def load_sae(path: str | Path, *, name: str | None = None, hook: str | None = None) -> SAESource:
    """An SAE (`.sae`) with its hook point (`.hook`) and what it was trained on; see `open_sae`."""
    return open_sae(Path(path), name=name, hook=hook)


def capture(lm: LanguageModel, text: str, hook: str, functions: Functions | None = None) -> torch.Tensor:
    """Activations [S, M] of a text at a hook point, with `functions` at work if given. Raises LayoutError on other stages."""
    found = interventions.capture(lm, _tokens(lm, text), [hook], functions)
    if hook not in found:
        raise LayoutError(f"{hook} is on another pipeline stage than rank {lm.context.rank}: use interventions.capture")
    return found[hook][0]


def evaluate(lm: LanguageModel, sae: SAESource, text: str | Path | None = None, *, samples: int = 8) -> Splice:
    """Sparsity, reconstruction, and the model's loss with the reconstruction in the activation's place.

    Args:
        text: a dataset or text file; None: what the SAE's run held out.
        samples: sequences of it.
    """
    return evaluate_splice(lm, sae, sequences_of(lm, sae.text_path(text), samples=samples))


def steer(
    lm: LanguageModel, sae: SAESource, edits: Mapping[int, float] | Sequence[Edit], *, strength: float = 1.0
) -> dict[str, HookFunction]:
    """Functions that set latents: {latent: value}, or edits of other kinds; see `Steering`."""
    if isinstance(edits, Mapping):
        edits = [Edit(latent=latent, value=value) for latent, value in edits.items()]
    spared = {"spare_special": sae.spare_special, "spare_first": sae.spare_first}
    return Steering(sae.sae, edits, strength=strength, hook=sae.hook, **spared).functions(lm)


def recipe(lm: LanguageModel, path: str | Path, *, strength: float = 1.0) -> dict[str, HookFunction]:
    """Functions of a recipe file for this model; see `interp.recipes`."""
    return load_recipe(Path(path)).open(model=Path()).functions(lm, strength=strength)


def effect(lm: LanguageModel, prompt: str, functions: Functions) -> Effect:
    """The next token's distribution without and with `functions`. Raises LayoutError on stages before the last."""
    found = steering.effect(lm, functions, lm.encode(prompt))
    if found is None:
        raise LayoutError(f"the next token is known on the last pipeline stage, rank {lm.context.rank} is of another")
    return found


def generate(
    lm: LanguageModel,
    prompt: str,
    functions: Functions | None = None,
    *,
    max_tokens: int = 40,
    sampling: Sampling = GREEDY,
) -> str:
    """What the model makes of a prompt, without the prompt."""
    (found,) = generation.generate(lm, [lm.encode(prompt)], sampling, max_tokens=max_tokens, functions=functions)
    return found.text


def close() -> None:
    """End the process groups; models loaded before are of no use any more."""
    _PROCESS.close()


def _tokens(lm: LanguageModel, text: str) -> torch.Tensor:
    return torch.tensor([lm.encode(text)], device=lm.context.device)
