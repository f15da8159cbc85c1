# make demo: the whole job on two real platforms.   make test: everything that a change must pass.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed-$(shell cat constraints.txt setup.py | sha256sum | cut -c1-16)
PORT = $(shell $(PYTHON) -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

.PHONY: bench-checkpoint bench-prepare bench-quality bench-scaling bench-speed bench-stream demo test test-gpu lint inputs soak soak-cluster clean
.DELETE_ON_ERROR:

demo: inputs
	$(BIN)/dtrain prepare configs/data/demo.yaml
	$(BIN)/deepspeed --num_accelerators 2 --master_port $(PORT) launch/train.py configs/train/demo.yaml
	$(BIN)/dtrain evaluate runs/demo
	$(BIN)/dtrain export runs/demo --out runs/demo/export
	$(BIN)/python launch/recommend.py runs/demo/export

test: inputs lint
	DTRAIN_INPUTS=runs/inputs $(BIN)/python -m pytest

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -n 0 -m cuda -rs

# Faults of every kind, and SOAK_KILLS kills at random moments: about a quarter of an hour.
soak: $(STAMP)
	$(BIN)/python -m benchmarks.soak runs/soak.md

# A job on a Ray cluster and what befalls it. As root also hosts with a network between them.
soak-cluster: $(STAMP)
	$(BIN)/python -m benchmarks.cluster_soak runs/soak-cluster.md

bench-checkpoint: $(STAMP)
	$(BIN)/python -m benchmarks.checkpoint --work runs/bench

# Needs about 3 GB below runs/bench/prepare, 8 GiB of memory for Polars, and PyPI once. QUICK=1: minutes.
bench-prepare: $(STAMP)
	$(BIN)/python -m benchmarks.prepare_speed

# DTRAIN_DATA names the folder of five of the platforms. Hours in all; cut it at any time, it goes on. ARGS: see --help.
bench-quality: inputs
	$(BIN)/dtrain prepare configs/data/seven.yaml
	$(BIN)/python -m benchmarks.quality $(ARGS)

# Formulas against 1 to 4 ranks, and the plan at 10^10 samples: four minutes or more, QUICK=1 fewer.
bench-scaling: $(STAMP)
	mkdir -p runs/bench
	$(BIN)/python -m benchmarks.scaling --work runs/bench --results runs/bench/scaling.json $(if $(QUICK),,--docs docs)

# On a machine that does nothing else: hours, QUICK=1 ten minutes. Cut it at any time, it goes on. PyPI once, for peers.
bench-speed: inputs
	$(BIN)/dtrain prepare configs/data/seven.yaml
	$(BIN)/python -m benchmarks.speed $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

inputs: $(STAMP)
	$(BIN)/dtrain fetch configs/fetch/demo.yaml

# Needs about 6 GB below runs/bench/stream, and PyPI once for the libraries it compares with. QUICK=1: minutes.
bench-stream: $(STAMP)
	$(BIN)/python -m benchmarks.stream

# torch first and pinned, so that no later requirement pulls another build of it in.
$(STAMP):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel ninja
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	rm -f $(VENV)/installed-*
	touch $@

clean:
	rm -rf $(VENV) runs
