# Everything runs in .venv, made from pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV := .venv
PEERS ?= .venv-peers
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup demo test types tests test-slow test-triton test-cluster test-remote faults test-peers page-test bench bench-peers docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) -e '.[demo,text,docs,dev]'
	touch $@

demo: setup
	$(BIN)/mechatlas demo --out runs/demo

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory -j 2 types tests

# Beside one another, since each leaves a core idle for some time.
types:
	$(BIN)/pyright

tests:
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-slow: setup
	MECHATLAS_CHECK_ALL=1 $(BIN)/pytest -m slow

# Kernels for GPUs, run by Triton's interpreter on the CPU.
test-triton: setup
	$(PIP) -e '.[gpu]'
	TRITON_INTERPRET=1 $(BIN)/pytest -m triton tests/dictionaries

# Pieces of work on a Ray cluster of two workers, started here.
test-cluster: setup
	$(PIP) -e '.[ray]'
	$(BIN)/pytest -m 'cluster or not slow' tests/app/test_engines.py tests/app/test_cluster.py

# Kills, damage, full disks, two writers, hostile files: over an hour on a busy core; `faults.md` has the table.
faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

# Folders in an object store: moto's server of S3 on this machine.
test-remote: setup
	$(PIP) -e '.[remote]' 'moto[server]'
	$(BIN)/pytest tests/test_remote.py tests/test_remote_s3.py

# The libraries whose files we read, in an environment of their own.
$(PEERS)/.ready: tools/make_peers.sh
	tools/make_peers.sh $(PEERS)

test-peers: setup $(PEERS)/.ready
	MECHATLAS_PEERS=$(abspath $(PEERS)) $(BIN)/pytest -m peers

bench-peers: setup $(PEERS)/.ready
	$(BIN)/python benchmarks/compare_training.py --peers $(PEERS)

# Needs Chromium or Chrome on PATH, such as Debian's package `chromium`.
page-test: setup
	$(BIN)/pytest -m page

bench: setup
	$(BIN)/pytest benchmarks -o python_files='bench_*.py' --benchmark-only -m ''

docs: setup
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site dist
