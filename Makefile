# make test   set up and run everything         make demo   set up and run the demo to its report
# make check  lint, types and the quick tests   make bench  CPU benchmark          make clean
# make test-trl test-verl test-vllm  the tests with TRL (oldest and newest 1.x), verl and vLLM, in environments of their own
# make docs   the site, build/site/index.html; a broken link is an error
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two test files at a time, one thread each: a file's tests share what they set up.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

.PHONY: test test-trl test-verl test-vllm check demo bench lint types docs clean

test: $(INSTALLED) lint types docs
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels tests/ops

test-trl test-verl test-vllm: test-%:
	tests/integrations/run.sh $*

check: $(INSTALLED) lint types
	$(PYTEST) -m "not slow" tests/core tests/ops tests/trainer

demo: $(INSTALLED)
	$(BIN)/ipvrm run demo --run runs/demo --jobs 2 --resume

bench: $(INSTALLED)
	$(BIN)/python -m ipvrm_core.bench.cpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy ipvrm_core

docs: $(INSTALLED)
	$(BIN)/python docs/pages.py
	$(BIN)/zensical build --strict --clean --config-file mkdocs.yml

$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
