# make run      the main job: environment, data, partition, federated training, evaluation, report
# make test     environment, data, test suite
# make help     the other targets

VENV ?= .venv
PYTEST_ARGS ?=

# The first Python that fits. Name another one with: make PYTHON=/path/to/python3.11 run
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3; do "$$p" -c '$(FITS)' 2>/dev/null && echo "$$p" && break; done)
endif

BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
# Stages call `fedpipe`: the one of this environment.
IN_VENV := PATH="$(BIN):$$PATH"
# Tests neither see nor touch the servers and databases that the user's shell points to.
ALONE := env -u PREFECT_API_URL -u PREFECT_API_KEY -u PREFECT_HOME -u PREFECT_PROFILE \
	-u MLFLOW_TRACKING_URI -u MLFLOW_EXPERIMENT_NAME -u MLFLOW_RUN_ID $(IN_VENV)

.PHONY: help run install data test test-slow lint clean

help:
	@echo "make run         run the pipeline (dvc repro): data, partition, training, report"
	@echo "make run ARGS='-S method.name=ffa-lora'"
	@echo "                 run a variation of it (dvc exp run)"
	@echo "make test        run the tests; PYTEST_ARGS='-k plan' runs some"
	@echo "make test-slow   run the long tests: faults, crashes, soak"
	@echo "make lint        check style and formatting"
	@echo "make data        only fetch the data and the backbone"
	@echo "make install     only make the virtual environment"
	@echo "make clean       remove the environment, caches and Prefect's files; data, runs and reports stay"

run: install
	$(IN_VENV) dvc $(if $(ARGS),exp run $(ARGS),repro)

test: data
	$(ALONE) python -m pytest $(PYTEST_ARGS)

test-slow: data
	$(ALONE) python -m pytest -m slow $(PYTEST_ARGS)

lint: install
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .

data: install
	$(IN_VENV) fedpipe fetch

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -c '$(FITS)' 2>/dev/null || { \
	  echo "fedpipe needs Python 3.11 or 3.12 with the venv module. Found: $$("$(or $(PYTHON),python3)" --version 2>&1)."; \
	  echo "Install it (on Debian: apt install python3.11 python3.11-venv), or name it: make PYTHON=/path/to/python3.11 run"; \
	  exit 1; } >&2
	@echo "Installing into $(VENV), a few minutes the first time ..."
	"$(PYTHON)" -m venv $(VENV)
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .prefect .pytest_cache .ruff_cache .hypothesis build dvc_plots fedpipe.egg-info
	find fedpipe flows tasks tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
