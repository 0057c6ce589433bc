# Every target sets up what it needs in .venv, once. With PYTHON=some/python nothing is installed:
# that interpreter must have the dependencies of pyproject.toml.
VENV        ?= .venv
PYTHON      ?= $(VENV)/bin/python
BASE_PYTHON ?= python3
TORCH       ?= torch==2.13.0
CUTLASS     ?= nvidia-cutlass==4.2.0.0
PIP         := "$(PYTHON)" -m pip --disable-pip-version-check
DLLM        := "$(PYTHON)" -m dllm_kernels
TORCH_FITS  := from importlib.metadata import version; \
               assert tuple(map(int, version('torch').split('.')[:2])) >= (2, 11)
BUILD_NEEDS := $(shell sed -n '/^\[build-system\]/,/^$$/s/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
DEV_NEEDS   := $(shell sed -n 's/^dev = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
DOCS_NEEDS  := $(shell sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)

ifneq ($(words $(VENV)),1)
$(error VENV is '$(VENV)'; allowed: a path without spaces)
endif

CLANG_FILES := 'csrc/*' 'tools/*.cpp' 'simt/*.cpp' 'simt/*.h' 'simt/*.cuh' 'simt/*.cu'

ifeq ($(PYTHON),$(VENV)/bin/python)
INSTALLED := $(VENV)/.installed
DEV_TOOLS := $(VENV)/.dev-tools
DOCS_TOOLS := $(VENV)/.docs-tools
HEADERS   := $(VENV)/.cutlass
endif

.PHONY: help demo test fuzz lint types format docs figures pictures bench cuda gpu-check gpu-sanitize asan build clean
.DEFAULT_GOAL := help

help:       ## this list
	@sed -n 's/^\([a-z-]*\):.*##/  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: build        ## write, add and fill gaps with the embedded model, beside the plain loop
	@$(DLLM) demo

test: build        ## the test suite (without a GPU, CUDA kernels run on the emulator); ARGS="-m slow": the slow sweeps
	"$(PYTHON)" -m pytest -q -n logical --dist loadfile $(ARGS)

fuzz: build        ## random calls of operators and sampler for SECONDS=120; ARGS="--seed 7", ARGS="--case 7:1234"
	"$(PYTHON)" tools/fuzz.py --seconds $(or $(SECONDS),120) $(ARGS)

lint: $(DEV_TOOLS) ## ruff and clang-format, in the versions that pyproject.toml pins
	"$(PYTHON)" -m ruff check .
	"$(PYTHON)" -m ruff format --check .
	git ls-files $(CLANG_FILES) | xargs "$$(dirname "$(PYTHON)")/clang-format" --dry-run -Werror

types: $(DEV_TOOLS) $(INSTALLED) ## mypy on the public modules, which pyproject.toml lists
	"$(PYTHON)" -m mypy

format: $(DEV_TOOLS) ## what lint checks, applied
	"$(PYTHON)" -m ruff check --fix .
	"$(PYTHON)" -m ruff format .
	git ls-files $(CLANG_FILES) | xargs "$$(dirname "$(PYTHON)")/clang-format" -i

docs: $(DOCS_TOOLS) ## the documentation site into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 "$(PYTHON)" -m mkdocs build --strict --quiet

figures: $(INSTALLED) ## measured figures into README.md, docs and plots; ARGS=--check says which are out of date
	"$(PYTHON)" tools/figures.py $(ARGS)

pictures: build    ## the pictures of README.md and docs, from real runs; needs Chromium; ARGS=live: that one
	"$(PYTHON)" tools/pictures.py $(ARGS)

bench: build       ## benchmarks against what a user would otherwise run; ARGS="-k attention", ARGS=--smoke
	"$(PYTHON)" -m pytest -q benchmarks $(ARGS)

cuda: $(DEV_TOOLS) $(INSTALLED) $(HEADERS) ## the CUDA library for 80 and 90a on any machine with nvcc, with its compile gates
	DLLM_CUDA=ON DLLM_CUDA_ARCHS="80;90a" "$(PYTHON)" setup.py -q build_ext --inplace
	"$(PYTHON)" tools/cuda_gates.py build

gpu-check:         ## on a GPU machine: tests/cuda and GPU benchmarks; results in $OUT, else benchmarks/results
	bash tools/gpu.sh check

gpu-sanitize:      ## on a GPU machine: tests/cuda under compute-sanitizer
	bash tools/gpu.sh sanitize

asan: $(INSTALLED) ## CPU operators under address and undefined-behaviour sanitizers
	bash tools/asan.sh "$(PYTHON)" $(ARGS)

build: $(INSTALLED) ## compile what changed into dllm_kernels/lib
	@"$(PYTHON)" setup.py -q build_ext --inplace

clean:             ## everything that was built, but not .venv
	rm -rf build dist site dllm_kernels/lib *.egg-info .*_cache .hypothesis .benchmarks

# One line says what a step of the set-up does, before the minutes that it may take. The kernels are compiled
# before pip installs the package, since pip would show nothing of it.
$(VENV)/bin/pip:
	@echo "set-up 1 of 4: a virtual environment in $(VENV)"
	@$(BASE_PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(VENV)/bin/pip
	@echo "set-up 2 of 4: $(TORCH), a large download unless it is there"
	@"$(PYTHON)" -c "$(TORCH_FITS)" 2>/dev/null || $(PIP) install -q "$(TORCH)"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py MANIFEST.in
	@echo "set-up 3 of 4: compiling the kernels, a few minutes the first time"
	@$(PIP) install -q $(BUILD_NEEDS)
	@"$(PYTHON)" setup.py -q build_ext --inplace
	@echo "set-up 4 of 4: the package and what its tests and recipes need"
	@$(PIP) install -q --no-build-isolation -e '.[test]'
	@touch $@

$(VENV)/.dev-tools: pyproject.toml | $(VENV)/bin/pip
	@echo "set-up: linters"
	@$(PIP) install -q $(DEV_NEEDS)
	@touch $@

# Headers alone: what the wheel declares beside them is not needed.
$(VENV)/.cutlass: Makefile | $(VENV)/bin/pip
	@echo "set-up: headers of CUTLASS"
	@$(PIP) install -q --no-deps "$(CUTLASS)"
	@touch $@

$(VENV)/.docs-tools: pyproject.toml | $(VENV)/bin/pip
	@echo "set-up: what builds the pages of docs/"
	@$(PIP) install -q $(DOCS_NEEDS)
	@touch $@
