# r1mega. `make demo` and `make test` work from a bare machine: Python 3.11+, a C++ compiler, make.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PROFILE ?= cpu
PY := $(VENV)/bin/python
TORCH := torch==2.13.0
# Where the machine's own package index has no CPU build of torch, PyTorch publishes one here.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
PIP := $(PY) -m pip install --quiet --no-deps --disable-pip-version-check
STAMP := $(VENV)/.installed-$(PROFILE)
EXTENSION := kernels/r1mega_kernels/.built
# make demo SEED=2 is another run, beside the first.
DEMO := runs/tiny$(if $(SEED),-seed$(SEED))
DEMO_SEED := $(if $(SEED),seed=$(SEED))
# Tiny models: more threads only fight each other.
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo pipeline test test-all lint bench clean

setup: $(STAMP) $(EXTENSION)

$(STAMP): requirements/$(PROFILE).lock setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "r1mega needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make setup PYTHON=python3.11" >&2; exit 2; }
	@command -v $${CXX:-c++} >/dev/null || { echo "r1mega needs a C++ compiler (c++ was not found): install g++ or clang" >&2; exit 2; }
	@echo "[setup] creating $(VENV) ($(PROFILE) profile), about two minutes"
	@$(PYTHON) -m venv $(VENV)
ifeq ($(PROFILE),cpu)
	@$(PIP) "$(TORCH)+cpu" 2>/dev/null || $(PIP) --index-url $(TORCH_CPU_INDEX) $(TORCH)
else
	@$(PIP) $(TORCH)
endif
	@$(PIP) -r requirements/$(PROFILE).lock
	@$(PIP) --no-build-isolation --editable .
	@touch $@

# setup.py compiles csrc/; the stamp keeps `make` from asking setuptools every time.
$(EXTENSION): $(STAMP) setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
	@echo "[setup] building the C++ extension"
	@$(PY) setup.py --quiet build_ext --inplace
	@touch $@

demo: setup
	@$(PY) -m r1mega run configs/tiny/base.py dir=$(DEMO)/base $(DEMO_SEED)
	@$(PY) -m r1mega run configs/tiny/r1_zero.py dir=$(DEMO)/r1_zero model=$(DEMO)/base/hf $(DEMO_SEED)

# All of R1's stages in a toy world.
pipeline: setup
	@$(PY) -m r1mega pipeline configs/tiny $(if $(SEED),dir=runs/tiny_pipeline-seed$(SEED) seed=$(SEED))

test: setup
	@$(PY) -m pytest -q -m "not slow" --durations=15

test-all: setup
	@$(PY) -m pytest -q --durations=30

lint: setup
	@$(VENV)/bin/ruff format --check r1mega kernels tests tools configs setup.py
	@$(VENV)/bin/ruff check r1mega kernels tests tools configs setup.py
	@$(VENV)/bin/mypy r1mega kernels/r1mega_kernels

bench: setup
	@$(PY) -m r1mega bench all

clean:
	rm -rf $(VENV) build *.egg-info kernels/r1mega_kernels/_C*.so $(EXTENSION)
