# The project's verbs. A new machine needs Python 3.11 or newer, git and make; everything else is brought here.

PYTHON ?= python3
BIN := .venv/bin
DATA ?= streets

.DEFAULT_GOAL := help
.PHONY: help setup runs10 around10 smoke test test-slow gpu-check faults fuzz test-browser test-cluster test-namespaces test-postgres fixtures snapshots lint format lock tensorboard clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: .venv/.complete  ## the locked environment in .venv

.uv/bin/uv: requirements-uv.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-uv.lock
	@touch $@

.venv/.complete: .uv/bin/uv requirements.lock pyproject.toml
	.uv/bin/uv venv --quiet --allow-existing --python $(PYTHON) .venv
	.uv/bin/uv pip sync --quiet --python $(BIN)/python --require-hashes --compile-bytecode requirements.lock
	.uv/bin/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

runs10: setup  ## the ten runs on the built-in streets, or on DATA=folder
	$(BIN)/python -m tune_bisenet.run --space runs10 --data $(DATA)

around10: setup  ## 30 trials around the ten, by Optuna; WARM=results/NAME begins with what that search measured
	$(BIN)/python -m tune_bisenet.run --space around10 --data $(DATA) --trials 30 $(if $(WARM),--warm-start $(WARM))

smoke: setup  ## three short rows: does everything work here?
	$(BIN)/python -m tune_bisenet.run --space smoke --epochs 2 --scheduler fifo

test: setup  ## the quick tests, two files at a time
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-slow: setup  ## whole searches, crashes and kills: what takes over half a minute, but for make faults
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "slow and not cluster and not namespaces and not faults"

faults: setup  ## each fault of docs/reliability.md, injected at 20 random moments; fault-figures.jsonl has what it cost
	rm -f fault-figures.jsonl
	TUNE_BISENET_FAULT_MOMENTS=20 TUNE_BISENET_FAULT_FIGURES=$(CURDIR)/fault-figures.jsonl \
		$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "" tests/faults

fuzz: setup  ## 100,000 random rows, flags and damaged files, where make test has 2,000: half an hour on two cores
	TUNE_BISENET_FUZZ_INPUTS=100000 $(BIN)/python -m pytest --numprocesses 2 --timeout 0 -m "" \
		tests/fuzz tests/training/test_training_properties.py

gpu-check: setup  ## everything that depends on the GPU of this machine, in eight minutes, as JSON lines
	$(BIN)/python benchmarks/gpu.py

test-browser: setup  ## the report in a real Chromium; installs Debian's if it is not there
	command -v chromium chromedriver >/dev/null || (apt-get update -qq && apt-get install -y -qq chromium chromium-driver)
	$(BIN)/python -m pytest tests/report/test_browser.py

test-postgres: setup  ## the study in a real PostgreSQL; installs Debian's if it is not there
	ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || (apt-get update -qq && apt-get install -y -qq postgresql)
	$(BIN)/python -m pytest tests/study/test_postgres.py

test-cluster: setup  ## clusters, jobs, mock clouds and object storage
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "cluster and not namespaces"

test-namespaces: setup  ## clusters that grow, in Linux namespaces: needs root
	$(BIN)/python -m pytest -m namespaces

fixtures: setup  ## write the two small searches in tests/fixtures again; then run make snapshots
	$(BIN)/python tests/write_fixtures.py

snapshots: setup  ## write tests/snapshots and docs/messages.md again; review the diff
	TUNE_BISENET_WRITE_SNAPSHOTS=1 $(BIN)/python -m pytest tests/test_snapshots.py tests/test_messages.py

lint: setup  ## formatting, lint, types, import layers, security
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive tune_bisenet search_spaces benchmarks

format: setup  ## let ruff format and fix
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

lock: .uv/bin/uv  ## bring requirements.lock up to date with pyproject.toml
	.uv/bin/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate --extra postgres --extra cluster --extra export --extra video --group dev pyproject.toml --output-file requirements.lock

tensorboard: setup  ## TensorBoard over all searches in results/
	$(BIN)/tensorboard --logdir results

clean:  ## remove the environments and caches, not the results
	rm -rf .venv .uv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
