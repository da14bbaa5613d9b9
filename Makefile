# make run     run the frames sweep; a fresh clone needs Python >= 3.10 and a C++ compiler
# make test    run the quick tier of the tests (tests/README.md)        make test-all    run the whole suite
# make coverage run the whole suite and name the lines of the packages that no test runs
# make conformance    compare with torch, flash-attention and transformers, into docs/conformance.md
# make docs    build the site of the documents into build/site
# make lint    check format, style and types, as pre-commit does
# make bench   measure the CPU figures       make bench-regress    run the pytest-benchmark suite
#
# make sanitize run ASan, UBSan and TSan over every CPU variant of this machine
# make fuzz    try random calls, valid and malformed, for FUZZ_MINUTES (10), watched by ASan and UBSan
#
# make codegen report what the Triton kernels compile to, without a GPU: benchmarks/results/codegen.md
# make codegen36, make test-triton36    report and test the same on sm_90 with Triton 3.6.0, in .venv-triton36
# make test-verl    run the RAL term inside verl's own update, on the CPU, in .venv-verl: docs/verl.md
# make test-trl TRL=1.15.0    run the tests of the trainer with another version of TRL, in .venv-trl-1.15.0
# make test-deepspeed    test two processes under DeepSpeed's ZeRO-2 and ZeRO-3, in .venv-deepspeed
# make test-vllm    train with rollouts of a real vLLM, on the CPU, in .venv-vllm: docs/vllm.md
# make hub     lay the package out as the Hub's `kernels` loads it, into build/hub
# make wheel   build the wheel that serves every Python, torch and glibc from 2.28 on, into dist/
#
# make gpu     run all that needs a GPU, with the machine's own $(PYTHON), into the folder OUT
# make gpu-kit pack what a GPU machine needs when its minutes count: benchmarks/gpu/README.md
#
# The other targets run in .venv, with the versions of constraints.txt. PYTHON chooses the interpreter.
# pip compiles nothing to bytecode: Python does it for what is imported. Many images forbid bytecode with a variable.
# The Makefile takes it away, because each process of the tests would then compile transformers anew, for 15 s.

PYTHON ?= python3
VENV ?= .venv
VENV36 ?= .venv-triton36
TRL ?= 1.15.0
VENV_TRL ?= .venv-trl-$(TRL)
VENV_DEEPSPEED ?= .venv-deepspeed
TIER ?= all
OUT ?= benchmarks/results/local/gpu-run
GPU_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) python3.12)
KIT_SECONDS ?= 600
FUZZ_MINUTES ?= 10
JOBS := $(or $(MAX_JOBS),$(CMAKE_BUILD_PARALLEL_LEVEL),$(shell nproc))
BIN := $(VENV)/bin
TOOLS := $(VENV)/tools.stamp
INSTALLED := $(VENV)/installed.stamp
DOCUMENTED := $(VENV)/documented.stamp
LIBRARY := ral_kernels/lib/libral_cpu.so
SANITIZED := build/sanitized
NATIVE_SOURCES := setup.py CMakeLists.txt $(shell find csrc -type f -name '*.[ch]*')
PIP := -m pip install --quiet --disable-pip-version-check --no-compile
PIP_INSTALL := $(BIN)/python $(PIP) -c constraints.txt
PIP_INSTALL36 := $(VENV36)/bin/python $(PIP)

unexport PYTHONDONTWRITEBYTECODE
.DELETE_ON_ERROR:
.PHONY: run test test-all coverage conformance sanitize fuzz docs lint bench bench-regress codegen codegen36 test-triton36 triton36 test-verl test-vllm test-trl test-deepspeed gpu gpu-kit wheel hub build library-and-packages clean ruff-format ruff-check mypy clang-format cited-files

run: build
	$(BIN)/python -m benchmarks.frames_sweep

test: build
	$(BIN)/python -m pytest -q -n auto --dist loadgroup --tier quick

# TIER=rest leaves out what `make test` runs.
test-all: build
	$(BIN)/python -m pytest -q -n auto --dist loadgroup --tier $(TIER)

coverage: build
	$(BIN)/python -m pytest -q -n auto --dist loadgroup --tier $(TIER) --cov --cov-report=term-missing:skip-covered

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
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(SANITIZED)/cmake --target ral_cpu --parallel $(JOBS)

