# Every verb sets up .venv first when that is missing or stale; `make help` lists the verbs.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python -P -m
PARALLEL := --numprocesses auto --maxprocesses 8 --dist loadfile
PYTHON_FILES := ltm_pyro models guides studies tests $(wildcard benchmarks examples)
BENCHMARKS := $(sort $(wildcard benchmarks/bench_*.py))

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-gpu lint types bench figures clean

help:  ## List the verbs.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## Install into .venv, exactly as constraints.txt says.

$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,plots]"
	@touch $@

quickstart: $(STAMP)  ## Train and score a small model beside its floor and its ceiling, on text of this machine.
	$(RUN) ltm_pyro.studies.quickstart
	$(VENV)/bin/ltm context --config studies/recipes/quickstart.yaml --label kind --limit 128 --block 64 --workers 2 --out runs/quickstart

test: $(STAMP)  ## Run the tests that take seconds.
	$(RUN) pytest $(PARALLEL) -m "not slow and not gpu"

test-slow: $(STAMP)  ## Run the tests that take minutes.
	$(RUN) pytest $(PARALLEL) -m slow

test-gpu: $(STAMP)  ## Run the tests that need a CUDA device.
	$(RUN) pytest -m gpu

lint: $(STAMP)  ## Check style and formatting.
	$(RUN) ruff check $(PYTHON_FILES)
	$(RUN) ruff format --check $(PYTHON_FILES)

# mypy follows no import hook, so it gets the package as it looks when installed: a tree of links.
types: $(STAMP)  ## Check types, strictly.
	@rm -rf build/types
	@mkdir -p build/types/ltm_pyro
	@cp -rs "$(CURDIR)"/ltm_pyro/* "$(CURDIR)/models" "$(CURDIR)/guides" "$(CURDIR)/studies" build/types/ltm_pyro
	MYPYPATH=build/types $(RUN) mypy -p ltm_pyro

bench: $(STAMP)  ## Run every benchmark.
	@$(if $(BENCHMARKS),,echo "There is no benchmarks/bench_*.py.")
	@set -e; for file in $(BENCHMARKS); do echo "== $$file"; $(VENV)/bin/python -P "$$file"; done

figures: $(STAMP)  ## Make the tables of README and docs again (ONLY="quickstart", DATA=folder of the suites).
	$(VENV)/bin/python -P benchmarks/figures.py $(ONLY) $(if $(DATA),--data "$(DATA)")

clean:  ## Remove what was built and cached; .venv and runs stay.
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(PYTHON_FILES) -name __pycache__ -prune -exec rm -rf {} +
