PYTHON ?= python3
BIN := .venv/bin
# TensorFlow's start-up chatter hides what a user looks for.
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test torture check install clean

# The smallest real run: digits at a batch of 7.67 % of the training set (96k on ImageNet), ConAdv.
demo: .venv/installed
	$(BIN)/python train.py

test: .venv/installed-dev
	$(BIN)/python -m pytest

# Everything that `make test` runs a share of: mutated recipes, corrupted files.
torture: .venv/installed-dev
	CONADV_TORTURE=1 $(BIN)/python -m pytest tests/test_fuzz_config.py tests/test_fuzz_data.py

# Style and types.
check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
