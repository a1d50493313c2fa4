# Needs python3.11 or newer, and the network for the package index. Everything goes into .venv.
# The first that runs and is new enough: a name on PATH may be a shim with nothing behind it.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
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
	@test -n "$(PYTHON)" || { echo "sglang-fl needs Python 3.11 or newer, and found none; set PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv

.venv/ready: .venv/bin/uv pyproject.toml
	@echo "Installing SGLang and sglang-fl into .venv (10 GB; minutes the first time)"
	@$(BIN)/uv pip install -q --python $(BIN)/python -e .
	@touch $@

.venv/ready-test: .venv/ready
	@$(BIN)/uv pip install -q --python $(BIN)/python -e '.[test]'
	@# Its schemas are read by tests. Away from where Python imports from: PyTorch would load it by itself.
	-@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --target .venv/torch_npu torch-npu==2.14.0
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
