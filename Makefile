# Needs python3.11 or newer, and the network for the package index. Everything goes into .venv.
PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test test-gpu lint clean

demo: .venv/ready
	@$(BIN)/sglang-fl demo $(ARGS)

test: .venv/ready-test
	@$(BIN)/python -m pytest $(ARGS)

test-gpu: .venv/ready-test
	@$(BIN)/python -m pytest -m gpu $(ARGS)

lint: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit("sglang-fl needs Python 3.11 or newer; this is " + sys.version) if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv

.venv/ready: .venv/bin/uv pyproject.toml
	@echo "Installing SGLang and sglang-fl into .venv (10 GB; minutes the first time)"
	@$(BIN)/uv pip install -q --python $(BIN)/python -e .
	@touch $@

.venv/ready-test: .venv/ready
	@$(BIN)/uv pip install -q --python $(BIN)/python -e '.[test]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
