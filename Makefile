# Every target sets itself up: a virtual environment with pinned versions, made once.
# The first of these that is there and new enough: the versions that tests run with come first.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
REFERENCE := .venv-reference
MERGEKIT := .venv-mergekit
GPTQMODEL := .venv-gptqmodel
AUTOGPTQ := .venv-autogptq
LLAMACPP := .venv-llamacpp
FORMATS := .venv-formats
FORMATSOLD := .venv-formats-old
BUCKETS := .venv-buckets
DOCS := .venv-docs
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A new environment. Arguments: its folder, and how long it takes and how large it is.
define new
@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
  echo "weightops needs Python 3.11 or newer, and $(or $(PYTHON),nothing on the PATH) is none: name one, as in make PYTHON=/path/to/python3"; exit 1; }
@echo "setting up $(1) ($(2))"
@$(PYTHON) -m venv $(1)
endef

# Debian's packages, installed if a program of theirs is missing and we may.
define debian
command -v $(1) > /dev/null || apt-get install --yes --quiet --no-install-recommends $(2)
endef

.PHONY: help setup demo docs test test-all lint format bench bench-processor bench-download bench-buckets bench-convert bench-gguf bench-surgery bench-release bench-sign bench-compare bench-adapters bench-deltas bench-jobs bench-scale bench-merge bench-quality bench-quantize bench-inference reference \
  mergekit gptqmodel autogptq llamacpp formats slurm ceph mutants gpu clean

help:
	@echo "make demo      recover a small model from a delta, quantise another, start to verified result"
	@echo "make test      lint, types and the test suite (five minutes on two cores)"
	@echo "make test-all  the slow tests too (gigabytes of disk)"
	@echo "make docs      the documentation as a site that needs no network, in build/site"
	@echo "make mutants   what the tests notice of 200 small changes to the code (under two hours; continues when killed)"
	@echo "make bench-download  the part of it that needs nginx, curl and aria2c"
	@echo "make bench-buckets   and the part about buckets, beside boto3 and obstore"
	@echo "make bench-convert   and the part about convert"
	@echo "make bench-gguf      and the part about GGUF files in and out, and the memory of imatrix"
	@echo "make bench-surgery   and the part about parts, experts, layers and vocabularies"
	@echo "make bench-release   and the part about merge-lora, cast, shard, check and recipes"
	@echo "make bench-sign      and the part about signatures"
	@echo "make bench-jobs      and the part about jobs, by threads and by Dask"
	@echo "make bench-compare   and the part about compare"
	@echo "make bench-processor  seconds of wall and processor on a file system in memory"
	@echo "make reference       transformers 4.47.1 in an environment of its own, which test-all and bench-convert use"
	@echo "make bench-adapters  and the part about combining adapters"
	@echo "make bench-deltas    compressed deltas: sizes, rates, and recovering from them"
	@echo "make bench-scale     what jobs on 405B and 1T parameters take, by rates that are measured here"
	@echo "make bench-merge     and the part about merge, every method beside mergekit (an hour)"
	@echo "make mergekit        mergekit likewise, to which test-all holds merges, and which two benchmarks time"
	@echo "make bench-quantize  quantize beside gptqmodel, packing beside auto-gptq"
	@echo "make bench-inference  tokens per second and memory of quantised models, dequantised and packed"
	@echo "make bench-quality   what quantising costs the small model in perplexity"
	@echo "make gptqmodel       gptqmodel 7.7 and transformers with it, to which test-all holds quantised models"
	@echo "make autogptq        auto-gptq 0.7.1 likewise"
	@echo "make llamacpp        llama-cpp-python 0.3.36 and llama.cpp's converter likewise, to which test-all holds GGUF files, blocks and mixes (a C++ compiler)"
	@echo "make formats         the libraries of number formats likewise, to whose weights test-all holds those of dequantize"
	@echo "make slurm           jobs by Slurm itself, and"
	@echo "make ceph            buckets on Ceph's gateway: both install Debian's packages if they are missing"
	@echo "make gpu PYTHON=...  what only a GPU can tell, in eight minutes; installs nothing, uses the torch of that Python"
	@echo "make bench     speed and memory against cp; SIZES=1b,3b"

