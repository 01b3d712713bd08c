# `make` alone explains itself. Every target creates .venv first if it is not there.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# Without an NVIDIA GPU the CPU build of PyTorch, pinned; with one, any PyTorch and Triton that the kernels support.
ifeq ($(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes),yes)
TORCH ?= torch>=2.11 triton>=3.6
else
TORCH ?= torch==2.13.0 triton==3.9.0
endif

.PHONY: help demo bench microbench test lint format static clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

$(BIN)/.installed: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/simd/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip setuptools wheel
	$(BIN)/pip install -q $(foreach package,$(TORCH),'$(package)') 'numpy<2.4'
	$(BIN)/pip install -q --no-build-isolation -e '.[dev]'
	@touch $@

demo: $(BIN)/.installed ## Train a small GPT with and without μMoE MLPs, print the table, write report.html
	$(BIN)/mumoe demo

bench: $(BIN)/.installed ## Run the quick benchmark suite, print the table, write runs/bench/report.html
	$(BIN)/mumoe bench

microbench: $(BIN)/.installed ## Time kernels and layers with pytest-benchmark and save the run in .benchmarks
	$(BIN)/python -m pytest tests/microbench -q -o python_files='bench_*.py' --benchmark-autosave

test: $(BIN)/.installed ## Run the tests
	$(BIN)/python -m pytest -n auto -q -m 'not slow'

lint: $(BIN)/.installed ## Lint, formatting, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(BIN)/.installed ## Rewrite the formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

static: $(BIN)/.installed ## Compile every kernel for four GPU generations and check what came out
	$(BIN)/python -m mumoe_fast.bench static

clean: ## Remove the environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
