# make demo · make test · make bench · make torture · make lint · make install
# make bench QUICK=1   the same measurements, once each and smaller: two or three minutes.
# WEIGHTS=imagenet make demo   uses torchvision's ImageNet weights (downloaded once) instead of random ones.

PYTHON ?= python3
WEIGHTS ?= random
VENV := .venv
RUN := $(VENV)/bin/python -m

.PHONY: install demo test bench torture lint

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "gridcap needs Python 3.10 or newer: make PYTHON=/path/to/python3.10"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "this Python cannot make virtual environments: install it first (Debian, Ubuntu: python3-venv)"; exit 1; }
	@echo "installing into $(VENV): torch alone is several GB, this takes some minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --disable-pip-version-check --quiet --progress-bar on \
		--constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	@$(RUN) demo --weights $(WEIGHTS)

# Two processes, a file of tests at a time in each, in their order: many tests wait for programs that they start, and
# the demo, which is the longest, does not come last. Threads that wait give way: where they spin, and more of them
# than cores do, a step of training takes five times as long.
test: install
	OMP_WAIT_POLICY=passive $(RUN) pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

bench: install
	@$(RUN) bench $(if $(QUICK),--quick)

# Stopped, the same command goes on where it was. QUICK=1: a tenth of the cases, or less.
torture: install
	@$(RUN) tests.torture $(if $(QUICK),--quick)

lint: install
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
