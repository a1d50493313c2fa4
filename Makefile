# Needs python3.11 or newer, and the network for the package index.
# The first that runs and is new enough: a name on PATH may be a shim with nothing behind it.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Everything is installed here, with an SGLang of the range that sglang_fl/compat.py calls tested.
VENV := .venv
SGLANG := sglang>=0.5.23,<0.5.24
BIN := $(VENV)/bin
# Python keeps what it compiles, whatever the shell says: otherwise each process compiles SGLang and PyTorch again.
export PYTHONDONTWRITEBYTECODE :=
INSTALL = $(BIN)/uv pip install -q --python $(BIN)/python

.PHONY: demo test test-slow test-gpu test-check-grid test-sglang lint dist clean

demo: $(VENV)/ready
	@$(BIN)/sglang-fl demo $(ARGS)

# Two at a time: the end-to-end tests one after the other, and beside them the rest.
test: $(VENV)/ready-test
	@$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

# Every kind of planted mistake on every operator, and the case of a quick check that catches it, as JSON.
test-check-grid: $(VENV)/ready-test
	@PYTHONPATH=tests $(BIN)/python tests/check/mistakes.py

# The engines that CI has no time for.
test-slow: $(VENV)/ready-test
	@$(BIN)/python -m pytest -m slow $(ARGS)

# Six at a time, on all GPUs that are visible; one after the other they took seven times as long. ARGS='-n 2' is for a small GPU.
test-gpu: $(VENV)/ready-test
	@$(BIN)/python -m pytest -m gpu -n 6 --dist loadscope --no-loadscope-reorder $(ARGS)

# Another release of SGLang, in an environment of its own: make test-sglang VERSION=0.5.22
test-sglang:
	@test -n "$(VERSION)" || { echo "which release of SGLang? make test-sglang VERSION=0.5.22" >&2; exit 1; }
	@$(MAKE) --no-print-directory VENV=.venv-sglang-$(VERSION) SGLANG=sglang==$(VERSION) \
		ARGS="tests/test_compat.py tests/e2e/test_incompatible_sglang.py tests/e2e/test_demo.py::test_the_demo_recites_and_cleans_up" test

lint: $(VENV)/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel and the sdist, in dist/.
dist: $(BIN)/uv
	@$(INSTALL) build
	@rm -rf build dist
	@$(BIN)/python -m build

$(BIN)/uv:
	@test -n "$(PYTHON)" || { echo "sglang-fl needs Python 3.11 or newer, and found none; set PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv

$(VENV)/ready: $(BIN)/uv pyproject.toml
	@echo "Installing SGLang and sglang-fl into $(VENV) (10 GB; minutes the first time)"
	@$(INSTALL) -e . '$(SGLANG)'
	@touch $@

$(VENV)/ready-test: $(VENV)/ready
	@$(INSTALL) -e '.[test]' '$(SGLANG)'
	@# Its schemas are read by tests. Away from where Python imports from: PyTorch would load it by itself.
	-@$(INSTALL) --no-deps --target $(VENV)/torch_npu torch-npu==2.14.0
	@touch $@

clean:
	rm -rf .venv .venv-sglang-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
