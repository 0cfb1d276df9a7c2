# Set up, build and run.  Needs Python >= 3.10, a C++ compiler and make; everything else comes as wheels.

PYTHON ?= python3
DEMO_INSTANCES ?= fwd_bf16_d128_causal
TEST_INSTANCES ?= full
N ?= 1000
SEED ?= 0
BIN := .venv/bin
TRAIN := OMP_NUM_THREADS=1 $(BIN)/python examples/train_gpt.py --device cpu

# Where there is no GPU a pinned torch: its CPU wheel is small, the newest brings gigabytes of CUDA.
TORCH := $(shell nvidia-smi >/dev/null 2>&1 && echo "torch>=2.11" || echo "torch==2.13.0")

# What the extension is built from.  The Python package is installed editable: it needs no rebuild.
SOURCES := CMakeLists.txt pyproject.toml $(shell find cmake hopper cute_kernels python/aot \
             python/bindings -type f -not -path '*/__pycache__/*')

# A build for the tests serves the demo as well, and is not shrunk to the demo's instances.
DEMO_BUILD := $(if $(wildcard .venv/built-for-test),.venv/built-for-test,.venv/built-for-demo)

.PHONY: demo train test fuzz zoo bench lint clean

demo: $(DEMO_BUILD)
	$(BIN)/hopper-attention demo

# Neither of the two runs a kernel: they need the package, whichever instances it has.  One thread
# each: two are a third quicker alone and several times slower beside other work, as they wait busily.
train: $(DEMO_BUILD)
	$(TRAIN) --attention reference --json build/train/reference.jsonl
	$(TRAIN) --attention sdpa --json build/train/sdpa.jsonl \
	  --compare build/train/reference.jsonl --plot docs/images/train_loss.png

# One thread for each of the two processes: with more they wait for one another, a tenth longer.
test: .venv/built-for-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Random problems with gradients, on the simulator against FP64: N of them, others for every SEED;
# and deterministic backward of every instance, in every way of grouping heads and packing.
fuzz: .venv/built-for-test
	HOPPER_ATTENTION_FUZZ=$(N) HOPPER_ATTENTION_FUZZ_SEED=$(SEED) OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -n 2 --dist worksteal -k "random_problems or around_the_tile" \
	  tests/simulator/test_random_problems.py tests/simulator/test_backward.py

# Every model class of transformers against eager attention, or refused; no kernel is needed.
zoo: $(DEMO_BUILD)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m zoo --processes 2 \
	  --json build/zoo.jsonl --table docs/transformers.md

# What can be measured without a GPU; with one: hopper-attention bench.
bench: .venv/built-for-test
	$(BIN)/hopper-attention sass --budget benchmarks/sass_budget.json
	$(BIN)/hopper-attention bench overhead

lint: .venv/dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/dependencies: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install "$(TORCH)" numpy rich --group build --group dev
	touch $@

.venv/built-for-demo: INSTANCES = $(DEMO_INSTANCES)
.venv/built-for-test: INSTANCES = $(TEST_INSTANCES)
.venv/built-for-demo .venv/built-for-test: .venv/dependencies $(SOURCES)
	HOPPER_ATTENTION_INSTANCES="$(INSTANCES)" \
	  $(BIN)/pip install --verbose --no-build-isolation --no-deps --editable .
	touch $@
