PYTHON ?= python3
BIN := .venv/bin
# TensorFlow's start-up chatter hides what a user looks for.
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test torture check install lock clean

# The smallest real run: digits at a batch of 7.67 % of the training set (96k on ImageNet), ConAdv.
demo: .venv/installed
	$(BIN)/python train.py

test: .venv/installed-dev
	$(BIN)/python -m pytest

# Everything that `make test` runs a share of, mutated recipes, corrupted files and inputs of fit, then what it leaves out:
# runs that are killed, workers that are lost, a long run. The counts are in its summary.
torture: .venv/installed-dev
	CONADV_TORTURE=1 $(BIN)/python -m pytest -rfEsP tests/test_fuzz_config.py tests/test_fuzz_data.py tests/test_fuzz_fit.py
	CONADV_TORTURE=1 $(BIN)/python -m pytest -rfEsP -m torture

# Style, types, and what wings may import.
check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 0 tests/test_architecture.py

install: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# The environment that is tested: these versions, and no file but those whose hashes these are.
.venv/installed-dev: setup.cfg pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch .venv/installed $@

# After a change of the requirements in setup.cfg; what it does not touch keeps its version. For Python 3.11 and later.
lock: .venv/installed-dev
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--extra dev setup.cfg --output-file requirements.lock

clean:
	rm -rf .venv build *.egg-info
