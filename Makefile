# For newcomers: `make train`, `make test`. Everything stays inside this folder; no root needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN := examples/quickstart/run.toml

.PHONY: install train test lint test-slow gpu-check clean

install: $(READY)

$(READY): requirements.txt pyproject.toml setup.py $(wildcard csrc/*)
	@sh tools/install.sh $(PYTHON) $(VENV)
	@touch $@

train: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/quickstart/train.sh $(RUN)

# Tests that neither time anything nor share a port run in parallel with the others, at lower priority (nice). Both
# groups run to their ends.
BESIDE := $(addprefix tests/,test_gpu_check.py config convert cuda data diagnose evaluate fuzz model ops parallel plan recipe report scaling series)
QUICK := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu"

test: lint
	@nice env $(QUICK) $(BESIDE) >.beside.log 2>&1 & \
	$(QUICK) $(BESIDE:%=--ignore=%); main=$$?; \
	wait $$!; beside=$$?; cat .beside.log; exit $$((main | beside))

lint: $(READY)
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check --quiet
	@$(BIN)/python -m mypy

test-slow: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu"

# Under the system's own python and its CUDA torch, without network; the results in $OUT, or gpu-check (docs/gpu.md).
gpu-check:
	@$(PYTHON) tools/gpu_check.py --out $${OUT:-gpu-check}

clean:
	rm -rf $(VENV) build *.egg-info megahp/*.so