$(READY): pyproject.toml constraints.txt
	$(call new,$(VENV),about a minute and 1.3 GB)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m compileall -q weightops kernels
	@touch $(READY)

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
	$(BIN)/python -m pytest -n 3 --dist worksteal

$(VENV)/.mutants: $(READY)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt cosmic-ray coverage
	@touch $@

$(DOCS)/.ready: constraints.txt
	$(call new,$(DOCS),half a minute and 170 MB)
	@$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt mkdocs mkdocs-material
	@touch $@

# Its theme announces its successor at every build.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS)/.ready
	@$(DOCS)/bin/mkdocs build --strict
	@echo "open build/site/index.html"

mutants: $(VENV)/.mutants
	$(BIN)/python tests/mutation/run.py $(OPTIONS)

$(REFERENCE)/.ready:
	$(call new,$(REFERENCE),a few minutes and over 1 GB)
	@$(REFERENCE)/bin/python -m pip install --quiet torch==2.13.0
	@$(REFERENCE)/bin/python -m pip install --quiet accelerate 'numpy<2.5' sentencepiece transformers==4.47.1
	@touch $@

reference: $(REFERENCE)/.ready

slurm: $(READY)
	@$(call debian,slurmctld,slurm-wlm munge)
	$(BIN)/python -m pytest -m slow tests/oracles/test_slurm.py

ceph: $(READY)
	@$(call debian,radosgw,ceph-mon ceph-osd radosgw ceph-common)
	tests/oracles/ceph.sh $(BIN)/python -m pytest -n0 tests/contract/test_stores.py tests/contract/test_commands_on_buckets.py tests/engine/job/test_bucket_output.py

test-all: lint reference mergekit gptqmodel autogptq llamacpp formats
	$(BIN)/python -m pytest -m "slow or not slow"

$(MERGEKIT)/.ready:
	$(call new,$(MERGEKIT),a few minutes and over 1 GB)
	@$(MERGEKIT)/bin/python -m pip install --quiet torch==2.13.0
	@$(MERGEKIT)/bin/python -m pip install --quiet mergekit==0.1.5
	@touch $@

mergekit: $(MERGEKIT)/.ready

$(GPTQMODEL)/.ready:
	$(call new,$(GPTQMODEL),a few minutes and over 1 GB)
	@$(GPTQMODEL)/bin/python -m pip install --quiet torch==2.13.0
	@$(GPTQMODEL)/bin/python -m pip install --quiet numpy==2.4.6 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 \
	  'threadpoolctl>=3.7' packaging device-smi==0.5.7 protobuf pillow requests pypcre==0.6.4 tokenicer==0.0.14 \
	  logbar==0.4.15 jinja2 ninja dill defuser==0.0.28 sentencepiece
	@$(GPTQMODEL)/bin/python -m pip install --quiet --no-deps torchao==0.18.0 optimum==2.3.0 gptqmodel==7.7.0
	@touch $@

gptqmodel: $(GPTQMODEL)/.ready

$(AUTOGPTQ)/.ready:
	$(call new,$(AUTOGPTQ),a few minutes and over 1 GB)
	@$(AUTOGPTQ)/bin/python -m pip install --quiet torch==2.13.0
	@$(AUTOGPTQ)/bin/python -m pip install --quiet transformers==4.40.2 peft==0.10.0 accelerate==0.30.1 gekko rouge pandas \
	  sentencepiece 'setuptools<81' datasets
	@$(AUTOGPTQ)/bin/python -m pip install --quiet --no-deps auto-gptq==0.7.1
	@touch $@

autogptq: $(AUTOGPTQ)/.ready

$(LLAMACPP)/.ready:
	$(call new,$(LLAMACPP),a few minutes and over 1 GB)
	@$(LLAMACPP)/bin/python -m pip install --quiet torch==2.13.0
	@$(LLAMACPP)/bin/python -m pip install --quiet llama-cpp-python==0.3.36 transformers==5.23.0 sentencepiece protobuf pyyaml
	@$(LLAMACPP)/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(LLAMACPP) llama-cpp-python==0.3.36
	@tar -xzf $(LLAMACPP)/llama_cpp_python-0.3.36.tar.gz -C $(LLAMACPP) --strip-components=2 llama_cpp_python-0.3.36/vendor/llama.cpp
	@rm $(LLAMACPP)/llama_cpp_python-0.3.36.tar.gz
	@touch $@

