# Everything happens in .venv, made on first use and again when the requirements change.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo takedown docs test test-all test-faults lint clean

demo: $(READY)
	$(VENV)/bin/memsinks demo

takedown: $(READY)
	rm -rf runs/take-one-out
	$(VENV)/bin/memsinks train recipes/take-one-out.yaml
	$(VENV)/bin/memsinks takedown runs/take-one-out --key record-64-003

docs: $(READY)
	$(VENV)/bin/python docs/make_site.py
	@echo "To read it: $(VENV)/bin/python -m http.server --bind 127.0.0.1 --directory build/site"

test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

test-all: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "long or not long"

# About half an hour on two cores; full disks need root, which mounts a small tmpfs, or a user that limits bind.
test-faults: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(VENV)/bin/python -m faults

lint: $(READY)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/pyright

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info src/*.egg-info .pytest_cache .ruff_cache .hypothesis
