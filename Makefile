# The commands of the README. Each makes .venv, with the versions of constraints.txt, and builds what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt ce_fast/_kernels.pyx $(wildcard ce_fast/csrc/*)

.PHONY: demo test test-long bench accuracy lint clean

demo: $(VENV)/installed
	$(BIN)/python -m ce_fast.demo

test: export CE_FAST_REQUIRE_EXT = 1
test: $(VENV)/installed
	$(BIN)/python -m pytest

# every option with every other, in 100,000 random combinations
test-long: $(VENV)/installed
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests/test_losses.py -k options_combined

# the ratio table and the plot, here and in the README, then the asv suite on this checkout
bench: $(VENV)/installed
	$(BIN)/python -m ce_fast.bench --readme README.md --json docs/bench.json --plot docs/bench.svg
	cd asv_bench && ../$(BIN)/asv machine --yes && ../$(BIN)/asv run --python=same --show-stderr

# errors in ulp against mpmath, ours and torch's
accuracy: $(VENV)/installed
	$(BIN)/python tests/accuracy.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cython-lint ce_fast/_kernels.pyx  # it calls pycodestyle
	$(BIN)/mypy

$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -U pip setuptools wheel cython numpy
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[test,bench,lint]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info ce_fast/_kernels.c ce_fast/*.so
