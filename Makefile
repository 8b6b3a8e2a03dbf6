# Three commands: `make demo`, `make test`, `make lint`. Each creates .venv and installs what it needs on first use.
#
#   make demo PYTHON=python3.12      another interpreter (remove .venv to change it later)
#   make test EXTRAS=dev             without the parity tests, which need PyTorch (several GB on Linux)
#   make test PYTEST="-k routing"    more pytest arguments
#   make test-all                    slow tests too, and those for the hardware that is here
#   make chaos                       200 drawn fault schedules on rank processes; SEED=1000 RUNS=20 for others

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,parity
# JAX compiles on one core per worker; more workers than cores only compile the same things again.
JOBS ?= 2
PYTEST ?=
SEED ?= 0
RUNS ?= 200

# pip says nothing unless it fails.
PIP_INSTALL = $(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt
comma = ,
TEST_STAMP = $(VENV)/.installed-test-$(subst $(comma),-,$(EXTRAS))
# A worker that dies fails the run at once: with another in its place pytest-xdist would wait for ever.
RUN_TESTS = $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --max-worker-restart 0

.PHONY: demo test test-all chaos lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@$(VENV)/bin/jaxmoe demo

test: $(TEST_STAMP)
	@$(RUN_TESTS) $(PYTEST)

test-all: $(TEST_STAMP)
	@$(RUN_TESTS) -m "" $(PYTEST)

chaos: $(VENV)/.installed
	@$(VENV)/bin/jaxmoe recover --faults random:$(RUNS) --seed $(SEED) --no-baselines --output runs/chaos --json runs/chaos/recover.json

lint: $(VENV)/.installed-lint
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@command -v "$(PYTHON)" >/dev/null || { echo "error: $(PYTHON) not found; name a Python >= 3.11: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: jaxmoe needs Python >= 3.11, $(PYTHON) is $$("$(PYTHON)" -V 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -m venv "$(VENV)"

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing jaxmoe into $(VENV) (once; a minute or two) ..."
	@$(PIP_INSTALL) -e .
	@touch $@

$(TEST_STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing jaxmoe[$(EXTRAS)] into $(VENV) (once; a few minutes) ..."
	@$(PIP_INSTALL) -e ".[$(EXTRAS)]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-lint: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing ruff into $(VENV) (once) ..."
	@$(PIP_INSTALL) ruff
	@touch $@
