import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steerscale.cli import main
from steerscale.cli.scaling_runs import points_of_runs
from steerscale.config import from_mapping, load_yaml
from steerscale.errors import DataError
from steerscale.metrics import Recorder
from steerscale.models.config import ModelConfig
from steerscale.planning.scaling_laws import REFIT, ParametricLaw
from steerscale.rundir import Status, create_run_dir, write_status
from steerscale.train.config import RunConfig

HOURS = ["scaling", "plan", "--gpu-hours", "46000", "--gpu", "a100"]
PLAN = [*HOURS, "--mfu", "0.45"]
POINTS = str(Path(__file__).resolve().parents[1] / "planning" / "chinchilla_points.csv")
TRUTH = ParametricLaw(E=1.0, A=20, B=60, alpha=0.2, beta=0.2)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def make_run(
    run_dir: Path,
    *,
    width: int,
    steps: int,
    state: Any = "finished",
    data: str = "/nowhere",
    schedule: str = "cosine",
    mfu: float | None = None,
    loss: float | None = None,
    vocab_size: int = 4000,
    seq_len: int = 256,
) -> None:
    """The run directory of a run in a world that obeys `TRUTH`, evaluated at half its steps and at the end."""
    model = {"num_layers": 2, "d_model": width, "num_heads": 4, "seq_len": seq_len, "vocab_size": vocab_size}
    values = {
        "name": run_dir.name,
        "run_dir": f"{run_dir}",
        "model": model,
        "train": {"steps": steps},
        "data": {"path": data},
        "optim": {"schedule": schedule, "warmup_steps": 2},
        "parallel": {"global_batch_size": 16},
    }
    config = from_mapping(RunConfig, values)
    create_run_dir(run_dir, config, command=["test"])
    recorder = Recorder(run_dir, writes=True, tensorboard=False)
    recorder.write("start", 0, {"layout": "TP1 PP1 DP1", "device": "a100"})
    for step in (steps // 2, steps):
        recorder.write("train", step, {"loss": 3.0, "mfu": mfu, "peak_tflops": 312.0, "seconds_per_step": 1.0})
        ideal = TRUTH.loss(config.model.num_parameters(), step * 16 * 256)
        recorder.write("eval", step, {"loss": ideal if loss is None else loss})
    recorder.close()
    write_status(run_dir, Status(state=state, step=steps, steps=steps))


def make_sweep(directory: Path, **options: Any) -> None:
    for width in (32, 64, 128):
        for steps in (100, 400, 1600):
            make_run(directory / f"w{width}_s{steps}", width=width, steps=steps, **options)


def test_plan_of_46000_hours(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, *PLAN, "--tokens", "250e9..300e9", "--gpus", "256", "--tp", "4", "--pp", "4")
    laws = {row["law"]: row for row in found["laws"]}
    assert found["budget"]["flops"] == pytest.approx(2.32e22, rel=0.003)
    assert laws["refit"]["parameters"] / 1e9 == pytest.approx(13.9, abs=0.05)
    assert laws["Chinchilla 3"]["tokens"] / 1e9 == pytest.approx(415, abs=1)
    assert [end["parameters"] / 1e9 for end in found["tokens"]] == pytest.approx([15.5, 12.9], abs=0.05)
    assert found["days"] == pytest.approx(46000 / 256 / 24)
    assert found["model"]["num_layers"] % 4 == found["model"]["num_heads"] % 4 == 0
    assert found["model_parameters"] == pytest.approx(found["chosen"]["parameters"], rel=0.1)
    # Attention and logits are in the exact figure, the embedding's look-up is not: a few per cent from 6 N D.
    assert found["model_gpu_hours"] == pytest.approx(46000, rel=0.1)
    assert found["inference"] is None


def test_plan_prints_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--tokens", "250e9..300e9", "--inference-tokens", "1e12"]) == 0
    text = capsys.readouterr().out
    for part in (
        "46,000 GPU hours at 140.4 TFLOP/s (45.0% of 312) = 2.325e+22 FLOPs",
        "Kaplan ",
        "reconciled ",
        "spread     9.32B to 13.9B parameters",
        "smaller, longer",
        "with use   4.9B on 458B tokens",
        "250B tokens: 15.5B parameters",
        "41,369 to 49,643 GPU hours on 250B to 300B tokens",
        "num_layers: ",
    ):
        assert part in text


def test_plan_writes_a_model_that_can_be_trained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output, plot = tmp_path / "mine.yaml", tmp_path / "plan.png"
    for like in ("6.7b", "7b_gqa_swiglu"):
        options = ["--like", like, "--tp", "8", "-o", str(output), "--plot", str(plot)]
        found = answer(capsys, *PLAN, *options)
        model = from_mapping(ModelConfig, load_yaml(output))
        assert output.read_text(encoding="utf-8") == found["preset"]
        assert model.vocab_size is None
        assert (model.num_layers, model.d_model) == (found["model"]["num_layers"], found["model"]["d_model"])
        assert model.num_heads % 8 == model.kv_groups % 8 == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert answer(capsys, "plan", "--model", str(output), "--gpus", "64", "--gpu", "h200", "--global-batch-size", "512")


def test_plan_of_a_given_size(capsys: pytest.CaptureFixture[str]) -> None:
    case = ["scaling", "plan", "--gpu-hours", "46000", "--peak-tflops", "312", "--mfu", f"{106 / 312}"]
    found = answer(capsys, *case, "--parameters", "6.7e9", "--tokens", "250e9..300e9")
    assert found["chosen"]["gpu_hours_for_tokens"] == pytest.approx([26_300, 31_600], rel=0.003)
    assert found["chosen"]["tokens"] == 300e9
    assert any("14,396 GPU hours may be left over" in text for text in found["assumptions"])
    assert "take 105,024 GPU hours, more than --gpu-hours 46000" in refusal(
        capsys, *case, "--parameters", "67e9", "--tokens", "99.694e9"
    )


def test_plan_takes_the_mfu_of_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, mfu in (("slow", 0.2), ("fast", 0.4), ("unknown", None)):
        make_run(tmp_path / name, width=32, steps=20, mfu=mfu)
    found = answer(capsys, *HOURS, "--from-runs", str(tmp_path))
    assert found["budget"]["mfu"] == 0.4
    assert any("40.0%, the best of 2 runs: fast (TP1 PP1 DP1 on a100)" in text for text in found["assumptions"])
    other = answer(capsys, *HOURS[:-1], "h200", "--from-runs", str(tmp_path))
    assert any("measured against 312 TFLOP/s" in text for text in other["assumptions"])
    assert "none of 1 runs has an MFU" in refusal(capsys, *HOURS, "--from-runs", str(tmp_path / "unknown"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "which utilisation? give one of --mfu X and --from-runs RUN"),
        (["--mfu", "45"], "--mfu must be above 0 and at most 1, got 45"),
        (["--mfu", "0.4", "--peak-tflops", "100"], "which GPU? give one of --gpu NAME and --peak-tflops X"),
        (["--mfu", "0.4", "--gpu", "v100"], "unknown GPU 'v100'"),
        (["--mfu", "0.4", "--tokens", "3e11..2e11"], "--tokens 3e+11..2e+11 is no range"),
        (["--mfu", "0.4", "--tokens", "1e18"], "give more GPU hours or fewer tokens"),
        (["--mfu", "0.4", "--parameters", "7"], "--parameters must be at least 1e+06, got 7"),
        (["--mfu", "0.4", "--like", "6.8b"], "--like 6.8b: "),
        (["--mfu", "0.4", "--gpu-hours", "0.001", "--tp", "64"], "heads that --tp 64 divide"),
        (["--mfu", "0.4", "--gpus", "0"], "--gpus must be at least 1, got 0"),
        (["--mfu", "0.4", "--plot", "plan.xls"], "must end in one of .png, .svg, .pdf"),
        (["--mfu", "0.4", "-o", "/nowhere/mine.yaml"], "there is no directory /nowhere"),
    ],
)
def test_plan_refuses_with_one_line(capsys: pytest.CaptureFixture[str], options: list[str], text: str) -> None:
    error = refusal(capsys, *HOURS, *options)
    assert text in error
    assert error.count("\n") == 1


