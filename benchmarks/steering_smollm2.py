"""Latents of an SAE on SmolLM2-135M: what they are about, by labelled text; what steering by them does, against baselines.

    python benchmarks/steering_smollm2.py runs/smollm2_sae --brown brown_tagged.txt.xz --parallel parallel_en_de_cs.tsv.xz -o o

For each concept: the latent with the highest AUC on one half of a text, and its AUC on the other half; a recipe; a sweep that
amplifies it and one that suppresses it, each beside prompting, difference of means and (amplified) activation addition and a
probe. What is written (recipes, sweep_*.json, latents.json) is not measured again: begin anew in another DIR. Results:
docs/steering_smollm2.md.
"""

import sys
from pathlib import Path

# ruff: noqa: E402
# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import random
import time
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from benchmarks._common import print_environment
from benchmarks.steering_concepts import CONCEPTS, NEUTRAL, Concept
from steerscale.config import dump_yaml
from steerscale.interp import sweep_baselines as baselines
from steerscale.interp.find import Activity, activity, compile_pattern, label_figures, pattern_examples
from steerscale.interp.probes.activations import encode_examples
from steerscale.interp.probes.labels import Example, read_examples, split_examples
from steerscale.interp.recipes import EditRecipe, Recipe, SAERecipe, load_recipe
from steerscale.interp.sources import SAESource, open_sae
from steerscale.interp.steering_plot import plot_sweep
from steerscale.interp.sweep import FIGURES, Method, Sweep, concept_tokens, run_sweep
from steerscale.language_model import LanguageModel, load_language_model
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.sampling import Sampling

TARGET = 0.5
"""Of a recipe. The SAE's inputs are scaled to norm 1, which its decoder's rows have too: half as long as the activation."""
CANDIDATES = 6


