# `make demo` sets everything up and runs the pipeline end to end; `make test` sets everything up and runs the tests.
PYTHON ?= python3
# Another Megatron-Core than that of constraints.txt, in an environment of its own: make test PYTHON=python3.12 CORE=0.19.2
CORE ?=
VENV := .venv$(if $(CORE),-core-$(CORE))
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
BENCH_DIR ?= /tmp
# Tests run in this many processes, a file in one of them; a process takes about 1 GB.
WORKERS ?= 2
# pip shows its progress on a terminal, and nothing in a log.
PIP_INSTALL = quiet=--quiet; if [ -t 1 ]; then quiet=; fi; \
	$(RUN) -m pip install $$quiet --disable-pip-version-check -c $(VENV)/constraints.txt
PYTEST = $(RUN) -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo test test-slow fuzz lint docs bench venv clean

demo: venv
	@$(RUN) examples/demo.py $(if $(REPO),--repo "$(REPO)")

# TESTS=tests/data runs a part of them.
test: venv
	$(PYTEST) $(TESTS)

test-slow: venv
	$(PYTEST) -m slow

# Mutated inputs for every reader; MEGATRON_FT_FUZZ_TIMES=20 tries twenty times as many.
fuzz: venv
	$(PYTEST) -m fuzz

lint: venv docs
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell

# The documentation as a site, in build/site, without network. A broken link is an error, but not with --quiet.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

# The benchmarks that need no GPU and no data; docs/benchmarks.md has the commands of the published figures.
bench: venv
	$(RUN) bench/packing.py
	$(RUN) bench/tokenize.py --tokenizer-file tests/fixtures/tokenizer.json
	$(RUN) bench/train_cpu.py
	$(RUN) bench/checkpoint.py --directory "$(BENCH_DIR)"
	$(RUN) bench/convert.py --preset starcoderbase-1b --directory "$(BENCH_DIR)"

venv: $(STAMP)

# Exact versions; the package is installed in place, so the checkout is what runs. What setup.py reads or compiles
# makes it install again when it changes.
$(STAMP): constraints.txt setup.py pyproject.toml megatron_ft/__init__.py $(wildcard megatron_ft/*/*.cpp megatron_ft/*/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; make PYTHON=/path/to/python3.11")'
	@echo 'Setting up $(VENV) (once): PyTorch, Megatron-Core and the tools; 2 GB, more with PyTorch for CUDA; 2 to 10 minutes'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(if $(CORE),sed 's/^megatron-core==.*/megatron-core==$(CORE)/',cat) constraints.txt >$(VENV)/constraints.txt
	@$(PIP_INSTALL) torch setuptools wheel pybind11
	@$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build demo *.egg-info megatron_ft/*/_*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
