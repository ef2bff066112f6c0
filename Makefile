PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest

.PHONY: demo test pages nightly mutants check docs lowest

# Prepares real images, trains a small BridgeTower, tests it, writes bridgetower-demo/report.html.
# ARGS are options of the demo: make demo ARGS="--minutes 2 --compare"
demo: $(VENV)/demo
	$(BIN)/python -m bridgetower_demo $(ARGS)

# Many tests start processes: compiled modules are kept, even where the environment says not to. And many wait for
# them, so that three share two cores: with two processes the cores were idle for a twelfth of the time. The times of
# all tests are kept in build/tests.xml.
test: $(VENV)/installed
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder \
		--ignore tests/pages --ignore tests/demo --durations 30 --junitxml build/tests.xml

# Commands of README and docs as they are written, with what they print; the site, the web UI, and the demo.
pages: $(VENV)/installed
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
		tests/pages tests/demo

# What takes long and hardly ever fails: every benchmark at its smallest size, wheel and sdist in new environments, and
# what pages show of the full demo.
nightly: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m nightly

# Changes of the code, drawn at random by the day, each tested by the tests that run it: prints those that none notices.
# ARGS are options: make mutants ARGS="--seed a --only search/ --json". The first time it records what tests cover.
mutants: $(VENV)/installed
	$(BIN)/python -W ignore tests/mutants.py $(ARGS)

check: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/reading.py

# The documentation as a site: build/site/VERSION/index.html, beside the sites of other versions that are there.
docs: $(VENV)/installed
	$(BIN)/python docs/build.py build/site

# Runs the tests under the lowest releases that pyproject.toml allows, best with PYTHON=python3.11, the lowest Python.
# transformers and what needs it are left out, as it needs newer releases; the tests that compare with it are skipped.
lowest: $(LOWEST)/installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

$(VENV)/demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	touch $@

$(LOWEST)/installed: pyproject.toml tests/lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --editable . --requirement tests/lowest.txt
	touch $@
