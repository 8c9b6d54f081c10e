# `make` lists the targets. Another interpreter, with environments of its own: make test PYTHON=python3.12

ifdef PYTHON
VERSION := -$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
else
PYTHON := $(or $(shell for p in python3 python3.13 python3.12 python3.11; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; \
    done),python3)
endif

CONSTRAINTS := constraints.txt
PIP_INSTALL := -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)
SOURCES := $(shell find lotrtensor -type f -not -path '*/__pycache__/*')
DEMO := .venv$(VERSION)
TEST := .venv-test$(VERSION)
OLDEST := .venv-oldest
BIN := $(TEST)/bin

stage = @printf '\n== %s\n' '$(1)'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test pytest test-deep test-oldest coverage fuzz faults lint notebooks docs bench evidence peft-matrix clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s  %s\n", $$1, $$2 }' Makefile

demo: $(DEMO)/installed ## Install the base package into .venv and convert the bundled adapter
	$(call stage,lotr demo)
	@$(DEMO)/bin/lotr demo

# Beside one another: a notebook that trains runs for a minute on one core.
test: lint ## Run every check: linters, then tests and doctests beside notebooks and documentation
	@$(MAKE) --no-print-directory -j 2 pytest docs

pytest: $(TEST)/installed
	$(call stage,pytest)
	@$(BIN)/python -m pytest -n 2

# Properties alone, far more cases each, from a seed that is new every time.
SEED := $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
test-deep: $(TEST)/installed ## Look for new cases that break a property; repeat a run with SEED=
	$(call stage,properties; to repeat this run: make test-deep SEED=$(SEED))
	@HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -n 2 -m hypothesis --hypothesis-seed=$(SEED)

# A case has a number, which repeats it; the same numbers are the same cases.
RUNS := 1000000
fuzz: $(TEST)/installed ## Read a million changed files (RUNS=), and write the counts into docs/fuzz.json
	@$(BIN)/python -m tests.fuzz --runs $(RUNS) --processes 2 --json docs/fuzz.json

faults: $(TEST)/installed ## Let every writing system call of commands that write fail once (needs strace)
	@$(BIN)/python -m tests.faults --json docs/faults.json

test-oldest: ## Run the tests with the lowest versions that pyproject.toml allows, on Python 3.11
	@$(MAKE) --no-print-directory $(OLDEST)/installed TEST=$(OLDEST) CONSTRAINTS=constraints-oldest.txt
	$(call stage,pytest with the lowest versions)
	@$(OLDEST)/bin/python -m pytest -n 2

# Of each package by itself; the exit code is that of the last.
coverage: $(TEST)/installed ## Run the tests and tell which branches of the code they take
	@$(BIN)/python $(PIP_INSTALL) -e '.[coverage]'
	@$(BIN)/python -m pytest -n 2 -q --cov --cov-report=
	@for package in core adapters verbs packs torch peft; do \
	    $(BIN)/python -m coverage report --format=total --precision=1 \
	        --include="lotrtensor/$$package/*" | sed "s/^/$$package /"; done
	@$(BIN)/python -m coverage report --fail-under=95 --skip-covered --sort=cover \
	    --include='lotrtensor/core/*,lotrtensor/adapters/*,lotrtensor/verbs/*'

docs: $(TEST)/installed ## Run the notebooks and pages, and build the documentation into docs/_build/html
	$(call stage,notebooks and documentation)
	@$(BIN)/python -m sphinx -q -W --keep-going -j 2 -d docs/_build/doctrees docs docs/_build/html
	@echo 'see docs/_build/html/index.html'

notebooks: $(TEST)/installed ## Strip the outputs of the notebooks, as they are kept in git
	@$(BIN)/nbstripout notebooks/*.ipynb

lint: $(TEST)/installed ## Check style, types and the direction of imports
	$(call stage,ruff check)
	@$(BIN)/ruff check .
	$(call stage,ruff format --check)
	@$(BIN)/ruff format --check .
	$(call stage,mypy)
	@$(BIN)/mypy
	$(call stage,import-linter)
	@$(BIN)/lint-imports

bench: $(TEST)/installed ## Measure speed and memory
	@$(BIN)/python -m tests.bench --json docs/bench.json

evidence: $(TEST)/installed ## Measure the tasks that the documentation reports on; fetches their data
	@$(BIN)/python examples/evidence.py
	@$(BIN)/python examples/finetune.py --out docs/finetune.json
	@$(BIN)/python examples/experts.py --out docs/experts.json
	@$(BIN)/python -m tests.evidence after

peft-matrix: $(TEST)/installed ## Run PEFT's own tests on LoTR; fetches them (docs/peft-matrix.md)
	@nice -n 10 $(BIN)/python -m tests.peft_matrix

clean: ## Remove all environments, caches and build products
	rm -rf .venv .venv-* build dist docs/_build docs/notebooks/*.ipynb docs/reference/cli.md
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# Tests load nothing from a model hub, and measure the same device everywhere.
pytest test-deep test-oldest coverage docs bench evidence: export HF_HUB_OFFLINE := 1
pytest test-deep test-oldest coverage docs bench evidence: export JAX_PLATFORMS := cpu
# JAX compiles every operation anew for every shape: quickly, rather than into quick code.
pytest test-deep coverage: export XLA_FLAGS := \
    --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false
# Processes with a thread each: threads of several would wait for one another.
pytest test-deep test-oldest coverage fuzz faults docs: export OMP_NUM_THREADS := 1

define create-venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
    echo 'lotrtensor needs Python 3.11 or newer, and "$(PYTHON)" is older or missing;' \
        'name another with: make PYTHON=/path/to/python' >&2; exit 1; }
@$(PYTHON) -m venv $(@D)
endef

# Installed as pip would give it to a user, so that the wheel's contents are what runs.
$(DEMO)/installed: pyproject.toml $(CONSTRAINTS) $(SOURCES)
	$(call stage,install the base package into $(DEMO))
	$(create-venv)
	@$(DEMO)/bin/python $(PIP_INSTALL) .
	@touch $@

# Editable: only a change of the requirements installs anew. PyTorch comes first and by its exact
# version, so that no range of another package picks a different build.
$(TEST)/installed: pyproject.toml $(CONSTRAINTS)
	$(call stage,install the package, its test and docs extras into $(TEST) (several minutes when new))
	$(create-venv)
	@$(BIN)/python $(PIP_INSTALL) $$(grep '^torch==' $(CONSTRAINTS))
	@$(BIN)/python $(PIP_INSTALL) -e '.[test,docs]'
	@touch $@
