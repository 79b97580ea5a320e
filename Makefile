# Every target sets itself up: a virtual environment with pinned versions, made once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
REFERENCE := .venv-reference
MERGEKIT := .venv-mergekit

.PHONY: help setup demo test test-all lint format bench bench-download bench-convert bench-release reference mergekit clean

help:
	@echo "make demo      recover a small model from a delta, start to verified result"
	@echo "make test      lint, types and the test suite (under 10 minutes)"
	@echo "make test-all  the slow tests too (gigabytes of disk)"
	@echo "make bench-download  the part of it that needs nginx, curl and aria2c"
	@echo "make bench-convert   and the part about convert"
	@echo "make bench-release   and the part about merge-lora, cast, shard, check and recipes"
	@echo "make reference       transformers 4.47.1 in an environment of its own, which test-all and bench-convert use"
	@echo "make mergekit        mergekit likewise, which bench-release measures beside ours"
	@echo "make bench     speed and memory against cp; SIZES=1b,3b"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

setup: $(READY)

demo: $(READY)
	$(BIN)/python benchmarks/demo.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/python -m pytest -n 2

$(REFERENCE)/.ready:
	$(PYTHON) -m venv $(REFERENCE)
	$(REFERENCE)/bin/python -m pip install --quiet torch==2.13.0
	$(REFERENCE)/bin/python -m pip install --quiet accelerate 'numpy<2.5' sentencepiece transformers==4.47.1
	touch $@

reference: $(REFERENCE)/.ready

test-all: lint reference
	$(BIN)/python -m pytest -m "slow or not slow"

$(MERGEKIT)/.ready:
	$(PYTHON) -m venv $(MERGEKIT)
	$(MERGEKIT)/bin/python -m pip install --quiet torch==2.13.0
	$(MERGEKIT)/bin/python -m pip install --quiet mergekit==0.1.5
	touch $@

mergekit: $(MERGEKIT)/.ready

bench: $(READY)
	$(BIN)/python benchmarks/bench.py --sizes $(or $(SIZES),1b,3b) --keep
	$(BIN)/python benchmarks/download.py
	$(BIN)/python benchmarks/convert.py --sizes $(or $(SIZES),1b,3b)
	$(BIN)/python benchmarks/release.py --sizes $(or $(SIZES),1b,3b)
	$(BIN)/python benchmarks/memory.py

bench-download: $(READY)
	$(BIN)/python benchmarks/download.py

bench-convert: $(READY) reference
	$(BIN)/python benchmarks/convert.py --sizes $(or $(SIZES),1b,3b)

bench-release: $(READY) mergekit
	$(BIN)/python benchmarks/release.py --sizes $(or $(SIZES),1b,3b)

clean:
	rm -rf $(VENV) $(REFERENCE) $(MERGEKIT) build dist
