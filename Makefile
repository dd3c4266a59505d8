# The same few commands that CI runs. Everything is installed into .venv, at exactly the versions of requirements.lock.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow lint clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## make .venv with everything that the rest needs

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	@echo "setup: making .venv"
	@$(PYTHON) -m venv .venv
	@echo "setup: installing torch (the largest part)"
	@$(PIP) torch==2.13.0
	@echo "setup: installing the other packages of requirements.lock"
	@$(PIP) -r requirements.lock
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "setup: done"

quickstart: setup ## train a small agent to use a tool, in about two minutes
	$(BIN)/actors train recipes/arithmetic.toml

lint: setup ## style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint ## all checks but the slow tests
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup ## the slow tests: whole runs, attacks, killed processes
	$(BIN)/python -m pytest -m slow --timeout 900

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
