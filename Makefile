# make test   set up and run the tests          make demo   set up and run the demo to its report
# make bench  CPU benchmark                     make lint   ruff            make clean
# make docs   the site, build/site/index.html; a broken link is an error
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: test demo bench lint docs clean

test: $(INSTALLED) lint docs
	$(BIN)/python -m pytest -q
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/kernels tests/ops

demo: $(INSTALLED)
	$(BIN)/ipvrm run demo --run runs/demo --jobs 2 --resume

bench: $(INSTALLED)
	$(BIN)/python -m ipvrm_core.bench.cpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(INSTALLED)
	$(BIN)/python docs/pages.py
	$(BIN)/zensical build --strict --clean --config-file mkdocs.yml

$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
