# Everything runs from an environment of the project's own, made from whatever Python 3.11+ is at hand.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help run test lint format types bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.run: pyproject.toml sdk/python/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hotdesk needs Python 3.11 or newer; this is %d.%d (set PYTHON=...)" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --editable sdk/python --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@$(BIN)/python -m pip install --quiet --editable sdk/python --editable '.[dev]'
	@touch $@

run: $(VENV)/.run  ## serve on 127.0.0.1:8080 with SQLite and the plugins in plugins/
	@$(BIN)/hotdesk run

test: $(VENV)/.dev  ## all tests
	@$(BIN)/python -m pytest

lint: $(VENV)/.dev  ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.dev  ## put the code in order
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.dev  ## every figure in the README, measured again (about two hours)
	@$(BIN)/python -m tests.bench

clean:  ## remove the environment and the caches
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
