# make run     the frames sweep, from a fresh clone with nothing but Python >= 3.10 and a C++ compiler
# make test    the quick tier of the test suite: tests/README.md        make test-all    the whole suite
# make lint    format, lint and types, as pre-commit runs them
# make bench   the CPU figures       make bench-regress    the pytest-benchmark suite
#
# make sanitize ASan, UBSan and TSan over every CPU variant of this machine
# make fuzz    random calls, valid and malformed, for FUZZ_MINUTES (10), on the library that ASan and UBSan watch
#
# make codegen what the Triton kernels compile to, for GPUs that need not be here: benchmarks/results/codegen.md
# make codegen36, make test-triton36    the same, and its test, on sm_90 with triton 3.6.0, in .venv-triton36
# make gpu     all that needs a GPU, with the machine's own $(PYTHON), into the folder OUT
# make gpu-kit what to carry to a GPU machine whose minutes count: benchmarks/gpu/README.md
#
# Everything else runs in .venv, which is made with the versions in constraints.txt. PYTHON chooses the interpreter.
# pip compiles nothing to bytecode: Python does, and only what is imported, even where an image forbids it, as many do:
# there, each of the tests' processes would compile transformers anew, for 15 s.

PYTHON ?= python3
VENV ?= .venv
VENV36 ?= .venv-triton36
TIER ?= all
OUT ?= benchmarks/results/local/gpu-run
GPU_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) python3.12)
KIT_SECONDS ?= 600
FUZZ_MINUTES ?= 10
BIN := $(VENV)/bin
TOOLS := $(VENV)/tools.stamp
INSTALLED := $(VENV)/installed.stamp
LIBRARY := ral_kernels/lib/libral_cpu.so
SANITIZED := build/sanitized
NATIVE_SOURCES := setup.py CMakeLists.txt $(shell find csrc -type f -name '*.[ch]*')
PIP := -m pip install --quiet --disable-pip-version-check --no-compile
PIP_INSTALL := $(BIN)/python $(PIP) -c constraints.txt
PIP_INSTALL36 := $(VENV36)/bin/python $(PIP)

unexport PYTHONDONTWRITEBYTECODE
.DELETE_ON_ERROR:
.PHONY: run test test-all sanitize fuzz lint bench bench-regress codegen codegen36 test-triton36 triton36 gpu gpu-kit build library-and-packages clean ruff-format ruff-check mypy clang-format cited-files

run: build
	$(BIN)/python -m benchmarks.frames_sweep

test: build
	$(BIN)/python -m pytest -q -n auto --dist loadgroup --tier quick

# TIER=rest leaves out what `make test` runs.
test-all: build
	$(BIN)/python -m pytest -q -n auto --dist loadgroup --tier $(TIER)

# The op tests run once in each variant. Leaks are Python's own. libstdc++ comes first, or ASan does not find what
# throws exceptions.
sanitize: build $(SANITIZED)/libral_cpu.so
	$(BIN)/python -m pytest -q tests/native/test_races.py
	for isa in $$($(BIN)/python -c 'from ral_kernels.runtime import cpu_library; print(*cpu_library.supported_isas())'); do \
	  echo "== ASan and UBSan: $$isa"; \
	  RAL_CPU_ISA=$$isa $(SANITIZERS) $(BIN)/python -m pytest -q -p tests.native.sanitized --tier quick \
	    tests/ops tests/native/test_entry_points.py -k "(cpu or entry_points) and not compile" || exit 1; \
	done

fuzz: build $(SANITIZED)/libral_cpu.so
	FUZZ_MINUTES=$(FUZZ_MINUTES) $(SANITIZERS) $(BIN)/python -m tests.fuzz

SANITIZERS = RAL_SANITIZED=$(SANITIZED) \
  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

$(SANITIZED)/libral_cpu.so: $(NATIVE_SOURCES) | $(TOOLS)
	@echo "== native library, with ASan and UBSan"
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(SANITIZED)/cmake -DRAL_SANITIZE=address,undefined \
	  -DRAL_OUTPUT_DIR="$(abspath $(SANITIZED))"
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(SANITIZED)/cmake --target ral_cpu --parallel

