# make run: the whole recipe on this machine. make test: all tests. Both work as the first command in a fresh clone.
# PYTHON=/path/to/python3.12 takes that Python; without it .ci/install.sh looks for one.
# make lab PORT=8888: without a browser, for a machine that you reach through ssh -L 8888:localhost:8888
VENV := .venv
BIN := $(VENV)/bin
PROFILE ?= tiny
# glibc hands freed memory back at once and faults it in again for every tensor; see mig_kit/pipeline/processes.py
export MALLOC_MMAP_THRESHOLD_ := 8589934592
export MALLOC_TRIM_THRESHOLD_ := 17179869184
export MALLOC_TOP_PAD_ := 268435456

# another checkout on PYTHONPATH would be imported instead of this one
unexport PYTHONPATH

# what people import
API := mig_kit.boxes mig_kit.prompts mig_kit.rewards mig_kit.sample mig_kit.score mig_kit.shared_prefix.trainer mig_kit.stats

NEXT := "ready; next: make run, make lab or source $(BIN)/activate, which puts mig-kit on the path"

.PHONY: run test nightly versions lint docs cells executed executed-texts evidence evidence-pages lab setup clean

run: setup
	$(BIN)/mig-kit run --profile $(PROFILE) $(if $(RUN_ID),--run-id $(RUN_ID))

# in two processes; a thread that waited actively would keep the other process from its core
test: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=8

# minutes each: JupyterLab, vLLM, two nodes, real size, every stage killed; says what is skipped and why;
# then all tests as on CPUs with fewer instructions; oneDNN is limited too, because PyTorch's bfloat16
# attention fails where it alone is told that AVX-512 is missing; at last the trainer's with other versions
nightly: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -m nightly -rs --durations=8
	for isa in avx512 avx2 default; do \
		ATEN_CPU_CAPABILITY=$$isa ONEDNN_MAX_CPU_ISA=AVX2 OMP_WAIT_POLICY=passive \
			$(BIN)/python -m pytest -q -n 2 --dist worksteal || exit 1; \
	done
	sh .ci/versions.sh $(BIN)/python

# the newest TRL, transformers and PEFT and the two minors before them: which pass the trainer's tests
versions: setup
	sh .ci/versions.sh $(BIN)/python

# the hooks of .pre-commit-config.yaml, on every file that git tracks
lint: setup
	PATH="$(abspath $(BIN)):$$PATH" pre-commit run --all-files --show-diff-on-failure

# docs/index.html: a page of what scripts import, from docstrings
docs: setup
	$(BIN)/python -m pdoc --no-show-source --docformat google --output-directory docs $(API)

# the parameters cells of the notebooks, from mig_kit/pipeline/stage_params.py
cells: setup
	$(BIN)/python .ci/cells.py

# notebooks/executed/: the notebooks of a finished run, as they were run (RUN_ID=default); its adapters ship
executed: setup
	$(BIN)/python .ci/executed.py $(or $(RUN_ID),default)

# the present texts and comments beside the outputs that are there
executed-texts: setup
	$(BIN)/python .ci/executed.py

# the records of notebooks/guide/evidence/evidence.yaml that are missing: hours, and it goes on after a kill
evidence: setup
	$(BIN)/python .ci/evidence.py

# the tables of README.md and results.md, from the records
evidence-pages: setup
	$(BIN)/python .ci/evidence_pages.py

lab: export GOMP_SPINCOUNT := 1000
lab: setup
	$(BIN)/jupyter lab notebooks --config .ci/jupyter_server_config.py $(if $(filter 0,$(shell id -u)),--allow-root) $(if $(PORT),--no-browser --port $(PORT) --ServerApp.port_retries=0)

setup: $(VENV)/done
	@$(if $(filter setup,$(MAKECMDGOALS)),echo $(NEXT))

$(VENV)/done: pyproject.toml requirements.lock .ci/install.sh
	sh .ci/install.sh $(VENV) $(PYTHON)
	@touch $@

clean:
	rm -rf $(VENV) build docs mig_kit.egg-info
