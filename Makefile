# `make run` leads from a fresh clone to a chat with an expert; `make test` runs the whole test suite; `make check` is the
# one command to remember before a commit.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready
TOOLS := $(VENV)/.tools
unexport PYTHONDONTWRITEBYTECODE

# Not in the lock: torch, whose right build depends on the machine, and what only torch needs.
UNLOCKED := torch triton mpmath networkx sympy cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cccl \
	nvidia-cuda-cupti nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile \
	nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 \
	nvidia-nvtx

.PHONY: run test test-quick fuzz check docs bench house setup lock clean

run: $(READY)
	@$(BIN)/deepseek run

# Each worker takes whole files, so that what a file sets up is made once, in the order that `conftest.py` puts them in.
# A worker that crashes ends the run: without its files, the others would wait for ever. Threads that wait yield their
# processor.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile \
	--no-loadscope-reorder --max-worker-restart 0

test: $(TOOLS)
	$(PYTEST)

# The essential third: the model, its experts and packs, the engine, data, and the rules of the code base.
test-quick: $(TOOLS)
	$(PYTEST) -m "not slow" tests/checkpoint tests/data tests/engine tests/model tests/packs tests/retrieval tests/text \
		tests/test_*.py

# Random input for every reader of untrusted files and requests: SECONDS for each target, or for TARGET alone.
SECONDS ?= 60
fuzz: $(TOOLS)
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(BIN)/python -m fuzz.run --seconds $(SECONDS) $(addprefix --target ,$(TARGET))

check: $(TOOLS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)
	$(MAKE) docs

# The site, into build/site; a broken link, anchor or docstring is an error.
docs: $(TOOLS)
	$(BIN)/python -m mkdocs build --quiet

# The benchmarks of all claims whose results are missing or stale, for hours; an interrupted run is resumed.
bench: $(TOOLS)
	$(BIN)/deepseek claims run all

# The packages and their imports, as a table and a picture in the docs.
house: $(TOOLS)
	$(BIN)/python benchmarks/house.py

setup: $(TOOLS)

# torch first, as a range, so that the build that pip's configuration offers is taken; then everything else, pinned and
# hash-checked; then the project itself. Bytecode is made of what is imported: of all there is, it would take a minute.
$(READY): pyproject.toml requirements/run.lock
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile "torch>=2.11"
	$(PIP) install --quiet --no-compile --no-deps --require-hashes --requirement requirements/run.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# What tests, benchmarks and pages need on top, such as the other ends that the product is checked against.
$(TOOLS): $(READY) requirements/dev.lock
	$(PIP) install --quiet --no-compile --no-deps --require-hashes --requirement requirements/dev.lock
	@touch $@

COMPILE := uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock" $(addprefix --no-emit-package ,$(UNLOCKED))

lock:
	$(COMPILE) --extra dev --extra docs --output-file requirements/dev.lock
	$(COMPILE) --extra build --constraints requirements/dev.lock --output-file requirements/run.lock

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