bench: build
	$(BIN)/python -m benchmarks.attention_bench
	$(BIN)/python -m benchmarks.policy_divergence_bench
	$(BIN)/python -m benchmarks.policy_divergence_accuracy

bench-regress: build
	$(BIN)/python -m pytest benchmarks --benchmark-only

codegen: build
	$(BIN)/python -m benchmarks.codegen
	if [ -f $(dir $(LIBRARY))libral_cuda.so ]; then $(BIN)/python -m benchmarks.codegen.cuda; fi

codegen36: triton36
	$(VENV36)/bin/python -m benchmarks.codegen --architectures sm_90 --out benchmarks/results/codegen-triton-3.6.0.md

test-triton36: triton36
	RAL_REQUIRE=triton $(VENV36)/bin/python -m pytest -q tests/codegen/test_triton.py

triton36: $(VENV36)/installed.stamp
	@:

# No venv, no pip, no network: torch and triton are those of the machine.
gpu:
	$(PYTHON) -m benchmarks.gpu all --out $(OUT)

# Kernels by the Triton 3.6.0 that such a machine has; the newer ptxas is that of the release in .venv.
gpu-kit: build triton36
	RAL_GPU_PYTHON=$(GPU_PYTHON) $(VENV36)/bin/python -m benchmarks.gpu.kit make --seconds $(KIT_SECONDS) --ptxas \
	  "$$($(BIN)/python -c 'import triton; print(triton.__path__[0])')/backends/nvidia/bin/ptxas-blackwell"
	$(VENV36)/bin/python -m benchmarks.gpu.kit check

# The library needs the build tools alone: it is compiled while pip fetches the packages.
build:
	@$(MAKE) --no-print-directory -j2 library-and-packages

library-and-packages: $(LIBRARY) $(INSTALLED)
	@:

# The library is a file target, so that where there is no compiler each make looks for one anew.
$(LIBRARY): $(TOOLS) $(NATIVE_SOURCES)
	@echo "== native library"
	$(BIN)/python setup.py --quiet build_ext --inplace
	@if [ -f $@ ]; then touch $@; fi

# Without build isolation, so that constraints.txt holds for the build tools too and `setup.py build_ext` finds the
# same ones afterwards.
$(INSTALLED): $(TOOLS) pyproject.toml
	@echo "== $(VENV): packages of constraints.txt"
	RAL_BUILD_LATER=1 $(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

$(TOOLS): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed: make PYTHON=python3.x")'
	@echo "== $(VENV): build tools"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) setuptools cmake ninja
	@touch $@

# Last and without dependencies: triton, since torch may ask for another, and a numpy that its interpreter works with.
$(VENV36)/installed.stamp: constraints.txt
	@echo "== $(VENV36)"
	@[ -x $(VENV36)/bin/python ] || $(PYTHON) -m venv $(VENV36)
	$(PIP_INSTALL36) -c constraints.txt torch pytest pytest-xdist hypothesis pillow tqdm
	$(PIP_INSTALL36) --no-deps triton==3.6.0 numpy==2.2.6
	@touch $@

# pre-commit's hooks call the five targets below, so a commit is held to exactly what CI is. A tree without git, as
# from an archive, goes to them directly.
lint: $(INSTALLED)
	@if git rev-parse --git-dir >/dev/null 2>&1; then $(BIN)/pre-commit run --all-files; \
	else $(MAKE) --no-print-directory ruff-format ruff-check mypy clang-format cited-files; fi

ruff-format: $(INSTALLED)
	@$(BIN)/ruff format --check .

ruff-check: $(INSTALLED)
	@$(BIN)/ruff check .

mypy: $(INSTALLED)
	@$(BIN)/mypy

clang-format: $(INSTALLED)
	@find csrc -type f -name '*.[ch]*' -exec $(BIN)/clang-format --dry-run --Werror {} +

cited-files: $(INSTALLED)
	@$(BIN)/python -m tests.packaging.cited_files

clean:
	rm -rf build ral_kernels/lib *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
