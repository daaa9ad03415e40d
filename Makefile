SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
# TensorFlow's start-up chatter hides what a user looks for.
export TF_CPP_MIN_LOG_LEVEL ?= 3
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Compiled once, when first imported: a start that compiles TensorFlow anew takes twice as long.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all torture check install lock clean

# The smallest real run: digits at a batch of 7.67 % of the training set (96k on ImageNet), ConAdv.
demo: .venv/installed
	$(BIN)/python train.py

test: .venv/installed-dev
	$(BIN)/python -m pytest

# Further minutes, for what only a whole run shows; the table in CONTRIBUTING.md names them.
test-all: test
	CONADV_LONG=1 $(BIN)/python -m pytest -m long

# Everything that `make test` runs a share of, mutated recipes, corrupted files and inputs of `fit`, then what
# it leaves out: runs that are killed, workers that are lost, a long run. The counts are in its summary.
torture: .venv/installed-dev
	CONADV_TORTURE=1 $(BIN)/python -m pytest -rfEsP tests/test_fuzz_config.py tests/test_fuzz_data.py tests/test_fuzz_fit.py
	CONADV_TORTURE=1 CONADV_LONG=1 $(BIN)/python -m pytest -rfEsP -m torture

# Style, types, and what wings may import.
check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 0 tests/test_architecture.py

install: .venv/installed

# The environment that is tested: these versions, and no file but those whose hashes these are. pip need not resolve, since
# the lock holds all, nor compile, since Python compiles what is imported. It names the files that take long.
define install
	@$(BIN)/python -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("This Python cannot have the versions \
	of $(1): it needs 3.11, 3.12 or 3.13. Remove .venv, then make PYTHON=python3.11")'
	@sed -n '1s/^# /Installing /p' $(1)
	@set -o pipefail; $(BIN)/python -m pip install --use-pep517 --no-compile --no-deps --require-hashes --requirement $(1) \
		| { grep --line-buffered -E '\([0-9]{2,}(\.[0-9]+)? MB\)' || true; }
	@$(BIN)/python -m pip install --quiet --no-compile --no-deps --no-build-isolation --editable .
endef

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: setup.cfg pyproject.toml requirements.lock | .venv/bin/python
	$(call install,requirements.lock)
	@touch $@

.venv/installed-dev: setup.cfg pyproject.toml requirements-dev.lock | .venv/bin/python
	$(call install,requirements-dev.lock)
	@touch .venv/installed $@

# After a change of the requirements in setup.cfg; what it does not touch keeps its version. The first line is what an
# installation says.
define lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		setup.cfg $(2) --output-file $(1)
	rm -rf .venv/files
	$(BIN)/python -m pip download --use-pep517 --quiet --no-deps --require-hashes --requirement $(1) --dest .venv/files
	{ echo "# $$(ls .venv/files | wc -l) packages into .venv, $$(du -sm .venv/files | cut -f1) MB to download"; cat $(1); } >.venv/lock
	mv .venv/lock $(1)
	rm -r .venv/files
endef

lock: .venv/installed-dev
	$(BIN)/python -m pip install --quiet uv
	$(call lock,requirements-dev.lock,--extra dev)
	$(call lock,requirements.lock,--constraint requirements-dev.lock --excludes requirements.excludes)

clean:
	rm -rf .venv build *.egg-info