def test_token_ranges_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*PLAN, "--tokens", "many"])
    assert "expected a range like 250e9..300e9" in capsys.readouterr().err


def test_plan_needs_neither_torch_nor_numpy() -> None:
    script = (
        "import sys\nfrom steerscale.cli import main\n"
        f"main({[*PLAN, '--json']!r})\n"
        'sys.stderr.write(f\'{sorted({"torch", "numpy", "scipy", "matplotlib", "hydra"} & set(sys.modules))}\')'
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr == "[]"


def test_fit_of_a_csv_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "fit.svg"
    options = ["--drop-highest", "5", "--bootstrap", "20", "--hold-out", "2", "--flops", "5.76e23", "--plot", str(plot)]
    found = answer(capsys, "scaling", "fit", POINTS, *options)
    assert found["points"] == 238
    assert found["exponent"] == pytest.approx(REFIT.exponent, abs=0.02)
    assert found["intervals"]["exponent"][0] < REFIT.exponent < found["intervals"]["exponent"][1]
    assert found["frontiers"]["IsoFLOP"]["law"]["exponent"] == pytest.approx(0.5, abs=0.03)
    assert found["best"][0]["parameters"] == pytest.approx(72e9, rel=0.15)
    assert [one["predicted"] / one["loss"] for one in found["held_out"]] == pytest.approx([1, 1], abs=0.03)
    assert any("and" in text and "more budgets left out" in text for text in found["warnings"])
    assert "<svg" in plot.read_text(encoding="utf-8")
    assert main(["scaling", "fit", POINTS, "--drop-highest", "5", "--bootstrap", "0"]) == 0
    text = capsys.readouterr().out
    assert ["A", "477.83", "-"] in [line.split() for line in text.splitlines()]
    assert "starts ended there" in text
    assert "warning: IsoFLOP: " in text


def test_fit_of_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, german_data: Path) -> None:
    make_sweep(tmp_path, data=str(german_data))
    make_run(tmp_path / "killed", width=256, steps=100, state="stopped")
    make_run(tmp_path / "diverged", width=256, steps=100, loss=float("nan"))
    make_run(tmp_path / "constant", width=256, steps=100, schedule="constant", data=str(german_data))
    make_run(tmp_path / "guessing", width=256, steps=100, loss=math.log(4000))
    with (tmp_path / "constant" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "skip", "step": 7, "loss": null}\n')
    found = answer(capsys, "scaling", "fit", str(tmp_path), "--bootstrap", "0", "--hold-out", "1")
    assert found["points"] == 9
    assert found["law"] == pytest.approx(vars(TRUTH), rel=0.02)
    (held_out,) = found["held_out"]
    assert held_out["name"] == "w128_s1600"
    assert held_out["tokens"] == 1600 * 16 * 256
    assert held_out["predicted"] == pytest.approx(held_out["loss"], rel=1e-3)
    assert "a parabola needs 4" in found["frontiers"]["IsoFLOP"]["reason"]
    assert len(found["frontiers"]["envelope"]["best"]) >= 3
    warnings = "\n".join(found["warnings"])
    assert "killed is left out: it is stopped at step 100 of 100, not finished" in warnings
    assert "diverged is left out: the loss of its last evaluation is not a number: it diverged" in warnings
    assert "constant: the learning rate ended at 100% of its peak" in warnings
    assert "constant: 1 of 100 steps were skipped" in warnings
    assert "guessing is left out: its last loss of 8.294 is no better than guessing (8.294 among 4,000)" in warnings
    assert "tokenizer" not in warnings


