# `make test` and `make demo` need Python 3.11+ and nothing else; both create .venv where it is missing.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help demo test interop docs lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     convert a real model and seven small ones, print the catalog"
	@echo "make test     lint, type-check and run every test that needs no GPU (SLOW=1: the slow ones too)"
	@echo "make interop  load artifacts with optimum, sentence-transformers and transformers.js (needs Node.js 20 and npm)"
	@echo "make docs     build the pages of documentation into build/site"
	@echo "make lint     ruff and mypy"
	@echo "make format   apply ruff's fixes and formatting"
	@echo "make clean    remove caches, builds and the demo's folder"
	@echo "PYTHON=python3.12 chooses the interpreter that .venv is made from"

# Installed again only when the requirements or the pinned versions change.
# PyTorch goes first and alone: where a CPU build is on offer, pip takes it, and nothing later pulls in CUDA.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "onnx-ferry needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not there)." >&2; \
	  echo "Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "Installing into $(VENV) (once, a few minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt torch
	@$(PIP) install -c constraints.txt -e '.[dev,demo,docs]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python deploy/demo/run_demo.py

test: lint
	@$(BIN)/python -m pytest $(if $(CI)$(SLOW),--slow)

# The environments of the foreign loaders are made once, in .interop.
interop: $(STAMP)
	@$(BIN)/python tests/interop/environments.py .interop
	@$(BIN)/python -m pytest --interop -m interop tests/interop

docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file docs/mkdocs.yml
	@echo "Open build/site/index.html"

lint: $(STAMP)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis ferry-data/demo
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