# Any server shows it: the site asks for nothing from elsewhere.
docs: $(DOCUMENTED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

conformance: build
	$(BIN)/python -m tests.conformance

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

test-verl: $(LIBRARY) .venv-verl/installed.stamp
	.venv-verl/bin/python -m pytest -q -p no:cacheprovider tests/engines/verl

test-trl: build $(VENV_TRL)/installed.stamp
	$(VENV_TRL)/bin/python -m pytest -q tests/trainer -n auto --dist loadgroup --tier $(TIER)

test-deepspeed: build $(VENV_DEEPSPEED)/installed.stamp
	RAL_REQUIRE=deepspeed $(VENV_DEEPSPEED)/bin/python -m pytest -q tests/trainer/test_deepspeed.py

# The folder's own conftest sets what vLLM needs of the environment. What vLLM and torch trace at DEBUG is no help.
test-vllm: $(LIBRARY) .venv-vllm/installed.stamp
	.venv-vllm/bin/python -m pytest -q --show-capture=no -p no:cacheprovider tests/engines/vllm

# It uses the machine's own torch and Triton: no venv, no pip, no network.
gpu:
	$(PYTHON) -m benchmarks.gpu all --out $(OUT)

# The kernels are compiled by Triton 3.6.0, as such a machine has it. The newer ptxas is that of .venv.
gpu-kit: build triton36
	RAL_GPU_PYTHON=$(GPU_PYTHON) $(VENV36)/bin/python -m benchmarks.gpu.kit make --seconds $(KIT_SECONDS) --ptxas \
	  "$$($(BIN)/python -c 'import triton; print(triton.__path__[0])')/backends/nvidia/bin/ptxas-blackwell"
	$(VENV36)/bin/python -m benchmarks.gpu.kit check

# auditwheel refuses a library that needs more than the platform has, and names the lowest platforms that do.
# No container is needed: what GCC 12 on glibc 2.36 makes needs glibc 2.27 (CMakeLists.txt says how).
WHEEL_PLATFORM ?= manylinux_2_28_x86_64

wheel: build
	rm -rf build/lib build/bdist.* build/wheel dist/*.whl
	RAL_REQUIRE_NATIVE=1 $(BIN)/python setup.py --quiet bdist_wheel --dist-dir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat $(WHEEL_PLATFORM) --wheel-dir dist build/wheel/*.whl
	@ls -l dist/*.whl

hub: build
	$(BIN)/python -m hub.layout

# The library needs only the build tools, so it is compiled while pip fetches the packages.
build:
	@$(MAKE) --no-print-directory -j2 library-and-packages

library-and-packages: $(LIBRARY) $(INSTALLED)
	@:

# The library is a file target: where there is no compiler, each make looks for one again.
$(LIBRARY): $(TOOLS) $(NATIVE_SOURCES)
	@echo "== native library"
	$(BIN)/python setup.py --quiet build_ext --inplace
	@if [ -f $@ ]; then touch $@; fi

# Build isolation is off, so that constraints.txt holds for the build tools too. `setup.py build_ext` needs the same
# ones afterwards.
$(INSTALLED): $(TOOLS) pyproject.toml
	@echo "== $(VENV): packages of constraints.txt"
	RAL_BUILD_LATER=1 $(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

$(DOCUMENTED): $(INSTALLED)
	@echo "== $(VENV): packages of the site"
	RAL_BUILD_LATER=1 $(PIP_INSTALL) --no-build-isolation -e '.[dev,docs]'
	@touch $@

$(TOOLS): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed: make PYTHON=python3.x")'
	@echo "== $(VENV): build tools"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) setuptools cmake ninja
	@touch $@

# Triton comes last and without dependencies, because torch may ask for another. Its interpreter needs this numpy.
$(VENV36)/installed.stamp: constraints.txt
	@echo "== $(VENV36)"
	@[ -x $(VENV36)/bin/python ] || $(PYTHON) -m venv $(VENV36)
	$(PIP_INSTALL36) -c constraints.txt torch pytest pytest-xdist hypothesis pillow tqdm
	$(PIP_INSTALL36) --no-deps triton==3.6.0 numpy==2.2.6
	@touch $@

# torch comes first and with its dependencies: which build it is, the machine's package index decides.
.venv-verl/installed.stamp .venv-vllm/installed.stamp: .venv-%/installed.stamp: constraints-%.txt
	@echo "== $(@D): packages of $<"
	@[ -x $(@D)/bin/python ] || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP) -c $< "$$(grep '^torch==' constraints.txt)"
	$(@D)/bin/python $(PIP) --no-deps -r $<
	@touch $@

# An environment that has the packages of .venv, and others before them. A path file adds those, with their own path files.
define venv-beside
@echo "== $(@D)"
@[ -x $(@D)/bin/python ] || $(BIN)/python -m venv $(@D)
@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
  > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/of_venv.pth"
endef

$(VENV_TRL)/installed.stamp: $(INSTALLED)
	$(venv-beside)
	$(@D)/bin/python $(PIP) --no-deps trl==$(TRL)
	@touch $@

# DS_BUILD_OPS=0: nothing is compiled.
$(VENV_DEEPSPEED)/installed.stamp: constraints-deepspeed.txt $(INSTALLED)
	$(venv-beside)
	$(@D)/bin/python $(PIP) -c constraints.txt setuptools
	DS_BUILD_OPS=0 $(@D)/bin/python $(PIP) --no-deps --no-build-isolation -r constraints-deepspeed.txt
	@touch $@

# The hooks of pre-commit call the five targets below, so a commit must pass exactly what CI checks. A tree without git,
# as from an archive, calls them directly.
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
