# Two commands on a fresh machine with Python 3.11+, git and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long test-slurm lint clean

demo: .venv/.installed
	$(BIN)/dist-kd demo

test: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not slurm" -n 2

test-long: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "slow" -n 2 --dist worksteal --durations=25

test-slurm: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "slurm" --durations=10

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("dist_kd needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python setup.cfg
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/.installed-test: .venv/bin/python setup.cfg
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ .venv/.installed

clean:
	rm -rf .venv runs build *.egg-info
