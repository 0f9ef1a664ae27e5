# make check       lint, types and the tests that are short and start no process: for the edit loop, 2 minutes
# make test        all tests that need no GPU
# make test-gpu    the tests that need one
# make bench       speed and memory
# make quickstart  data, training, evaluation and a page, in some minutes on a CPU
#
# Everything lives in the clone: the environment in .venv, runs in runs/.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Matplotlib would keep its list of fonts in the home folder.
export MPLCONFIGDIR := $(CURDIR)/.venv/matplotlib

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup quickstart check check-tests test test-gpu lint types bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# Photographs -> shards -> distilled student -> a dense score (a linear probe), and a page to look at:
# runs/quickstart/page/index.html
quickstart: setup
	$(BIN)/python -m data.photographs runs/quickstart-data
	$(BIN)/python -m data.write_shards runs/quickstart-data/photographs runs/quickstart-data/train
	$(BIN)/deepspeed --module distill.train_student recipes/quickstart.yaml
	$(BIN)/python -m distill.evaluate recipes/evaluation/quickstart.yaml
	$(BIN)/python -m distill.evaluate recipes/quickstart.yaml

# The GPU's kernels are tested under Triton's interpreter, a large package that nothing else needs.
.venv/.kernels: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[kernels]'
	touch $@

# Types and tests at the same time: mypy takes most of a minute where it has no cache yet.
check:
	$(MAKE) lint
	$(MAKE) --jobs types check-tests

check-tests: setup
	$(PYTEST) --quiet -m "not process and not long"

test: setup .venv/.kernels
	$(PYTEST)

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
