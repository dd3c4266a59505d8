# The same few commands that CI runs. Everything is installed into .venv, at exactly the versions of requirements.lock.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
VLLM_BIN := .venv-vllm/bin
VLLM_STAMP := .venv-vllm/.installed
PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm quickstart certs images up down test test-slow test-vllm lint clean

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

setup-vllm: $(VLLM_STAMP) ## make .venv-vllm: vLLM for machines without a GPU, on top of .venv

# Without --no-deps come torchvision and its kin, built for another torch: vLLM cannot be imported beside them.
$(VLLM_STAMP): $(STAMP) requirements-vllm.lock
	@echo "setup-vllm: making .venv-vllm"
	@$(PYTHON) -m venv .venv-vllm
	@$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm.lock
	@printf '%s\n' "$$($(BIN)/python -c '$(PACKAGES)')" "$(CURDIR)" > "$$($(VLLM_BIN)/python -c '$(PACKAGES)')/project.pth"
	@touch $@
	@echo "setup-vllm: done"

quickstart: setup ## train a small agent to use a tool, in two to three minutes
	$(BIN)/actors train recipes/arithmetic.toml

images: setup ## the images of the stack; stand-ins, and says so, where the genuine ones cannot be pulled
	$(BIN)/python -m compose.images

up: setup ## the stack in containers: RECIPE=recipes/arithmetic.toml RUN=dev make up
	$(BIN)/python -m compose.up

down: setup ## drain and stop it; its volumes, and logins in compose/generated, stay
	docker compose --file compose/dev.yml --profile '*' down

certs: setup ## certificates for the bus in compose/generated/tls
	$(BIN)/actors nats-certs compose/generated/tls

lint: setup ## style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint ## all checks but the slow tests
	$(BIN)/python -m pytest -m "not slow"

test-vllm: setup-vllm ## the tests of the vllm engine
	$(VLLM_BIN)/python -m pytest tests/test_engines/test_protocol.py tests/test_engines/test_vllm_engine.py --timeout 300

test-slow: setup ## the slow tests: whole runs, attacks, killed processes
	$(BIN)/python -m pytest -m slow --timeout 900

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .venv-vllm .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