llamacpp: $(LLAMACPP)/.ready

$(FORMATS)/.ready:
	$(call new,$(FORMATS),a few minutes and 2 GB)
	@$(FORMATS)/bin/python -m pip install --quiet torch==2.13.0
	@$(FORMATS)/bin/python -m pip install --quiet transformers==5.23.0 accelerate==1.15.0 compressed-tensors==0.20.0 \
	  bitsandbytes==0.50.2 torchao==0.18.0 optimum-quanto==0.2.7 mlx==0.32.4 mlx-cpu==0.32.4 ninja
	@$(FORMATS)/bin/python -m pip install --quiet nvidia-modelopt==0.47.0 scipy 'pulp<4' omegaconf requests
	@touch $@

$(FORMATSOLD)/.ready:
	$(call new,$(FORMATSOLD),a few minutes and over 1 GB)
	@$(FORMATSOLD)/bin/python -m pip install --quiet torch==2.13.0
	@$(FORMATSOLD)/bin/python -m pip install --quiet transformers==4.57.6 accelerate==1.15.0 compressed-tensors==0.12.2 \
	  hqq==0.2.8.post1
	@touch $@

formats: $(FORMATS)/.ready $(FORMATSOLD)/.ready

bench-processor: $(READY)
	$(BIN)/python benchmarks/processor.py $(OPTIONS)

bench: $(READY)
	$(BIN)/python benchmarks/bench.py --sizes $(or $(SIZES),1b,3b) --keep
	$(BIN)/python benchmarks/download.py
	$(BIN)/python benchmarks/convert.py --sizes $(or $(SIZES),1b,3b)
	$(BIN)/python benchmarks/release.py --sizes $(or $(SIZES),1b,3b)
	$(BIN)/python benchmarks/memory.py

bench-download: $(READY)
	$(BIN)/python benchmarks/download.py

$(BUCKETS)/.ready:
	$(call new,$(BUCKETS),seconds and 70 MB)
	@$(BUCKETS)/bin/python -m pip install --quiet boto3==1.44.8 obstore==0.12.1
	@touch $@

bench-buckets: $(READY) $(BUCKETS)/.ready
	$(BIN)/python benchmarks/buckets.py --others $(BUCKETS)/bin/python

bench-convert: $(READY) reference
	$(BIN)/python benchmarks/convert.py --sizes $(or $(SIZES),1b,3b)

bench-gguf: $(READY)
	$(BIN)/python benchmarks/gguf_files.py --size $(or $(SIZE),1b)

bench-surgery: $(READY)
	$(BIN)/python benchmarks/surgery.py --size $(or $(SIZE),3b)

bench-release: $(READY) mergekit
	$(BIN)/python benchmarks/release.py --sizes $(or $(SIZES),1b,3b)

bench-sign: $(READY)
	$(BIN)/python benchmarks/sign.py --size $(or $(SIZE),1b)

bench-compare: $(READY)
	$(BIN)/python benchmarks/compare.py --sizes $(or $(SIZES),1b,3b)

bench-adapters: $(READY)
	$(BIN)/python benchmarks/adapters.py

bench-deltas: $(READY)
	$(BIN)/python benchmarks/deltas.py

bench-jobs: $(READY)
	$(BIN)/python benchmarks/jobs.py

bench-scale: $(READY)
	$(BIN)/python benchmarks/scale.py

bench-merge: $(READY) mergekit
	$(BIN)/python benchmarks/merge.py

bench-formats: $(READY)
	$(BIN)/python benchmarks/number_formats.py

bench-quantize: $(READY) gptqmodel autogptq
	$(BIN)/python benchmarks/quantize.py
	$(BIN)/python benchmarks/packing.py

bench-inference: $(READY)
	$(BIN)/python benchmarks/inference.py

bench-quality: $(READY)
	$(BIN)/python benchmarks/quality.py

gpu:
	$(PYTHON) benchmarks/gpu.py $(OPTIONS)

clean:
	rm -rf $(VENV) $(REFERENCE) $(MERGEKIT) $(GPTQMODEL) $(AUTOGPTQ) $(LLAMACPP) $(FORMATS) $(FORMATSOLD) $(DOCS) build dist
