# make demo     set up, then the whole main job on a drawn data set (no GPU needed)
# make test     set up with the test extra, then lint, types and what a change usually breaks: minutes on two cores
# make test-all set up with the test extra, then every test that `make test` leaves out, but the faults'
# make setup    only the set-up; nothing is installed twice
# make faults   set up with the test extra, then only the suite that kills, stops and damages; prints its table
# make layouts  set up with the test extra, then only the suites that compare layouts and resumed runs
# make claim    set up, then train DeepStack and its baselines from scratch and compare them: 98 minutes of CPU time,
#               so about 50 minutes on two idle cores; QUICK=yes 7 minutes. Interrupted, the same command goes on
# make lint     ruff and mypy
#
# PYTHON picks the interpreter (3.11 or later), VENV the environment's folder. WORKERS is the number of processes
# that run the tests, each file in one of them (2; WORKERS=1 runs them in one, in which `-s` and `--pdb` work). QUICK=yes
# leaves the slow tests of `layouts` out.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt
# The stamp's name holds a hash of what it installed, so only a change of these files installs again.
KEY := $(shell cat setup.py constraints.txt | sha256sum | cut -c 1-16)
CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed-$(KEY)
TESTABLE := $(VENV)/.testable-$(KEY)

export OMP_NUM_THREADS ?= 1
RUN := $(BIN)/megatron-deepstack
DEMO := demo-run
WORKERS ?= 2
SPREAD := $(if $(filter-out 1,$(WORKERS)),--numprocesses $(WORKERS))

.PHONY: setup demo claim test test-all faults layouts lint
.DELETE_ON_ERROR:

setup: $(INSTALLED)

$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv --clear $(VENV) || \
	  { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	@touch $@

$(INSTALLED): $(CREATED)
	$(PIP) --editable .
	@touch $@

$(TESTABLE): $(INSTALLED)
	$(PIP) --editable '.[test]'
	@touch $@

demo: export CUDA_VISIBLE_DEVICES :=
demo: $(INSTALLED)
	rm -rf $(DEMO)
	$(RUN) draw $(DEMO)/data
	$(RUN) preprocess demo
	$(RUN) preprocess demo data.records=$(DEMO)/data/heldout.json data.store=$(DEMO)/heldout.zarr
	$(RUN) train demo --stop-after 240
	$(RUN) train demo
	$(RUN) generate $(DEMO)
	$(RUN) report $(DEMO)

claim: $(INSTALLED)
	$(BIN)/python -m tools.claim $(if $(QUICK),--quick)

lint: $(TESTABLE)
	$(BIN)/ruff check
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --ignore tests/faults -m "not slow" $(SPREAD)

test-all: $(TESTABLE)
	$(BIN)/python -m pytest --ignore tests/faults -m slow $(SPREAD)

faults: $(TESTABLE)
	DEEPSTACK_SOAK_KILLS=20 $(BIN)/python -m pytest tests/faults

layouts: $(TESTABLE)
	$(BIN)/python -m pytest $(SPREAD) $(if $(QUICK),-m "not slow") tests/layouts tests/checkpoint/test_resharding.py \
	  tests/training/test_resume.py tests/training/test_resume_cases.py
