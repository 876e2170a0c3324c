# bitbyte: everything goes through .venv, which is made once from constraints.txt (see `make help`).
# Needs GNU make, a POSIX shell, and Python 3.11 or newer as $(PYTHON).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTED := $(VENV)/.ready-test
# What people use, and what only tests need besides, which is a gigabyte more.
USE := workbench,fast,app,papers,compress
TEST := $(USE),data,export,eval,test$(MORE_EXTRAS)
PIP := "$(BIN)/python" -m pip install --disable-pip-version-check -c constraints.txt

# Users' values reach the shell as environment variables, never as text pasted into a command line.
export CORPUS MINUTES RESUME

.PHONY: help install run test quick check lab papers screens references clean
.DEFAULT_GOAL := help

help:
	@echo 'make run         execute the notebooks in order, end with the BPB table and index.html'
	@echo '                 CORPUS=path   your own file or folder    MINUTES=n   training time'
	@echo '                 RESUME=latest continue a run that stopped'
	@echo 'make install     .venv, which the other targets make too'
	@echo 'make test        unit tests, every notebook against its stored outputs, and a real browser'
	@echo 'make quick       the tests of the core, under a minute'
	@echo 'make check       lint, format, types and layout: no training, seconds'
	@echo 'make lab         JupyterLab on copies of the notebooks, on this machine only'
	@echo 'make papers      the papers as HTML and PDF, their numbers from records'
	@echo 'make screens     the pictures in README.md and docs/, from the models that come along'
	@echo 'make references  write the stored outputs of the notebooks again'
	@echo 'make clean       remove .venv and caches; artifacts/ stays'
	@echo 'PYTHON=python3.12 chooses the interpreter. A CPU-only torch on Linux (much smaller):'
	@echo '  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make run'

# The stamp is written last, so an install that stopped half-way is taken up again.
$(READY): constraints.txt pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo 'make: no $(PYTHON) here; install Python 3.11 or newer, or say PYTHON=path' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $$("$(PYTHON)" -V 2>&1) is too old, bitbyte needs 3.11 or newer:" \
	    'say PYTHON=python3.11' >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'make: this Python cannot make environments; on Debian and Ubuntu:' \
	    'apt install python3-venv' >&2; exit 1; }
	"$(BIN)/python" -c 'import pip' 2>/dev/null || "$(PYTHON)" -m venv --clear $(VENV)
	$(PIP) -e '.[$(USE)]'
	@touch $@

$(TESTED): $(READY)
	$(PIP) -e '.[$(TEST)]'
	@touch $@

install: $(READY)
	@echo 'installed; now: source .venv/bin/activate'

run: $(READY)
	@set --; \
	if [ -n "$$CORPUS" ]; then \
	  if [ -e "$$CORPUS" ]; then \
	    CORPUS=$$(cd "$$(dirname "$$CORPUS")" && pwd)/$$(basename "$$CORPUS"); \
	  fi; \
	  set -- "$$@" --set "corpus=$$CORPUS"; \
	fi; \
	if [ -n "$$MINUTES" ]; then set -- "$$@" --set "minutes=$$MINUTES"; fi; \
	if [ -n "$$RESUME" ]; then set -- "$$@" --resume "$$RESUME"; fi; \
	exec "$(BIN)/python" -m bitbyte run "$$@"

# All parts run whatever the others say.  The notebooks are compared where nothing is as it was when
# their outputs were written (see the script); they and the browser tests run side by side.
test: $(TESTED)
	@tmp=$$(mktemp -d) && notebooks= && status=0; \
	trap 'test -z "$$notebooks" || kill $$notebooks 2>/dev/null; rm -rf "$$tmp"' EXIT; \
	trap 'exit 130' INT TERM; \
	"$(BIN)/python" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	  -m "not browser" || status=1; \
	"$(BIN)/python" tests/tools/notebook_rounds.py elsewhere --work "$$tmp" \
	  >"$$tmp/notebooks.log" 2>&1 & notebooks=$$!; \
	"$(BIN)/python" -m pytest tests/browser || status=1; \
	wait $$notebooks || status=1; \
	cat "$$tmp/notebooks.log"; \
	exit $$status

# The core's tests but for whole trainings, in whatever folder they lie.
QUICK := files models bitlinear bounds mamba ngrams prior optim families generate infill golden shards runs checkpoint
quick: $(TESTED)
	"$(BIN)/python" -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m "not slow" \
	  $(foreach name,$(QUICK),$(wildcard tests/test_$(name).py tests/*/test_$(name).py))

check: $(TESTED)
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m ruff format --check .
	"$(BIN)/python" -m pyright --pythonpath "$(BIN)/python"
	"$(BIN)/python" -m pytest -q tests/test_layout.py tests/test_docs.py

lab: $(READY)
	"$(BIN)/python" -m bitbyte lab

papers: $(READY)
	"$(BIN)/python" -m bitbyte papers

screens: $(TESTED)
	"$(BIN)/python" tests/tools/screens.py

references: $(TESTED)
	"$(BIN)/python" -m bitbyte.workbench.notebooks

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find bitbyte tests notebooks -name __pycache__ -prune -exec rm -rf {} +
	find notebooks -name .ipynb_checkpoints -prune -exec rm -rf {} +