def test_runs_whose_dataset_is_gone_are_fitted_with_a_warning(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_sweep(tmp_path)
    found = answer(capsys, "scaling", "fit", str(tmp_path), "--bootstrap", "0")
    assert found["points"] == 9
    assert any("its tokenizer and text are not compared" in text for text in found["warnings"])


def test_runs_of_other_data_are_not_mixed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, german_data: Path
) -> None:
    runs, other = tmp_path / "runs", tmp_path / "other"
    shutil.copytree(german_data, other)
    make_sweep(runs, data=str(german_data))
    make_run(runs / "same", width=32, steps=200, data=str(other))
    assert answer(capsys, "scaling", "fit", str(runs), "--bootstrap", "0")["points"] == 10
    manifest = json.loads((other / "manifest.json").read_text(encoding="utf-8"))
    (other / "manifest.json").write_text(json.dumps({**manifest, "seed": 99}), encoding="utf-8")
    assert "of different datasets cannot be compared: same" in refusal(capsys, "scaling", "fit", str(runs))
    shutil.rmtree(runs / "same")
    make_run(runs / "larger", width=32, steps=200, vocab_size=5000)
    error = refusal(capsys, "scaling", "fit", str(runs))
    assert "of different vocabularies cannot be compared" in error
    assert "larger (5,000 tokens)" in error
    shutil.rmtree(runs / "larger")
    make_run(runs / "longer", width=32, steps=200, seq_len=512)
    warnings = answer(capsys, "scaling", "fit", str(runs), "--bootstrap", "0")["warnings"]
    assert any("sequences of 256 to 512 tokens" in text for text in warnings)


