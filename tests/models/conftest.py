from collections.abc import Callable
from pathlib import Path

import pytest

from steerscale.errors import DataError
from steerscale.models.config import ModelConfig
from steerscale.models.hf.export import export_hf
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.testing.ranks import RankPool
from steerscale.testing.smollm2 import smollm2_directory
from tests.models.gpts import MODELS, build_random


def export_random(model: ModelConfig, layout: ParallelLayout, directory: Path, max_file_bytes: int) -> None:
    """Write a random model from its ranks."""
    with initialize(layout) as context:
        export_hf(build_random(model, context), context, directory, max_file_bytes=max_file_bytes)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, pool: RankPool) -> Callable[[str], Path]:
    """The directory of each model of MODELS, written once by 4 ranks: in one file, or ("... split") in several."""
    written: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in written:
            model, split = MODELS[name.split()[0]], name.endswith("split")
            written[name] = tmp_path_factory.mktemp("hf") / name
            layout = ParallelLayout(tensor=2, pipeline=2)
            pool.run(export_random, model, layout, written[name], 20_000 if split else 10**9, ranks=layout.world_size)
        return written[name]

    return directory


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A real model of the Llama family, in float32."""
    try:
        return smollm2_directory()
    except DataError as error:
        pytest.skip(str(error))
