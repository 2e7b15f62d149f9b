# Two commands: `make demo` (everything from text to a running quantized model) and `make test`.
# Each prepares .venv by itself. PYTHON=python3.12 make ... chooses another interpreter (3.11 or later).
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
OUT ?= demo-out
# one thread per process: the tests run in two processes, and small matrices gain nothing from more
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: venv demo test lint types clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[cpu,train,bench,dev]' -c constraints.txt
	@touch $@

demo: $(STAMP)
	$(BIN)/dmpt-export demo --out $(OUT)

test: lint types
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf .venv build dist ./*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis demo-out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
