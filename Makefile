# make demo · make test · make test-slow · make bench · make torture · make lint · make install
# make bench QUICK=1          smaller measurements, once each: two or three minutes
# make torture QUICK=1        at most a tenth of the cases
# make demo WEIGHTS=imagenet  InceptionV3 with torchvision's ImageNet weights (downloaded once), or WEIGHTS=random

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m

.PHONY: install demo test test-slow bench torture lint

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "gridcap requires Python 3.10 or newer: make PYTHON=/path/to/python3.10"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "this Python cannot create virtual environments (Debian, Ubuntu: install python3-venv)"; exit 1; }
	@echo "installing into $(VENV): torch alone has several GB, so the first time takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --disable-pip-version-check --quiet --progress-bar on \
		--constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	@$(RUN) demo $(if $(WEIGHTS),--weights $(WEIGHTS))

# Two processes, because many tests wait for the programs that they start. Each process takes whole files in their
# order, so that the longest one (the demo) does not come last. One OpenMP thread per process: with more threads than
# cores, spinning threads make a training step five times as slow.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(RUN) pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST) -m "not slow"

# Whole commands in separate processes: the demo, the notebooks, Slurm, torchrun, a browser.
test-slow: install
	$(PYTEST) -m slow

bench: install
	@$(RUN) bench $(if $(QUICK),--quick)

# Rerun the command to resume.
torture: install
	@$(RUN) tests.torture $(if $(QUICK),--quick)

lint: install
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
