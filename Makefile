# make run: the whole recipe on this machine. make test: all tests. Both work as the first command in a fresh clone.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PROFILE ?= tiny
RUN_ID ?= default
# glibc hands freed memory back at once and faults it in again for every tensor; see mig_kit/__init__.py
export MALLOC_MMAP_THRESHOLD_ := 8589934592
export MALLOC_TRIM_THRESHOLD_ := 17179869184
export MALLOC_TOP_PAD_ := 268435456

# another checkout on PYTHONPATH would be imported instead of this one
unexport PYTHONPATH

.PHONY: run test lint lab setup clean

run: setup
	$(BIN)/mig-kit run --profile $(PROFILE) --run-id $(RUN_ID)

# in two processes; a thread that waited actively would keep the other process from its core
test: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=8

lint: setup
	$(BIN)/ruff check mig_kit tests notebooks
	$(BIN)/nbstripout --verify notebooks/*.ipynb

lab: export GOMP_SPINCOUNT := 1000
lab: setup
	$(BIN)/jupyter lab notebooks

setup: $(VENV)/done

$(VENV)/done: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; install Python 3.11 or set PYTHON="; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing pinned packages (a minute or two)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV)
