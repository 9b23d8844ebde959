# For newcomers: `make train`, `make test`. Everything stays inside this folder; no root needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN := examples/quickstart/run.toml

.PHONY: install train test lint test-slow test-gpu bench-gpu clean

install: $(READY)

$(READY): requirements.txt pyproject.toml setup.py $(wildcard csrc/*)
	@sh tools/install.sh $(PYTHON) $(VENV)
	@touch $@

train: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/quickstart/train.sh $(RUN)

# Tests that neither time anything nor share a port run in parallel with the others, at lower priority (nice). Both
# groups run to their ends.
BESIDE := $(addprefix tests/,config convert data evaluate fuzz model ops recipe report scaling)
QUICK := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu"

test: lint
	@nice env $(QUICK) $(BESIDE) >.beside.log 2>&1 & \
	$(QUICK) $(BESIDE:%=--ignore=%); main=$$?; \
	wait $$!; beside=$$?; cat .beside.log; exit $$((main | beside))

lint: $(READY)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy

test-slow: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu"

# These two run under the system's own python and torch, without network, to test its CUDA build.
test-gpu:
	@$(PYTHON) -m pytest -m gpu tests/gpu

TRAINING := PYTHONPATH=. $(PYTHON) tools/benchmark_training.py --device cuda --dtype bfloat16 --vocabulary 32768 --turns 5

# 1B with the baseline; then 1B, 3B and 7B, which leave no memory for the baseline. Takes minutes, mostly drawing
# weights.
bench-gpu:
	@PYTHONPATH=. $(PYTHON) tools/benchmark_norm.py
	@$(TRAINING) --shape 16x2048 --sequence 2048 --micro-batch 8 --profile
	@$(TRAINING) --shape 16x2048 28x3072 --sequence 8192 --micro-batch 1 --contestants megahp
	@$(TRAINING) --shape llama-2-7b --sequence 2048 --micro-batch 1 --contestants megahp

clean:
	rm -rf $(VENV) build *.egg-info megahp/*.so
