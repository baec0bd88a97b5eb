# Short names for commands. `make demo` and `make test` set everything up first: a virtual environment
# in .venv, pinned packages, the C++ core. They need Python 3.11 or 3.12, g++ and make; a second run
# only does what changed.
#
#   PYTHON=...       the Python to start from
#   CMAKE_ARGS=...   options of the build, e.g. -DEP_CUDA=OFF
#   PYTEST_ARGS=...  e.g. "-k compact", --slow
#   EMULATOR_ARGS=...  the same for tests of GPUs that run without one
#   BENCH_ARGS=...   options of `ep-comm bench`
SHELL := /bin/bash
.DEFAULT_GOAL := build
.PHONY: build demo test emulator-test wheel-test sanitize bench format lint clean distclean

VENV := .venv
PY := $(VENV)/bin/python
BUILD = build/$(shell $(PY) -c 'import sys; print(sys.implementation.cache_tag)')
CPP = $(shell find $(wildcard csrc tests bench) -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP_INSTALL = $(PY) -m pip install --quiet

# ---- the environment; each stamp is redone when what it was made from changes ----

$(VENV)/.made:
	@python=$$(for p in "$(PYTHON)" python3.11 python3.12 python3; do \
	    "$$p" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	    && echo "$$p" && break; done) || { \
	    echo "ep_comm needs Python 3.11 or newer with venv; name one with PYTHON=..." >&2; exit 1; }; \
	echo "making $(VENV) with $$python"; "$$python" -m venv --clear $(VENV)
	@touch $@

$(VENV)/.test: requirements/build.txt requirements/test.txt $(VENV)/.made
	$(PIP_INSTALL) -r requirements/test.txt
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.test
	$(PIP_INSTALL) -r requirements/dev.txt
	@touch $@

# The package itself, editable: only its metadata and command depend on these files.
$(VENV)/.installed: pyproject.toml setup.py $(VENV)/.test | core
	$(PIP_INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@

# ---- the C++ core, incremental; CMake also notices new and removed files ----

.PHONY: core
core: $(VENV)/.test
	CMAKE_ARGS="-DEP_TESTS=ON $(CMAKE_ARGS)" $(PY) setup.py --quiet build_ext --inplace

build: core $(VENV)/.installed

# ---- what people run ----

demo: build
	$(VENV)/bin/ep-comm demo

test: build
	$(VENV)/bin/cmake --build $(BUILD)
	$(VENV)/bin/ctest --test-dir $(BUILD) --parallel 2 --output-on-failure
	$(PY) -m pytest $(PYTEST_ARGS)
	$(RUN_EMULATOR)

# Tests of GPUs, on kernels that the CPU runs.
emulator-test: build
	$(VENV)/bin/cmake --build $(BUILD)
	$(RUN_EMULATOR)

# Where a kernel ends the process, the last lines say in which test and why.
RUN_EMULATOR = $(if $(filter x86_64,$(shell uname -m)), \
    $(PY) -m pytest --emulator --verbose --capture=sys $(EMULATOR_ARGS), \
    @echo "no tests on the emulator: it runs on x86_64 only")

# The wheel, built offline from this tree and run from elsewhere.
wheel-test: build
	$(PY) -m pytest --slow -k wheel tests/test_packaging.py

# The C++ tests again, without Python, under the host sanitizers.
sanitize: $(VENV)/.test
	@set -e; for kind in address,undefined thread; do \
	    dir=build/sanitize-$${kind%%,*}; \
	    $(VENV)/bin/cmake -S . -B $$dir -G Ninja -DEP_SANITIZE=$$kind -DEP_TESTS=ON \
	        -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja; \
	    $(VENV)/bin/cmake --build $$dir; \
	    $(VENV)/bin/ctest --test-dir $$dir --output-on-failure; \
	done

bench: build
	$(VENV)/bin/ep-comm bench $(BENCH_ARGS)

# ---- form ----

format: $(VENV)/.dev
	$(VENV)/bin/clang-format -i $(CPP)
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .

lint: $(VENV)/.dev
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf build ep_comm/_core*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.installed
	find ep_comm tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
