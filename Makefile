# Every target sets up what it needs in .venv. PYTHON and PIP_ARGS may be given: make test PYTHON=python3.12
# Other versions get an environment of their own: make test PYTHON=python3.12 CONSTRAINTS=constraints/torch-2.11.txt
PYTHON ?= python3
PIP_ARGS ?=
DEFAULT_CONSTRAINTS := constraints/torch-2.13.txt
CONSTRAINTS ?= $(DEFAULT_CONSTRAINTS)
VENV := .venv$(if $(filter-out $(DEFAULT_CONSTRAINTS),$(CONSTRAINTS)),-$(basename $(notdir $(CONSTRAINTS))))
BIN := $(VENV)/bin
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.h)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) $(PIP_ARGS)

.PHONY: demo test test-fast lint lint-style lint-types bench format clean
.DELETE_ON_ERROR:

# torch goes first: a package that asks for it later is then satisfied with the pinned build.
$(VENV)/.torch: $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "mtu needs Python 3.11 to 3.13, but $(PYTHON) is %d.%d: pass PYTHON=python3.12, for example." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel torch
	touch $@

# Whatever csrc is compiled from has it compiled again.
$(VENV)/.ready: $(VENV)/.torch pyproject.toml setup.py $(CPP)
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m mtu.recipes.icons demo --output demo-output

# Lint and type checks belong to the default environment: other versions' stubs and rules say other things.
test: $(if $(filter $(DEFAULT_CONSTRAINTS),$(CONSTRAINTS)),lint,$(VENV)/.ready)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Within a minute: the essentials of every package. What takes longer is marked slow.
test-fast: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not gpu and not slow'

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks.models.model_sizes
	$(BIN)/python -m benchmarks.ffn.moe_ffn
	$(BIN)/python -m benchmarks.models.unet
	$(BIN)/python -m benchmarks.models.conv_in
	$(BIN)/python -m benchmarks.pipelines.pipeline
	$(BIN)/python -m benchmarks.pipelines.image_psnr
	$(BIN)/python -m benchmarks.ffn.scaling
	$(BIN)/python -m benchmarks.ffn.machine
	$(BIN)/python -m benchmarks.models.import_time
	$(BIN)/python -m benchmarks.pages.plot
	$(BIN)/python -m benchmarks.pages.page

lint: lint-style lint-types

lint-style: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

lint-types: $(VENV)/.ready
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf .venv .venv-* demo-output build *.egg-info mtu_kernels/_C.*
