"""Losses of two small runs as they were recorded: unchanged mathematics gives unchanged losses.

`make golden` records them anew; the commit that does so says why they changed.
"""

import json
import os
from pathlib import Path

import pytest

from steerscale.data.manifest import inspect_dataset
from steerscale.testing.parity import FP32, train_curve
from steerscale.testing.ranks import RankPool
from tests.parity.runs import MODELS, layout, run_config

GOLDEN = Path(__file__).parent / "losses.json"
STEPS = 10


@pytest.mark.parametrize("name", MODELS)
def test_golden_losses(name: str, pool: RankPool, german_data: Path, tmp_path: Path) -> None:
    config = run_config(german_data, tmp_path / "run", MODELS[name], layout(), steps=STEPS)
    (curve,) = pool.run(train_curve, config, ranks=1)
    tokenizer = inspect_dataset(german_data).tokenizer.hash
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    if os.environ.get("STEERSCALE_GOLDEN") == "write":
        entry = {"tokenizer": tokenizer, "losses": curve.losses, "grad_norms": curve.grad_norms}
        GOLDEN.write_text(json.dumps({**recorded, name: entry}, indent=1) + "\n", encoding="utf-8")
        return
    golden = recorded[name]
    if golden["tokenizer"] != tokenizer:
        pytest.skip("another version of sentencepiece trains another tokenizer, so the tokens differ")
    assert curve.losses == pytest.approx(golden["losses"], rel=FP32.loss)
    assert curve.grad_norms == pytest.approx(golden["grad_norms"], rel=FP32.grad_norm)
