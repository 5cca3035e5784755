"""Results of `sae_bench` in the layout of SAEBench's result files (version 0.6): one JSON file an evaluation and SAE.

Keys and nesting are theirs, so that what reads their files reads ours; data, prompts and some choices are not (docs/probes.md),
which `eval_result_unstructured` says in the file.
"""

import statistics
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import steerscale
from steerscale.interp.sae_bench.run import BenchConfig, BenchResult
from steerscale.interp.sources import SAESource
from steerscale.tokenizers.base import write_json

NOTE = "Measured by steerscale, not by SAEBench: its own data, prompts and choices, in SAEBench's layout."


def write_saebench(
    directory: Path, name: str, result: BenchResult, source: SAESource, config: BenchConfig, *, model: str, dataset: str
) -> list[Path]:
    """Write what there is about one SAE below `directory`, a folder an evaluation; returns the files.

    Args:
        name: the SAE's, for the file.
        model, dataset: their names, for the files' eval_config.
    """
    parts: dict[str, tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = {}
    common = {"model_name": model, "random_seed": config.probe.seed}
    if result.probing:
        parts["sparse_probing"] = ({**common, **_probing_config(config, dataset)}, *_probing(result, config, dataset))
    if result.absorption:
        parts["absorption_first_letter"] = (
            {**common, "max_k_value": 10, "f1_jump_threshold": 0.03},
            *_absorption(result),
        )
    if result.removal:
        scr = {**common, "dataset_names": [dataset], "perform_scr": True, "n_values": list(config.removed)}
        parts["scr"] = (scr, *_removal(result, config, dataset))
    files = []
    for kind, (settings, metrics, details) in parts.items():
        path = directory / kind / f"{name.replace('/', '_')}_eval_results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, _file(kind, settings, metrics, details, source))
        files.append(path)
    return files


def _file(
    kind: str, settings: Mapping[str, Any], metrics: Mapping[str, Any], details: list[dict[str, Any]], source: SAESource
) -> dict[str, Any]:
    sae = source.sae
    return {
        "eval_type_id": kind,
        "eval_config": dict(settings),
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": dict(metrics),
        "eval_result_details": details,
        "sae_bench_commit_hash": "none",
        "sae_lens_id": None,
        "sae_lens_release_id": None,
        "sae_lens_version": None,
        "sae_cfg_dict": {
            "architecture": sae.architecture,
            "d_in": sae.d_in,
            "d_sae": sae.num_latents,
            "hook_name": source.hook,
            "k": sae.k,
        },
        "eval_result_unstructured": {"note": NOTE, "steerscale": steerscale.__version__},
    }


def _probing_config(config: BenchConfig, dataset: str) -> dict[str, Any]:
    return {
        "dataset_names": [dataset],
        "probe_train_set_size": config.probe.train,
        "probe_test_set_size": config.probe.test,
        "k_values": list(config.ks),
    }


def _probing(result: BenchResult, config: BenchConfig, dataset: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    def mean(values: list[float]) -> float:
        return statistics.fmean(values)

    llm: dict[str, Any] = {"llm_test_accuracy": mean([one.dense for one in result.probing])}
    sae: dict[str, Any] = {"sae_test_accuracy": None}
    for k in config.ks:
        llm[f"llm_top_{k}_test_accuracy"] = mean([one.coordinates[k] for one in result.probing])
        sae[f"sae_top_{k}_test_accuracy"] = mean([one.sae[k] for one in result.probing])
    details = []
    for one in result.probing:
        detail: dict[str, Any] = {"dataset_name": f"{dataset}_{one.name}", "llm_test_accuracy": one.dense}
        for k in config.ks:
            detail |= {f"llm_top_{k}_test_accuracy": one.coordinates[k], f"sae_top_{k}_test_accuracy": one.sae[k]}
        details.append(detail)
    return {"llm": llm, "sae": sae}, details


def _absorption(result: BenchResult) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    of = {
        "absorption_fraction_score": [one.fraction for one in result.absorption],
        "full_absorption_score": [one.rate for one in result.absorption],
        "num_split_features": [float(len(one.main)) for one in result.absorption],
    }
    metrics = {f"mean_{name}": statistics.fmean(values) for name, values in of.items()}
    metrics |= {f"std_dev_{name}": statistics.stdev(values) for name, values in of.items()}
    details = [
        {
            "first_letter": one.letter,
            "mean_absorption_fraction": one.fraction,
            "full_absorption_rate": one.rate,
            "num_full_absorption": one.absorbed,
            "num_probe_true_positives": one.words,
            "num_split_features": len(one.main),
        }
        for one in result.absorption
    ]
    return {"mean": metrics}, details


def _removal(result: BenchResult, config: BenchConfig, dataset: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    first, second = result.removal
    # Theirs takes the direction in which the biased probe leans on the other attribute.
    chosen = first if first.before < first.spurious else second
    values: dict[str, Any] = {}
    for number in config.removed:
        values |= {
            f"scr_dir1_threshold_{number}": first.score[number],
            f"scr_metric_threshold_{number}": chosen.score[number],
            f"scr_dir2_threshold_{number}": second.score[number],
        }
    return {"scr_metrics": values}, [{"dataset_name": dataset, **values}]
