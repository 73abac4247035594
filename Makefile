# Everyday commands. Each one installs what it needs into .venv first, once; `make` alone lists them.
#
#   make demo    install, then forget a few people in a small embedded world and show what it did
#   make setup   install CLUE for development (an editable install; C++ changes are rebuilt by the next make)
#   make test    the quick tests          make lint    ruff, mypy, clang-format
#   make bench   the benchmarks           make clean   remove what make made, apart from runs
#
# Another interpreter: make PYTHON=/path/to/python

VENV := .venv
BIN := $(VENV)/bin
# Byte-compiling half a gigabyte of packages takes longer than importing the part that is used.
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --no-compile -c constraints.txt
# The versions that pyproject.toml names; a newer one can be given as PYTHON.
CANDIDATES := python3 python3.13 python3.12 python3.11
PYTHON ?= $(shell for p in $(CANDIDATES); do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
# A compiler newer than ours may warn of more: here that is no error. CUDA kernels are built where there is a GPU to run
# them (make CUDA=ON or OFF to insist).
CUDA ?= $(if $(shell command -v nvidia-smi),AUTO,OFF)
BUILD := --no-build-isolation --config-settings=cmake.define.CLUE_WERROR=OFF \
  --config-settings=cmake.define.CLUE_CUDA=$(CUDA)
NATIVE := CMakeLists.txt $(shell find cmake csrc -type f)

.PHONY: help demo setup test lint bench clean

help:
	@sed -n 's/^#  *//p' Makefile | sed -n '/^make/p'

# The demo needs no development tools, so it does not wait for them. The models it trains are kept in ~/.cache/clue.
demo: $(VENV)/.clue
	$(BIN)/clue demo -o runs/demo --overwrite

setup: $(VENV)/.dev

# One thread per test process: the tensors are small, so threads cost more than they give.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/native/emulation -name "*.cpp" -o -name "*.[hc]*")

bench: $(VENV)/.dev
	@for name in attribution update training_step selection sat logic evaluation world tofu_smollm2; do \
	  echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py || exit 1; done

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch goes first and alone, with its exact pin: no later resolution can then pick another (much larger) build of it.
$(VENV)/.tools: constraints.txt
	@test -n "$(PYTHON)" || { echo "CLUE needs Python 3.11 to 3.13: install one, or say make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11: say make PYTHON=/path/to/a/newer/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) scikit-build-core pybind11 cmake ninja
	@touch $@

$(VENV)/.clue: $(VENV)/.tools pyproject.toml $(NATIVE)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) $(BUILD) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.clue
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) $(BUILD) -e '.[dev]'
	@touch $@
