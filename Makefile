# make demo | test | lint | bench. Each makes .venv when it is missing and installs what it needs there.
PYTHON ?= python3
# The CPU build of torch by default; a CUDA build: make TORCH_INDEX=https://download.pytorch.org/whl/cu130 ...
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := $(shell git ls-files -co --exclude-standard -- 'gossipml/*' 'peer/*' 'dht/*' 'models/*' 'simulations/*' 2>/dev/null)

.PHONY: demo test lint format bench wheel clean
.DELETE_ON_ERROR:

demo: .venv/.installed
	$(BIN)/gossipml demo $(ARGS)

test: .venv/.installed
	$(BIN)/pytest $(ARGS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dependencies
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed
	$(BIN)/python benchmarks/run_all.py $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info

# torch by itself, so that no other package is ever looked up in its index
.venv/.dependencies: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gossipml needs Python 3.11 or newer, $(PYTHON) is older; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing what gossipml needs into .venv; the first time takes a few minutes"
	$(PIP) setuptools wheel
	$(PIP) --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) torch
	$(PIP) --no-build-isolation '.[test,lint]'
	@touch $@

# The built package, as a user gets it, never the checkout; without stale files of an earlier build
.venv/.installed: .venv/.dependencies $(SOURCES)
	@rm -rf build *.egg-info
	$(PIP) --no-build-isolation --no-deps --force-reinstall .
	@rm -rf build *.egg-info
	@touch $@
