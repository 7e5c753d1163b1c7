# Everything starts from a fresh clone with one command: `make demo` or `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests compute with one thread each and often wait for other processes: three workers keep two cores busy. A worker takes
# up to 2 GB of memory.
WORKERS ?= 3
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist worksteal
BUNDLE := build/smart-home
DATA := examples/smart-home/data
# A folder with another copy of the suite, for instance on a machine without network.
TUF_CONFORMANCE ?= build/tuf-conformance
TUF_ADDRESS := https://github.com/theupdateframework/tuf-conformance
TUF_COMMIT := eec841c186f81f2d9d8d30460c7e7deefa615f9e

# Containers often set it. Each process would then compile all that it imports again: 4 s for torch and transformers.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-full demo-with-recipe check fast test fuzz test-tuf test-arm64 test-systemd dist docs clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/ready  ## Create .venv, and install both distributions and the tools of developers in it

# What `make demo` needs.
$(VENV)/installed: pyproject.toml runtime/pyproject.toml tools/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "edgetune needs Python 3.11 or newer; this is $$($(PYTHON) --version). Run: make PYTHON=python3.12 …"; exit 5; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
		{ echo "llama-cpp-python needs a C++ compiler. Debian: apt install g++ make; macOS: xcode-select --install"; exit 5; }
	@echo "== installing into $(VENV): pip compiles llama.cpp if it has no wheel of it, in 3.5 minutes of CPU time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python tools/install.py $(VENV)/install.log --editable './runtime[gguf,onnx,structured,server,wyoming]' --editable '.[demo]'
	@touch $@

$(VENV)/ready: $(VENV)/installed
	@echo "== adding the tools for tests, checks and documentation"
	@$(BIN)/python tools/install.py $(VENV)/install.log --editable '.[demo,dev]'
	@touch $@

demo: RECIPE := examples/smart-home/quick.yaml
demo: demo-with-recipe  ## Build examples/smart-home with a short training and answer one prompt with each adapter

demo-full: RECIPE := examples/smart-home/recipe.yaml
demo-full: BUNDLE := build/smart-home-full
demo-full: demo-with-recipe  ## The same with the full recipe: more than twice as long, and better answers

demo-with-recipe: $(VENV)/installed
	@echo "== building $(BUNDLE) from $(RECIPE): three adapters on one 135M base, for llama.cpp and onnxruntime"
	@$(BIN)/edgetune build $(RECIPE) --out $(BUNDLE) $(ARGS)
	@echo "== one prompt, each engine, each adapter"
	@$(BIN)/python examples/smart-home/switch.py $(BUNDLE)
	@echo "== the app: intent, then command or reply"
	@$(BIN)/python examples/smart-home/app.py $(BUNDLE)

check: setup docs  ## Run ruff, mypy and import-linter, and build the documentation
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== mypy"
	@$(BIN)/mypy
	@echo "== import-linter"
	@$(BIN)/lint-imports

fast: setup  ## Run the tests without network, training and boards, in 2 to 3 minutes
	@$(PYTEST) -m "not model and not slow"

# In one run: each worker imports and collects the tests once.
test: check  ## Run all checks and tests, as CI does
	@echo "== all tests"
	@$(PYTEST)

fuzz: setup  ## Open 10,000 mutations of each kind of file, in half an hour of CPU time; ARGS="--kind kit --case 7" runs one
	@PYTHONPATH=tests $(BIN)/python -m fuzz $(ARGS)

test-tuf: setup $(TUF_CONFORMANCE)  ## Run TUF's conformance suite, fetched once, against the trust of updates; needs faketime
	@PATH=$(BIN):$$PATH $(PYTEST) -c /dev/null --rootdir $(TUF_CONFORMANCE) -q $(TUF_CONFORMANCE)/tuf_conformance --entrypoint tests/tuf_client.py $(ARGS)

build/tuf-conformance:
	@git init --quiet $@.part
	@git -C $@.part fetch --quiet --depth 1 $(TUF_ADDRESS) $(TUF_COMMIT)
	@git -C $@.part -c advice.detachedHead=false checkout --quiet $(TUF_COMMIT)
	@mv $@.part $@

# The compiler for wheels of llama.cpp.
$(VENV)/wheel: $(VENV)/ready
	@$(BIN)/python tools/install.py $(VENV)/install.log --editable '.[wheel]'
	@touch $@

test-arm64: $(VENV)/wheel  ## Run a bundle on emulated arm64 boards, on Debian as root; not part of `make test`
	@$(BIN)/pytest -v -s tests/arm64 $(ARGS)

test-systemd: setup  ## Run a kit's unit in a booted Debian, on Debian as root; not part of `make test`
	@$(BIN)/pytest -v tests/systemd

dist: setup  ## Build the sdist and wheel of both distributions into build/dist, and check them
	@rm -rf build/dist
	@$(BIN)/python -m build --no-isolation --outdir build/dist .
	@$(BIN)/python -m build --no-isolation --outdir build/dist runtime
	@$(BIN)/twine check --strict build/dist/*

docs: setup  ## Build the documentation site into build/site; warnings are errors
	@echo "== docs"
	@$(BIN)/python tools/commands_page.py > docs/reference/commands.md
	@$(BIN)/zensical build --clean --strict
	@grep -q edgetune_runtime.Runtime.generate build/site/reference/api.html || \
		{ echo "build/site/reference/api.html lacks the API: see mkdocstrings in zensical.toml"; exit 1; }

clean:  ## Remove the output and caches of builds and checks, but not .venv
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .cache
