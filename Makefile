# make demo    build the digits network that is in the repository and run it on real images
# make test    the tests
# make bench   this project beside ONNX Runtime and OpenVINO, on this machine
# make bench-cuda  tests and times on this machine's NVIDIA GPU (needs nvcc)
# make records measure the tuning records that the package ships anew, for this processor (hours; RECORDS_ARGS)
# make lint    style
# A virtual environment is made in .venv; PYTHON chooses its interpreter.

PYTHON ?= python3
TEST_JOBS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
RECORDS_ARGS ?=
CUDA_ARCH ?= sm_90a

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test bench bench-cuda records lint clean tools
.DELETE_ON_ERROR:

demo: tools $(VENV)/.demo
	$(BIN)/python tutorials/demo.py

test: tools $(VENV)/.test
	$(BIN)/python -m pytest -n $(TEST_JOBS) --durations=15 $(PYTEST_ARGS)

bench: tools $(VENV)/.bench
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

bench-cuda: tools $(VENV)/.bench
	$(BIN)/python -m benchmarks.cuda_prepare build/cuda $(CUDA_ARCH)
	$(BIN)/python -m benchmarks.cuda build/cuda $(BENCH_ARGS)

records: tools $(VENV)/.bench $(VENV)/.tune
	$(BIN)/python -m benchmarks.records $(RECORDS_ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis

# One stamp per extra: pip runs again only when pyproject.toml changes.
$(VENV)/.%: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --editable ".[$*]"
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "bnntvm needs Python 3.10 or newer; $(PYTHON) is older or missing. Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip

# A compiled network is linked by the system's C compiler.
tools:
	@command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || \
	  { echo "no C compiler found. On Debian and Ubuntu: apt-get install gcc libc6-dev" >&2; exit 1; }
