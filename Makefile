# make demo        the whole curriculum from the embedded teacher, on CPU, and its figures beside their floors; a second run
#                  prints its summary
# make demo FRESH=1            start over
# make demo ARGS="--smoke"     flags for the run
# make demo RANKS=1            processes that train; two where there are two cores, which on small updates is faster than
#                              two threads and gives the same losses
# make kernels     compile the fused kernels with nvcc, print their registers, fail on spills
# make test | test-all | lint | clean
# make test WORKERS=1          pytest processes; two where there are two cores
#

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
RANKS ?= $(shell test "$$(getconf _NPROCESSORS_ONLN 2>/dev/null)" -ge 2 2>/dev/null && echo 2 || echo 1)
WORKERS ?= $(RANKS)
TEST_TIMEOUT ?= 300
# a file's tests share what they build, so they stay in one process; ARGS comes last and wins
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --durations 10

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test

.PHONY: demo kernels test test-all lint clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	PET_NPROC_PER_NODE=$(RANKS) $(BIN)/torchrun examples/pretrain_byte_kd.sh $(if $(filter-out 0,$(FRESH)),--fresh) $(ARGS)
	$(if $(ARGS),,$(BIN)/python scripts/check_demo.py runs/tiny)

# needs nvcc and no package, so it runs before anything is installed
kernels:
	$(PYTHON) -m megabyte_distill.kernels build

test: $(INSTALLED_TEST)
	$(PYTEST) --timeout $(TEST_TIMEOUT) -m "not slow" $(ARGS)

test-all: $(INSTALLED_TEST)
	$(PYTEST) --timeout 3600 $(ARGS)

lint: $(INSTALLED_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./.git/*" -prune -exec rm -rf {} +

# torch first and alone, so that an index given in TORCH is not asked for the rest.
$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e .
	touch $@

$(INSTALLED_TEST): $(INSTALLED)
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@
