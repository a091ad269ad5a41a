# `make help` lists the targets. Needs Python 3.11 to 3.13 and make; everything else is installed into $(VENV).

MODEL ?= models/mamba-python-15m
ARGS ?=
PYTEST_ARGS ?=
VENV ?= .venv
PYTHON ?=
TORCH ?= auto

RUN := $(VENV)/bin
SOURCES := app mamba_core tests benchmarks scripts models

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help serve test check format docs bench-ops bench-decode bench-prefill bench-memory bench-serve clean
.DELETE_ON_ERROR:

help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z -]+:.*## / {printf "  %-38s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  MODEL=dir-or-hub-id, ARGS=\"flags of the command\", PYTEST_ARGS=\"...\", PYTHON=python3.12, TORCH=auto|cpu|cuda"

# one stamp per extra: a second run does nothing until what is to be installed changes
$(VENV)/.installed-%: pyproject.toml scripts/bootstrap.py
	@python=$$(sh scripts/find_python.sh $(PYTHON)) && \
	"$$python" scripts/bootstrap.py --venv $(VENV) --torch $(TORCH) $(if $(filter serve,$*),,--extra $*)
	@touch $@

serve: $(VENV)/.installed-serve ## serve MODEL on 127.0.0.1:8000
	@exec $(RUN)/mamba-serve --model $(MODEL) $(ARGS)

test: $(VENV)/.installed-test ## run the tests: no GPU, no network needed
	@exec $(RUN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.installed-dev ## what must be clean before a commit: format, lint, types, tests
	$(RUN)/ruff format --check $(SOURCES)
	$(RUN)/ruff check $(SOURCES)
	$(RUN)/mypy
	$(RUN)/python -m pytest $(PYTEST_ARGS)

format: $(VENV)/.installed-dev ## let ruff rewrite the sources
	$(RUN)/ruff format $(SOURCES)
	$(RUN)/ruff check --fix $(SOURCES)

docs: $(VENV)/.installed-dev ## write what is made from the code: settings in README.md, docs/, tests/api/openapi.json
	$(RUN)/python -m scripts.settings_table
	$(RUN)/python -m scripts.limits_table
	$(RUN)/python -m scripts.api_table
	$(RUN)/python -m scripts.metrics_table
	$(RUN)/python -m scripts.openapi

bench-ops bench-decode bench-prefill: bench-%: $(VENV)/.installed-bench ## measure one room: ARGS="--random 130m --device cpu"
	@exec $(RUN)/python -m benchmarks.$* $(ARGS)

bench-memory: $(VENV)/.installed-bench ## peak memory of short and of very long requests
	@exec $(RUN)/python -m benchmarks.memory --model $(MODEL) $(ARGS)

bench-serve: $(VENV)/.installed-bench ## load a running server: ARGS="--url http://127.0.0.1:8000"
	@exec $(RUN)/python -m benchmarks.serve $(ARGS)

clean: ## remove the virtual environment and all caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
