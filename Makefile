# Two commands do all set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUNDLE := build/smart-home
DATA := examples/smart-home/data

.DEFAULT_GOAL := help
.PHONY: help setup demo test dist docs clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/ready  ## Make .venv and install both distributions into it

$(VENV)/ready: pyproject.toml runtime/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "edgetune needs Python 3.11 or newer; this is $$($(PYTHON) --version). Run: make PYTHON=python3.12 …"; exit 5; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
		{ echo "llama-cpp-python needs a C++ compiler. Debian: apt install g++ make; macOS: xcode-select --install"; exit 5; }
	@echo "== installing into $(VENV); compiling llama.cpp takes some minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable './runtime[gguf,onnx]' --editable '.[demo,dev]'
	@touch $@

demo: setup  ## Build examples/smart-home and answer one prompt with each adapter, in both engines
	@echo "== building $(BUNDLE): three adapters on one 135M base, for llama.cpp and onnxruntime"
	@$(BIN)/edgetune build examples/smart-home/recipe.yaml --out $(BUNDLE)
	@echo "== one prompt, each engine, each adapter"
	@$(BIN)/python examples/smart-home/switch.py $(BUNDLE)
	@echo "== the app: intent, then command or reply"
	@$(BIN)/python examples/smart-home/app.py $(BUNDLE)

test: setup  ## Run all tests and checks
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== mypy"
	@$(BIN)/mypy
	@echo "== import-linter"
	@$(BIN)/lint-imports
	@echo "== pytest"
	@$(BIN)/pytest

dist: setup  ## Build the sdist and wheel of both distributions into build/dist, and check them
	@rm -rf build/dist
	@$(BIN)/python -m build --no-isolation --outdir build/dist .
	@$(BIN)/python -m build --no-isolation --outdir build/dist runtime
	@$(BIN)/twine check --strict build/dist/*

docs: setup  ## Build the documentation site into build/site; a warning is an error
	@$(BIN)/python tools/commands_page.py > docs/reference/commands.md
	@$(BIN)/zensical build --clean --strict

clean:  ## Remove what builds and checks left, but not .venv
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .cache
