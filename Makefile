# The two commands a newcomer needs are `make demo` and `make test`; each installs what it needs into .venv first.
PYTHON ?= python3
PYTHON312 ?= python3.12
BIN := .venv/bin
# Two processes with a thread each; the tests of a file stay together, as they share what is costly to make.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile

.PHONY: demo test test-slow test-cluster test-study test-consumers check docs wheel wheelhouse install clean gpu-pack
.PHONY: gpu-emulate

demo: install
	$(BIN)/mixcl demo --out runs/demo

test: install
	$(PYTEST) -m "not slow and not cluster"

test-slow: install
	$(PYTEST) -m slow

# One after the other: they measure time-outs, and a SLURM or a Ray of their own takes both cores.
test-cluster: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m cluster

# 200 trials on two machines, of which drivers, raylets and one machine are killed: minutes, as root.
test-study: install
	MIXCL_STUDY_TRIALS=200 $(BIN)/pytest -s tests/mixcl_dist/studies/test_study_cluster.py

# Exports in the hands of those they are for, with programs that would not go into .venv.
test-consumers: install .venv-consumers/installed
	MIXCL_CONSUMERS=.venv-consumers/bin $(BIN)/pytest tests/consumers

.venv-consumers/installed: constraints.txt
	$(PYTHON) -m venv .venv-consumers
	.venv-consumers/bin/pip install --quiet --constraint constraints.txt torch
	.venv-consumers/bin/pip install --quiet nnunetv2==2.8.1
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What a GPU machine without a network needs beside the repository, and a rehearsal of what is run there, without a GPU.
gpu-pack: install
	$(BIN)/python benchmarks/gpu/pack.py

gpu-emulate: .venv-gpu/installed gpu-pack
	$(BIN)/python benchmarks/gpu/emulate.py

.venv-gpu/installed: benchmarks/gpu/environment.txt
	$(PYTHON312) -m venv .venv-gpu
	.venv-gpu/bin/pip install --quiet --requirement benchmarks/gpu/environment.txt
	touch $@

# The site, in site/; a link or an anchor that leads nowhere fails it.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

.venv/docs: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# Everything that a machine without a network installs from (docs/install.md); of this system, processor and Python.
DEVICE ?= cpu
TORCH_INDEX := $(if $(filter cpu,$(DEVICE)),--index-url https://download.pytorch.org/whl/cpu)
wheelhouse: install
	rm -rf wheelhouse
	$(BIN)/pip wheel --quiet --constraint constraints.txt --wheel-dir wheelhouse --no-deps $(TORCH_INDEX) torch
	$(BIN)/pip wheel --quiet --constraint constraints.txt --wheel-dir wheelhouse --find-links wheelhouse '.[remote]'
	cp constraints.txt wheelhouse/

wheel: install
	$(BIN)/python -m build

install: .venv/installed

# torch comes first: other packages would otherwise choose a build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-gpu .venv-consumers .pack build dist site wheelhouse *.egg-info
