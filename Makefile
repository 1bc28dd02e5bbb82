# A handful of targets; CI runs these very ones.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := $(shell command -v uv 2>/dev/null || echo $(BIN)/uv)
READY  := $(VENV)/.ready
# three even on two cores: a test that starts Ray mostly waits for other processes
PARALLEL := --numprocesses=3 --dist=loadfile --no-loadscope-reorder
COVERED  := 95

.PHONY: help setup demo test test-all check docs format lock clean

help:            ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(READY)  ## install everything into .venv, as pinned in requirements.lock

$(READY): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit("fedray needs Python 3.11 or newer; set PYTHON=…") if sys.version_info < (3, 11) else 0'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@command -v $(UV) >/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(VENV) $(UV) pip install --quiet --compile-bytecode --require-hashes -r requirements.lock
	VIRTUAL_ENV=$(VENV) $(UV) pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup      ## a sweep on real data, about a minute
	$(BIN)/fedray sweep tune_configs/quickstart.yaml

test: setup      ## the fast tests, in parallel
	$(BIN)/python -m pytest $(PARALLEL)

test-all: setup  ## every test, the slow ones too, and the coverage
	$(BIN)/python -m pytest $(PARALLEL) -m 'not gpu' --hypothesis-profile=default --cov=fedray --cov=rllib_pruner --cov-fail-under=$(COVERED)

check: setup     ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup      ## write docs/config.md and the JSON schemas from the docstrings
	$(BIN)/python -m docs.reference

format: setup    ## rewrite what `check` would refuse
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: setup      ## resolve pyproject.toml anew into requirements.lock
	$(UV) pip compile --quiet --universal --generate-hashes --custom-compile-command 'make lock' --python-version 3.11 --extra dev requirements.in pyproject.toml -o requirements.lock

clean:           ## forget .venv and the caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