def test_what_cannot_be_written_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    budget = ["scaling", "plan", "--gpu-hours", "1000", "--gpu", "h100", "--mfu", "0.4"]
    for option, name in (("-o", "model.yaml"), ("--plot", "plan.png")):
        (tmp_path / name).mkdir()
        assert f"{tmp_path / name} cannot be written: " in refusal(capsys, *budget, option, str(tmp_path / name))
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).rmdir()


def test_runs_of_one_name_and_several_vocabularies_are_not_mixed(tmp_path: Path) -> None:
    for directory, vocab_size in (("a", 4000), ("b", 5000)):
        (tmp_path / directory).mkdir()
        make_run(tmp_path / directory / "run", width=32, steps=100, vocab_size=vocab_size)
    with pytest.raises(DataError, match="of different vocabularies cannot be compared"):
        points_of_runs([tmp_path])


def test_fit_refuses_with_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mixed, bad = tmp_path / "mixed.csv", tmp_path / "bad.csv"
    rows = [f"{n},{n * ratio},3,{n}" for n in (1e8, 2e8, 3e8) for ratio in (5, 20)]
    mixed.write_text("\n".join(["N,D,loss,tokenizer", *rows]), encoding="utf-8")
    bad.write_text("N,D,loss\n1e8,1e9,nan\n", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for arguments, text in (
        ([str(mixed)], "different tokenizers cannot be compared"),
        ([str(bad)], "row 1: loss must be a positive number, got 'nan'"),
        ([str(tmp_path / "empty")], "is no run directory and holds none"),
        ([POINTS, "--hold-out", "245"], "--hold-out must be between 0 and 244 for 245 points, got 245"),
        ([POINTS, "--drop-highest", "240", "--bootstrap", "0"], "needs at least 6 points, got 5"),
        ([POINTS, "--bootstrap", "0", "--flops", "-1"], "--flops must be positive, got -1"),
        ([POINTS, "--plot", "/nowhere/fit.png"], "there is no directory /nowhere"),
    ):
        error = refusal(capsys, "scaling", "fit", *arguments)
        assert text in error
        assert error.count("\n") == 1


def test_reconcile_shows_both_countings(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "scaling", "reconcile")
    assert found["kaplan"] == 0.73
    assert found["simulated"][0]["non_embedding"] == pytest.approx(0.78, abs=0.01)
    assert found["simulated"][0]["total"] == pytest.approx(0.515, abs=0.01)
    assert list(found["porian"].values()) == [0.835, 0.707, 0.602, 0.572, 0.497]
    assert main(["scaling", "reconcile"]) == 0
    assert "refit                    0.775     0.509     0.513" in capsys.readouterr().out
