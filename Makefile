# Every target does its own set-up: a machine needs only Python 3.11 or later, make and git.

PYTHON ?= python3
BIN := .venv/bin
PIP_VERSION := 26.0
# Versions come from the lock; `make lock` writes it anew.
# Twice quiet: errors alone. What setuptools warns of in every editable installation is nobody's concern.
PIP := $(BIN)/pip install --quiet --quiet --disable-pip-version-check
INSTALL := $(PIP) --constraint requirements.lock

.PHONY: setup serve test check bench lock format clean

setup: .venv/installed
serve: setup
	@exec $(BIN)/tenantry serve
test: .venv/test
	$(BIN)/python -m pytest -q $(ARGS)
check: .venv/check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/flake8-async --enable=ASYNC101,ASYNC102,ASYNC119,ASYNC122 $$(find supervisor agent -name '*.py')
bench: .venv/bench
	$(BIN)/python -m benchmarks $(ARGS)

.venv/installed: pyproject.toml requirements.lock
	@echo 'Setting up .venv; this is done once, and takes less than a minute.' >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) 'pip>=$(PIP_VERSION)'
	@$(INSTALL) --config-settings editable_mode=compat --editable .
	@touch $@
.venv/test .venv/check .venv/bench: .venv/%: .venv/installed
	@$(INSTALL) --group $*
	@touch $@
.venv/check: .venv/test

format: .venv/check
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .
lock:
	$(PYTHON) -m venv .venv/lock
	.venv/lock/bin/pip install --quiet uv
	.venv/lock/bin/uv pip compile --quiet --universal --upgrade --python-version 3.11 --group dev --no-annotate \
		--no-emit-index-url --custom-compile-command 'make lock' --output-file requirements.lock pyproject.toml
clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build *.egg-info
