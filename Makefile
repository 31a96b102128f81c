# Every target makes .venv and installs what it needs; a second run starts at once.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= runs/demo
# Processes that share out the tests. Each holds about 3 GB.
WORKERS ?= 2
# How long the campaign of faults lasts, and where it writes.
MINUTES  ?= 30
CAMPAIGN ?= runs/campaign

# Where PyTorch's wheels come from, if not from pip's own index: that of the wheels without CUDA, a tenth of the size,
# stands in the command that pytorch.org gives for pip and CPU.
TORCH_INDEX ?=
# Further arguments of pip.
PIP_ARGS ?=

define INSTALLING
Installing pecobook and what it needs into $(VENV): 3 to 4 GB of downloads
and 6 GB of disk the first time, since PyTorch's wheels carry CUDA.
Without a GPU, PyTorch's wheels without CUDA are a tenth of that: TORCH_INDEX, see "Installing" in README.md.
endef
export INSTALLING

# Builds the site into build/site; a link or an anchor that leads nowhere is an error.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
PIP := $(BIN)/pip install --disable-pip-version-check
ifneq ($(TORCH_INDEX),)
INSTALL_TORCH := PIP_INDEX_URL=$(TORCH_INDEX) $(PIP) $(PIP_ARGS) torch torchvision
else
INSTALL_TORCH := @echo "$$INSTALLING"
endif

# What a small processor computes: AVX2 alone, without AVX-512 and bfloat16.
SMALL_CPU := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell
SENSITIVE := tests/stages/test_golden.py tests/stages/test_classify.py tests/models/test_nearest.py \
	tests/models/test_nearest_triton.py tests/models/test_quantizer.py

.PHONY: demo docs test test-docs campaign test-all test-gpu test-portable test-floors check package format clean

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

# The tests with the lowest version of each dependency, in an environment of its own.
test-floors:
	$(MAKE) VENV=.venv-floors .venv-floors/.floors
	.venv-floors/bin/pytest -n $(WORKERS) --dist worksteal -m "not gpu and not slow"

# The sdist and the wheel in dist/, tried outside the checkout.
package: $(VENV)/.run
	.ci/package $(BIN)/python

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
	rm -rf $(VENV) .venv-floors build dist .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 15) else "pecobook needs Python 3.11 to 3.14, this is %d.%d: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	$(INSTALL_TORCH)
	$(PIP) $(PIP_ARGS) --editable ".[full]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(INSTALL_TORCH)
	$(PIP) $(PIP_ARGS) --editable ".[dev]"
	touch $@ $(VENV)/.run

$(VENV)/.floors: pyproject.toml .ci/floors | $(VENV)/bin/python
	$(BIN)/python .ci/floors > $(VENV)/floors.txt
	$(PIP) $(PIP_ARGS) --constraint $(VENV)/floors.txt --editable ".[test]"
	touch $@
