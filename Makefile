# The environment is .venv; `make venv` makes it, and brings it up to date when what it was made from has changed.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.mezzotint-stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
NATIVE := CMakeLists.txt $(wildcard src/mezzotint/kernels/cpp/*)
# 8 minutes, then 30 s to die; `timeout` belongs to coreutils, so a machine without it runs unlimited.
LIMIT := $(shell command -v timeout >/dev/null && echo timeout --kill-after=30 480)
JOBS ?= 2

.PHONY: venv demo docs test test-slow test-engines test-gpu check bench clean

venv: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# torch comes first: without a GPU its CPU build is a tenth of the size, and where the index has none the plain one does.
# A torch of the pinned version that is already there stays, whatever its build.
$(STAMP): pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	@echo 'make venv: installing into $(VENV) and building the kernels'
	@if ! $(BIN)/python -c 'import torch, sys; sys.exit("torch==" + torch.__version__.split("+")[0] not in open("constraints.txt").read().split())' 2>/dev/null; then \
	  pinned=$$(grep '^torch==' constraints.txt); \
	  if nvidia-smi >/dev/null 2>&1; then $(PIP) "$$pinned"; else $(PIP) "$$pinned+cpu" 2>/dev/null || $(PIP) "$$pinned"; fi; \
	fi
	@$(PIP) scikit-build-core nanobind cmake ninja
	@$(PIP) --no-build-isolation --editable '.[dev,demo]'
	@touch $@

demo: venv
	$(BIN)/python examples/demo.py

test: venv
	$(LIMIT) $(BIN)/python -m pytest -q -n $(JOBS)
	$(LIMIT) $(BIN)/python -m pytest -q -n $(JOBS) --doctest-modules src/mezzotint

test-slow: venv
	$(BIN)/python -m pytest -q -m "slow and not gpu and not engine and not network"

test-engines: venv
	$(BIN)/python -m pytest -q -m "engine"

docs: venv
	@$(PIP) --no-build-isolation --editable '.[docs]'
	$(BIN)/python -m mkdocs build

test-gpu: venv
	$(BIN)/python -m pytest -q -m "gpu"

check: venv
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_architecture.py
	$(BIN)/python -m pytest -q -n $(JOBS)
	$(BIN)/python -m pytest -q -n $(JOBS) --doctest-modules src/mezzotint

# A short version of the quality suite: SmolLM2 as `make demo` leaves it, and texts that you name.
bench: venv
	@test -n "$(DATA)" || { echo "make bench DATA=FOLDER: a folder with calibration/wikipedia.txt and wikitext2/wiki.test.raw" >&2; exit 2; }
	$(BIN)/python -m benchmarks quality --model $(or $(MODEL),demo/smollm2) --data $(DATA) --name SmolLM2-135M-Instruct

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(STAMP)
