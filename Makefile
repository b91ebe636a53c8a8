# Every target is sufficient by itself on a fresh clone: it makes .venv and installs what it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=
# On all cores, one thread each: several would wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install prefetch train sample evaluate compare report sweep certify frontier study replay convert sync dashboard test coverage test-slow test-slurm check format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-10s %s\n", $$1, $$2 }'

install: $(INSTALLED)  ## make .venv and install denoiselab with the tested versions

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "denoiselab needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

prefetch: $(INSTALLED)  ## fetch weights and data on a machine with a network; ARGS="metrics=fid datamodule=cifar10"
	$(BIN)/python scripts/prefetch.py $(ARGS)

train: $(INSTALLED)  ## train on handwritten digits and print a table; ARGS="objective=v" changes the run
	$(BIN)/python scripts/train.py $(ARGS)

sample: $(INSTALLED)  ## draw from the newest run; ARGS="num_samples=200 output=samples.npz"
	$(BIN)/python scripts/sample.py $(ARGS)

evaluate: $(INSTALLED)  ## measure the newest run
	$(BIN)/python scripts/evaluate.py $(ARGS)

compare: $(INSTALLED)  ## runs side by side with intervals; ARGS="<run> <run> output=table.md"
	$(BIN)/python scripts/compare.py $(ARGS)

report: $(INSTALLED)  ## one HTML page over runs and sweeps; ARGS="sweeps/<sweep> output=report.html"
	$(BIN)/python scripts/report.py $(ARGS)

sweep: $(INSTALLED)  ## go on with a sweep, or look at it; ARGS="resume <folder>", status or collect
	$(BIN)/python scripts/sweep.py $(ARGS)

certify: $(INSTALLED)  ## certify every sampler, path and prediction against exact answers, in some minutes
	$(BIN)/python scripts/certify.py $(ARGS)

frontier: $(INSTALLED)  ## quality against evaluations and seconds, of the newest run; ARGS="scales=[1,1.5,3]"
	$(BIN)/python scripts/frontier.py $(ARGS)

study: $(INSTALLED)  ## what texts predict, measured; ARGS="study=guidance" or copying
	$(BIN)/python scripts/study.py $(ARGS)

replay: $(INSTALLED)  ## train the newest run again from its folder, and compare; ARGS="run=<run> steps=100"
	$(BIN)/python scripts/replay.py $(ARGS)

convert: $(INSTALLED)  ## weights from and for elsewhere; ARGS="run=<run> to=diffusers output=<folder>"
	$(BIN)/python scripts/convert.py $(ARGS)

sync: $(INSTALLED)  ## send runs to W&B that were trained without a network; ARGS="runs/<run> sweeps/<sweep>"
	$(BIN)/python scripts/sync.py $(ARGS)

dashboard: $(INSTALLED)  ## a W&B workspace and report; ARGS="sweeps/<sweep>" or "project=denoiselab"
	$(BIN)/python scripts/dashboard.py $(ARGS)

test: check  ## check, then the default tests
	$(PYTEST) $(ARGS)

coverage: $(INSTALLED)  ## the default tests, and which lines and branches they reach
	$(PYTEST) --cov --cov-report=term:skip-covered $(ARGS)

test-slow: $(INSTALLED)  ## the longer tests
	$(PYTEST) -m 'slow and not slurm' $(ARGS)

test-slurm: $(INSTALLED)  ## the tests on a real Slurm, which is installed (Debian, as root or by sudo), started and stopped
	scripts/slurm_local.sh install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm $(ARGS)

check: $(INSTALLED)  ## formatting, lint, types, import arrows
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove caches and the virtual environment; runs stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage dist
