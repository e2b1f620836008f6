# The two commands: `make demo` sets everything up and runs the whole road, `make test` sets up and tests.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint bench venv clean

demo: venv
	$(RUN) examples/demo.py $(if $(REPO),--repo "$(REPO)")

test: venv
	$(RUN) -m pytest

test-slow: venv
	$(RUN) -m pytest -m slow

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

venv: $(STAMP)

# Exact versions; the package is installed in place, so the checkout is what runs.
$(STAMP): constraints.txt setup.py pyproject.toml megatron_ft/data/packing.cpp
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; make PYTHON=/path/to/python3.11")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel pybind11
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build demo *.egg-info megatron_ft/data/*.so
