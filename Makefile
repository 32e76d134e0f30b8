# `make demo` and `make test` do their own set-up into .venv; everything else builds on the same.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cat pyproject.toml constraints.txt Makefile | cksum | cut -d' ' -f1)
# The two cores of a small machine serve two test workers best, one torch thread each.
WORKERS ?= auto
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-slow check format clean help

help: ## Say what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(READY) ## Install the toolkit with every extra into .venv

$(READY):
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "expected Python 3.11 or newer, got %s; run make PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps crypten==0.4.1
	@rm -f $(VENV)/.ready-*
	@touch $@

demo: $(READY) ## Train, attack, protect and draw the picture: runs/demo/report.html
	$(BIN)/splitlearn run tradeoff --out runs/demo

test: $(READY) ## Run the tests
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

test-slow: $(READY) ## Run the tests that take longer
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

check: $(READY) ## Format check, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## Format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove what was made (not runs/)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
