# `make` lists the targets. Nothing but Python 3.11 or newer has to be there before `make install`.

SHELL := bash
PYTHON ?= python3
PIP_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

# Whatever the shell says: without bytecode every process compiles torch's thousand modules again, for ten seconds.
export PYTHONDONTWRITEBYTECODE :=

# One thread: many small tensors are no faster with two, and sums then always go in the same order.
# Several processes, a module of tests to each: modules share what they have trained. In order of names: by numbers of
# tests, as is the default, the longest modules come last, and one process runs them while the others wait.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install demo test test-full torture bench lint format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do \
		printf '  make %-10s %s\n' "$$target" "$$text"; done
	@echo
	@echo '  PYTHON=python3.12    which Python to install with (default: $(PYTHON))'
	@echo '  PIP_FLAGS="..."      more flags for pip; for torch without CUDA on Linux, several GB less:'
	@echo '                       PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"'
	@echo '  REFERENCE=PATH       a Python that has the package dnc, for make bench to compare with'
	@echo '  FAULTS="disk files"  what make torture is to do (default: everything)'
	@echo '  KFACRNN_DATA=DIR     the folder of the Penn Treebank (ptb.train.txt, ptb.valid.txt, ptb.test.txt)'

install: $(INSTALLED) ## make .venv with kfacrnn and everything it uses; at once when that has been done

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$($(PYTHON) --version 2>&1 | head -n 1); \
		echo "kfacrnn needs Python 3.11 or newer; $(PYTHON) says: $${found}. Try make install PYTHON=python3.12" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2; \
		exit 1; }
	@echo 'Installing into $(VENV): about two minutes.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile $(PIP_FLAGS) -c constraints.txt -e '.[experiments,wandb,torchtext,modern,dev]'
	@touch $@

demo: install ## train SGD and Adam on a short repeated copy, draw the comparison: a minute, no download
	$(BIN)/kfacrnn sweep smoke --results demo
	$(BIN)/kfacrnn figure smoke --results demo

test: lint ## lint, types, and every test that takes seconds
	$(PYTEST)

test-full: lint ## every test; the summary goes to results/test-full.txt
	@mkdir -p results
	set -o pipefail; { \
		$(BIN)/python -c 'from kfacrnn import provenance as p; print(p.now(), p.commit(), p.versions(), p.hardware(), sep="\n")'; \
		$(PYTEST) -m '' -rs --durations=10 --disable-warnings; \
	} 2>&1 | tee results/test-full.txt

torture: install ## kills, full disks, NaN, bad input, load: an hour or two; counts go to docs/reliability.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture $(FAULTS)

bench: install ## what an update costs, to results/bench: twenty minutes, on a machine that does nothing else
	$(BIN)/kfacrnn bench step-cost --task ptb_char --task ptb_word
	$(BIN)/kfacrnn bench step-cost --task repeat_copy --threads 1
	$(BIN)/kfacrnn bench lstm
	$(BIN)/kfacrnn bench dnc $(if $(REFERENCE),--reference-python $(REFERENCE))
	$(BIN)/kfacrnn bench memory

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches; results stay
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
