"""The launcher as a process of its own, with stub ranks: `python -m tests.launch.launcher RUN_DIR`."""

import sys
from pathlib import Path

import launch.local
from steerscale.config import from_mapping
from steerscale.rundir import read_config
from steerscale.train.config import RunConfig

if __name__ == "__main__":
    launch.local.WORKER = "tests.launch.stub"
    sys.exit(launch.local.run_local(from_mapping(RunConfig, read_config(Path(sys.argv[1])))))