def main() -> None:
    """Find, screen, sweep; everything is written below --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run of SAEs")
    parser.add_argument("--sae", default="blocks.15.hook_resid_post@k=64")
    parser.add_argument("--lm", type=Path, help="language model (default: the run's)")
    parser.add_argument("--brown", type=Path, required=True, help="word/TAG lines")
    parser.add_argument("--parallel", type=Path, required=True, help="name, English, German, Czech, separated by tabs")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=[concept.name for concept in CONCEPTS], help="concepts")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--tokens", type=int, default=4000, help="to read of each half of a text")
    parser.add_argument("--max-tokens", type=int, default=16)
    args = parser.parse_args()
    print_environment("megatron-core")
    args.output.mkdir(parents=True, exist_ok=True)
    source = open_sae(args.run, name=args.sae)
    begin = time.process_time()
    with initialize(ParallelLayout()) as context:
        lm = load_language_model(
            args.lm or source.lm or Path(), context, checkpoint=source.checkpoint, precision="bf16"
        )
        chosen = [concept for concept in CONCEPTS if args.only is None or concept.name in args.only]
        for kind in dict.fromkeys(concept.text for concept in chosen):
            _choose(args, lm, source, [concept for concept in chosen if concept.text == kind], kind)
        for concept in chosen:
            _sweeps(args, lm, source, concept)
            print(f"{concept.name}: {time.process_time() - begin:.0f} CPU seconds so far", flush=True)
    (args.output / "summary.md").write_text(summary(args.output), encoding="utf-8")


@cache
def _english(brown: Path, parallel: Path, kind: str) -> list[str]:
    """3,000 sentences, the same each time."""
    if kind == "brown":
        lines = [example.text for example in read_examples("pos", path=brown)]
    else:
        lines = [example.text for example in _sentences(parallel) if example.label == "en"]
    return random.Random(0).sample(lines, 3000)


@cache
def _sentences(parallel: Path) -> list[Example]:
    """English and German ones of some length, shuffled."""
    found = read_examples("language", path=parallel, classes=("en", "de", "cs"))
    found = [example for example in found if example.label in ("en", "de") and len(example.text) > 60]
    return random.Random(1).sample(found, len(found))


def _choose(args: argparse.Namespace, lm: LanguageModel, source: SAESource, concepts: list[Concept], kind: str) -> None:
    """A recipe for each concept of one text, and what is known of its latent, in latents.json."""
    record = args.output / "latents.json"
    known: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    concepts = [concept for concept in concepts if concept.name not in known]
    if not concepts:
        return
    if kind == "language":
        examples = _sentences(args.parallel)[:6000]
    else:
        examples = pattern_examples(_english(args.brown, args.parallel, kind), "(?!)")
    halves: list[tuple[Activity, list[tuple[str, str]]]] = []
    for half in split_examples(examples, seed=0, held_out=0.5):
        encoded = encode_examples(
            lm,
            half,
            position="all" if kind == "language" else "last",
            vectors=args.tokens,
            drop_first=source.spare_first + len(lm.prefix),
        )
        places = [(place.type, place.label) for one in encoded for place in one.places]
        halves.append((activity(lm, source.sae, encoded, source.hook), places))
    for concept in concepts:
        words = compile_pattern(concept.words)
        figures = []
        for found, places in halves:
            has = [label == "de" if kind == "language" else words.fullmatch(word) is not None for word, label in places]
            figures.append(label_figures(found, torch.tensor(has)))
        known[concept.name] = _best(figures)
        recipe = Recipe(
            description=f"{concept.name}: a latent found and checked by benchmarks/steering_smollm2.py",
            saes=[
                SAERecipe(
                    path=str(args.run),
                    name=args.sae,
                    edits=[EditRecipe(latent=known[concept.name]["latent"], target=TARGET)],
                )
            ],
        )
        (args.output / f"{concept.name}.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
        record.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(concept.name, json.dumps(known[concept.name]), flush=True)


def _best(figures: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """The latent with the best AUC on the first half, its figures on the other, and the next five."""
    chosen, told = figures
    rows = [
        {"latent": latent, "chosen by auc": round(float(chosen["auc"][latent]), 5)}
        | {"held-out": {name: round(float(value[latent]), 5) for name, value in told.items()}}
        for latent in chosen["auc"].argsort(descending=True).tolist()[:CANDIDATES]
    ]
    return {**rows[0], "next": rows[1:]}


def _sweeps(args: argparse.Namespace, lm: LanguageModel, source: SAESource, concept: Concept) -> None:
    opened = load_recipe(args.output / f"{concept.name}.yaml").open(model=Path())
    latent = opened.recipe.saes[0].edits[0].latent
    zero = Recipe(saes=[SAERecipe(path=str(args.run), name=args.sae, edits=[EditRecipe(latent=latent, scale=0.0)])])
    ask = partial(
        Sweep,
        concept=concept.expression,
        tokens=concept_tokens(lm, concept.words),
        max_tokens=args.max_tokens,
        sampling=Sampling(temperature=0.8, top_p=0.95),
        distractors=1,
    )
    vectors = {"activation addition": baselines.pair_vector(lm, concept.pair, source.hook)}
    vectors |= baselines.contrast_vectors(
        lm, _contrast(args, concept), source.hook, drop_first=source.spare_first, tokens=2000
    )
    norm = baselines.change_norm(lm, opened, NEUTRAL, source.hook)
    for name, sign in (("amplify", 1), ("suppress", -1)):
        path = args.output / f"sweep_{concept.name}_{name}.json"
        if path.is_file():
            continue
        recipe = opened if sign > 0 else zero.open(model=Path())
        vector = partial(baselines.vector_method, lm, opened, hook=source.hook, norm=norm)
        fewer = args.strengths[:2]
        kept = vectors if sign > 0 else {"difference of means": vectors["difference of means"]}
        methods = [
            baselines.recipe_method(lm, recipe, name="SAE latent"),
            Method(name="prompting", instruction=concept.instruction if sign > 0 else concept.avoid),
            *(replace(vector(kind, sign * vector_M), strengths=fewer) for kind, vector_M in kept.items()),
        ]
        prompts = NEUTRAL if sign > 0 else [f"{concept.lead} {prompt}" for prompt in concept.prompts]
        strengths = args.strengths if sign > 0 else [1.0]
        points = run_sweep(
            lm,
            ask(prompts=prompts, strengths=strengths, suppress=sign < 0),
            methods,
            on_point=lambda point: print(json.dumps(point.values(), ensure_ascii=False), flush=True),
        )
        content = {"concept": concept.name, "latent": latent, "prompts": prompts, "norm": norm}
        content["points"] = [point.values() for point in points]
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        plot_sweep(path.with_suffix(".png"), points, title=f"{concept.name}, {name}: latent {latent}")


def _contrast(args: argparse.Namespace, concept: Concept) -> tuple[list[str], list[str]]:
    """Texts with the concept and texts without."""
    if concept.text == "language":
        kept = _sentences(args.parallel)[6000:10_000]
        return tuple([one.text for one in kept if one.label == label] for label in ("de", "en"))  # type: ignore[return-value]
    words = compile_pattern(concept.expression)
    lines = _english(args.brown, args.parallel, concept.text)
    return [line for line in lines if words.search(line)], [line for line in lines if not words.search(line)]


def summary(directory: Path) -> str:
    """Tables in Markdown of all that is in a directory."""
    known = json.loads((directory / "latents.json").read_text(encoding="utf-8"))
    lines = [
        "| concept | latent | AUC (choice) | AUC (held-out) | places | active there | active elsewhere |",
        "|" + "---|" * 7,
    ]
    for name, one in known.items():
        held = one["held-out"]
        lines.append(
            f"| {name} | {one['latent']} | {one['chosen by auc']:.3f} | {held['auc']:.3f} | {held['places']:.0f} | "
            f"{held['active inside']:.1%} | {held['active outside']:.1%} |"
        )
    for kind in ("amplify", "suppress"):
        lines += ["", f"**{kind}**", "", "| concept | method | strength | " + " | ".join(FIGURES) + " |"]
        lines.append("|" + "---|" * (3 + len(FIGURES)))
        for name in known:
            path = directory / f"sweep_{name}_{kind}.json"
            points = json.loads(path.read_text(encoding="utf-8"))["points"] if path.is_file() else []
            for point in points:
                figures = " | ".join(f"{point[figure]:.3g}" for figure in FIGURES)
                lines.append(f"| {name} | {point['method']} | {point['strength']:g} | {figures} |")
    lines += ["", "**best combined score of each method, amplified**", ""]
    methods: list[str] = []
    rows = []
    for name in known:
        path = directory / f"sweep_{name}_amplify.json"
        if path.is_file():
            best: dict[str, float] = {}
            for point in json.loads(path.read_text(encoding="utf-8"))["points"]:
                best[point["method"]] = max(point["combined"], best.get(point["method"], 0.0))
            methods = list(best)
            rows.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in best.values()) + " |")
    return (
        "\n".join([*lines, "| concept | " + " | ".join(methods) + " |", "|" + "---|" * (1 + len(methods)), *rows])
        + "\n"
    )


if __name__ == "__main__":
    main()
