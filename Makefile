# Two commands on a machine with make and Python 3.11 or newer: `make bench` and `make test`.
# Both set up .venv in this folder first, with a regular (not editable) install of the wheel built from it.

PYTHON ?= python3
VENV ?= .venv
# how many processes run the tests: a number, or auto for one per processor
JOBS ?= auto
# of make fuzz: 100,000 take some 40 minutes
CASES ?= 10000
RECORD ?= $(VENV)/fuzz.json
# more for pytest, such as: make test ARGS="-k softmax -x"
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help bench test fuzz cuda-all lint format docs smoke gpu-check env clean

python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check --quiet
# directories are listed too: a file that goes away changes the time of its directory
sources := pyproject.toml README.md LICENSE \
	$(shell find src kernels backends benchmarks \( -name __pycache__ -o -name '*.egg-info' \) -prune -o \( -type d -o -name '*.py' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp' -o -name py.typed \) -print)
wheel = $$(echo $(VENV)/wheel/xpnn-*.whl)

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  JOBS=$(JOBS)  ARGS=$(ARGS)"

bench: $(VENV)/bench  ## what runs here and how fast, beside what else is installed; a page with charts
	$(VENV)/bin/xpnn info
	$(VENV)/bin/xpnn bench --peers --html $(VENV)/bench.html $(ARGS)

test: $(VENV)/tests  ## the whole suite, and the doctests of the installed package
	$(python) -m pytest -n $(JOBS) --doctest-modules --doctest-ignore-import-errors $(ARGS) tests --pyargs xpnn --ignore-glob='*/xpnn/benchmarks/test_*.py'

fuzz: $(VENV)/tests  ## CASES calls that Hypothesis thinks of, others each time; what was done goes to RECORD
	FUZZ_CASES=$(CASES) FUZZ_RECORD=$(RECORD) $(python) -m pytest $(ARGS) tests/test_fuzz.py

cuda-all: $(VENV)/tests  ## every CUDA kernel compiled for every architecture: some ten minutes
	$(python) -m pytest -n $(JOBS) $(ARGS) tests/test_cuda_compile.py -m slow

lint: $(VENV)/lint  ## ruff on the sources, mypy on the installed package
	@status=0; set -x; \
	$(python) -m ruff check . || status=1; \
	$(python) -m ruff format --check . || status=1; \
	$(python) -m mypy -p xpnn || status=1; \
	exit $$status

format: $(VENV)/lint  ## let ruff format the sources and repair what it can
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

docs: $(VENV)/docs  ## the documentation as a site: every kernel with the code it became, the Python names, all guides
	$(python) -m sphinx --fail-on-warning --keep-going --fresh-env --quiet --doctree-dir $(VENV)/doctrees docs $(VENV)/site
	@echo "the site: $(abspath $(VENV)/site/index.html)"

smoke: $(VENV)/wheel/built  ## the wheel in an empty environment, used from this folder and from elsewhere
	@set -eu; root=$$PWD; there=$$(mktemp -d); trap 'rm -rf "$$there"' EXIT; \
	$(PYTHON) -m venv "$$there/v"; bin="$$there/v/bin"; \
	"$$bin/python" -m pip --disable-pip-version-check --quiet install $(wheel); \
	"$$bin/python" -B -c 'import xpnn.kernels, xpnn; assert "site-packages" in xpnn.kernels.__file__, xpnn.kernels.__file__'; \
	cd "$$there"; export XPNN_CACHE_DIR="$$there/cache"; \
	"$$bin/python" -c 'import numpy as np, xpnn; y = xpnn.softmax(np.ones((2, 4), "float32")); assert (y == 0.25).all(), y; print(xpnn.softmax.explain(y), y[0])'; \
	"$$bin/xpnn" info; \
	"$$bin/python" -m pip --disable-pip-version-check check

gpu-check:  ## on a machine with a GPU: are the CUDA kernels right, and how fast
	@if $(PYTHON) -c 'import cupy' 2>/dev/null; then set -x; $(PYTHON) benchmarks/gpu_check.py $(ARGS); else \
	$(MAKE) $(VENV)/installed && set -x && $(python) benchmarks/gpu_check.py $(ARGS); fi

env: $(VENV)/tests $(VENV)/lint $(VENV)/docs  ## everything that the other targets install

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) docs/reference build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# --- what is built ----------------------------------------------------------------------------------------------------

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# setuptools keeps what it once copied to build/: a module deleted since would still be in the wheel
$(VENV)/wheel/built: $(sources) $(VENV)/created
	@rm -rf build *.egg-info $(VENV)/wheel
	$(pip) wheel --no-deps --wheel-dir $(VENV)/wheel .
	@rm -rf build *.egg-info
	@touch $@

$(VENV)/installed: $(VENV)/wheel/built
	$(pip) install --force-reinstall --no-deps $(wheel)
	$(pip) install $(wheel)
	@touch $@

$(VENV)/bench: $(VENV)/installed
	$(pip) install "$(wheel)[bench]"
	@touch $@

$(VENV)/tests: $(VENV)/installed
	$(pip) install "$(wheel)[test]"
	@# half a gigabyte, and not for every platform: without it the suite says that CUDA kernels were not looked at
	$(pip) install "$(wheel)[cuda-check]" || echo "CuPy is not installed: CUDA kernels will not be checked"
	@touch $@

$(VENV)/lint: $(VENV)/installed
	$(pip) install "$(wheel)[lint]"
	@touch $@

$(VENV)/docs: $(VENV)/installed
	$(pip) install "$(wheel)[docs]"
	@touch $@
