# Every target makes .venv and installs what it needs; a second run starts at once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= runs/demo
# Processes that share out the tests. Each holds about 3 GB.
WORKERS ?= 2
# How long the campaign of faults lasts, and where it writes.
MINUTES  ?= 30
CAMPAIGN ?= runs/campaign

# Further arguments of pip, for example where to find PyTorch's wheels without CUDA.
PIP_ARGS ?=

define INSTALLING
Installing pecobook and what it needs into $(VENV): about 6 GB the first time, since PyTorch's wheels carry CUDA.
On a machine without a GPU PyTorch's CPU wheels are a tenth of that: see "Without a GPU" in README.md.
endef
export INSTALLING

# Builds the site into build/site; a link or an anchor that leads nowhere is an error.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What a small processor computes: AVX2 alone, without AVX-512 and bfloat16.
SMALL_CPU := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell
SENSITIVE := tests/stages/test_golden.py tests/stages/test_classify.py tests/models/test_nearest.py \
	tests/models/test_nearest_triton.py tests/models/test_quantizer.py

.PHONY: demo docs test test-docs campaign test-all test-gpu test-portable check format clean

demo: $(VENV)/.run
	$(BIN)/pecobook demo --out $(OUT)

test: $(VENV)/.dev
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m "not gpu and not slow"

test-all: $(VENV)/.dev
	$(BIN)/pytest

campaign: $(VENV)/.dev
	$(BIN)/python -m tests.campaign --minutes $(MINUTES) --out $(CAMPAIGN)

test-portable: $(VENV)/.dev
	$(SMALL_CPU) $(BIN)/pytest -n $(WORKERS) -m "not gpu and not slow" $(SENSITIVE)
	$(SMALL_CPU) ATEN_CPU_CAPABILITY=default $(BIN)/pytest -n $(WORKERS) -m "not gpu and not slow" $(SENSITIVE)

test-gpu: $(VENV)/.dev
	$(BIN)/pytest -m gpu

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MKDOCS)

docs: $(VENV)/.dev
	$(MKDOCS)

test-docs: $(VENV)/.dev
	$(BIN)/pytest -m slow tests/test_tutorials.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "pecobook needs Python 3.11 to 3.13, this is %d.%d: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	@echo "$$INSTALLING"
	$(BIN)/pip install --disable-pip-version-check $(PIP_ARGS) --editable .
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo "$$INSTALLING"
	$(BIN)/pip install --disable-pip-version-check $(PIP_ARGS) --editable ".[dev]"
	touch $@ $(VENV)/.run
