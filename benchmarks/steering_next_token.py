"""What latents of an SAE on SmolLM2-135M do to the next token and to other text, beside baselines: no text is generated.

    python benchmarks/steering_next_token.py runs/smollm2_sae [--concepts NAME=LATENT ...]

For each concept of steering_smollm2.py: the probability of the concept's tokens as the next one, the KL divergence, and the
perplexity of held-out text of the SAE's run, turned up on neutral prompts and suppressed on prompts that ask for it. A fraction
of the time of steering_smollm2.py, which also looks at generated texts. One JSON object a line; results:
docs/steering_smollm2.md.
"""

import sys
from pathlib import Path

# ruff: noqa: E402
# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import math
import time
from collections.abc import Sequence

import torch

from benchmarks._common import environment
from benchmarks.steering_concepts import CONCEPTS, NEUTRAL, Concept
from benchmarks.steering_smollm2 import TARGET
from steerscale.interp import sweep_baselines as baselines
from steerscale.interp.interventions import capture
from steerscale.interp.recipes import EditRecipe, OpenRecipe, Recipe, SAERecipe
from steerscale.interp.steering import Effect, held_out_loss
from steerscale.interp.sweep import Method, concept_tokens, next_distributions
from steerscale.interp.text import sequences_of
from steerscale.language_model import LanguageModel, load_language_model
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout

METHODS = ("prompting", "SAE latent", "activation addition", "difference of means")


def main() -> None:
    """Print a line a point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run of SAEs")
    parser.add_argument("--sae", default="blocks.15.hook_resid_post@k=64")
    parser.add_argument("--concepts", nargs="+", required=True, metavar="NAME=LATENT")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    args = parser.parse_args()
    print(json.dumps({"environment": environment("megatron-core")}), flush=True)
    begin, known = time.process_time(), {concept.name: concept for concept in CONCEPTS}
    with initialize(ParallelLayout()) as context:
        lm: LanguageModel | None = None
        for pair in args.concepts:
            name, _, latent = pair.partition("=")
            amplified, suppressed = (
                Recipe(saes=[SAERecipe(path=str(args.run), name=args.sae, edits=[edit])]).open()
                for edit in (
                    EditRecipe(latent=int(latent), target=TARGET), EditRecipe(latent=int(latent), scale=0.0)
                )
            )  # fmt: skip
            if lm is None:
                lm = load_language_model(amplified.model, context, checkpoint=amplified.checkpoint, precision="bf16")
            _measure(lm, known[name], int(latent), amplified, suppressed, methods=args.methods)
            print(f"{name}: {time.process_time() - begin:.0f} CPU seconds so far", file=sys.stderr, flush=True)


def _means_vector(lm: LanguageModel, concept: Concept, hook: str) -> torch.Tensor:
    """[M] mean last activation of the prompts that ask for the concept minus that of the neutral ones."""
    asking = [f"{concept.lead} {one}" for one in concept.prompts]
    means = []
    for prompts in (asking, NEUTRAL):
        tokens = [torch.tensor([lm.encode(prompt)], device=lm.context.device) for prompt in prompts]
        means.append(torch.stack([capture(lm, one, [hook])[hook][0, -1].float() for one in tokens]).mean(dim=0))
    return means[0] - means[1]


def _measure(
    lm: LanguageModel,
    concept: Concept,
    latent: int,
    amplified: OpenRecipe,
    suppressed: OpenRecipe,
    *,
    methods: Sequence[str],
) -> None:
    tokens, hook = concept_tokens(lm, concept.words), amplified.sources[0].hook
    norm = baselines.change_norm(lm, amplified, NEUTRAL, hook)
    vectors = {"activation addition": baselines.pair_vector(lm, concept.pair, hook)}
    vectors["difference of means"] = _means_vector(lm, concept, hook)
    text = list(sequences_of(lm, amplified.sources[0].text_path(), samples=2, seq_len=128))
    for kind, prompts, recipe, instruction, sign, strengths in (
        ("amplify", NEUTRAL, amplified, concept.instruction, 1, [0.5, 1.0, 2.0]),
        ("suppress", [f"{concept.lead} {one}" for one in concept.prompts], suppressed, concept.avoid, -1, [1.0]),
    ):
        plain = [lm.encode(prompt) for prompt in prompts]
        told = [lm.encode(f"{instruction}\n\n{prompt}") for prompt in prompts]
        before = next_distributions(lm, plain, {})
        cases = [(Method(name="none"), 0.0), (Method(name="prompting"), 1.0)]
        cases += [(baselines.recipe_method(lm, recipe, name="SAE latent"), strength) for strength in strengths]
        for name, vector_M in vectors.items():
            method = baselines.vector_method(lm, amplified, name, sign * vector_M, hook=hook, norm=norm)
            cases += [(method, strength) for strength in ([0.5, 1.0] if sign > 0 else [0.5])]
        for method, strength in cases:
            if method.name not in ("none", *methods):
                continue
            functions = method.functions(strength) if method.functions else {}
            after = next_distributions(lm, told if method.name == "prompting" else plain, functions)
            loss = held_out_loss(lm, functions, text) if functions else None
            row = {"concept": concept.name, "latent": latent, "kind": kind, "method": method.name, "strength": strength}
            row |= {
                "target": sum(float(one[tokens].sum()) for one in after) / len(after),
                "kl": sum(Effect(before_V=a, after_V=b).kl for a, b in zip(before, after)) / len(after),
            }
            if loss is not None:
                row |= {"perplexity before": math.exp(loss.before), "perplexity": math.exp(loss.after)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
