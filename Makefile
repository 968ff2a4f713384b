# Two commands matter: `make run` and `make test`. Both make the environment first.

PYTHON ?= python3
UV_VERSION := 0.13.9
BIN := .venv/bin
UV := $(BIN)/uv
STAMP := .venv/.stamp
# Tests that need no root, no GPU and no cluster.
TESTS := $(wildcard tests/unit tests/compile tests/local)

# torch and kfp take two or three times as long to import without bytecode.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env run test check lock compiled clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

env: $(STAMP) ## Create .venv from requirements.lock; done again only when that or pyproject.toml changes

run: $(STAMP) ## Run the preset `tiny` to its report, in runs/tiny
	$(BIN)/srccore run --preset tiny --out runs/tiny

test: $(STAMP) ## Run every test that needs no root, no GPU and no cluster
	$(BIN)/python -m pytest $(TESTS)

check: $(STAMP) ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

lock: $(UV) ## Resolve pyproject.toml into requirements.lock anew
	$(UV) pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-header -o requirements.lock

compiled: $(STAMP) ## Write the compiled pipelines, component.yaml files and their pages anew
	$(BIN)/python -m srccore_pipelines.regenerate

clean: ## Remove the environment and all caches; runs/ stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"srccore needs Python 3.11 or later: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# The wheel's build takes hatchling from the default registry, in isolation: it is no dependency.
$(STAMP): requirements.lock pyproject.toml | $(UV)
	$(UV) pip sync --quiet --python $(BIN)/python requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@
