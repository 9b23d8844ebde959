# Everything a newcomer needs: `make train`, `make test`. All of it stays inside this folder; no root needed.
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

test: lint
	@$(BIN)/python -m pytest -m "not slow and not gpu"

lint: $(READY)
	@$(BIN)/ruff check
	@$(BIN)/mypy

test-slow: $(READY)
	@$(BIN)/python -m pytest -m "slow and not gpu"

# These two run under the system's own python and torch, without network: its CUDA build is the one to test.
test-gpu:
	@$(PYTHON) -m pytest -m gpu tests/gpu

bench-gpu:
	@PYTHONPATH=. $(PYTHON) tools/benchmark_norm.py

clean:
	rm -rf $(VENV) build *.egg-info megahp/*.so
