# Two commands do everything: `make demo` and `make test`. Each makes .venv first if there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Pinned, and torch before all: an open range would take gigabytes of CUDA packages on a machine
# without a GPU, and so would a build in isolation, hence --no-build-isolation.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)

.PHONY: demo test test-all bench verify sanitize gpu lint format clean
.DELETE_ON_ERROR:

# Where there is no GPU the demo does without the CUDA kernels, and makes the CPU's for this machine
# alone: it shall not take long to see something.
GPU := $(wildcard /dev/nvidia0 /dev/dxg)

demo: $(VENV)/$(if $(GPU),built,built-for-cpu)
	$(BIN)/python -m fastseq demo

# Two files at a time, each on one core: a file's tests share what they compiled.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test: $(VENV)/built lint
	$(PYTEST) -m "not gpu and not slow"

test-all: $(VENV)/built lint
	$(PYTEST) -m "not gpu"

bench: $(VENV)/built
	$(BIN)/python -m benchmarks --suite cpu

verify: $(VENV)/built
	$(BIN)/python -m fastseq verify

# On a machine with a GPU and no network: its own Python, torch, triton and nvcc; results into OUT.
OUT ?= benchmarks/results/gpu
BUDGET ?= 500
PARTS ?= build,verify,tests,sanitizer,suite
gpu:
	$(PYTHON) -m benchmarks.gpu --out $(OUT) --budget $(BUDGET) --parts $(PARTS)

# The CPU kernels of every instruction set under the address and undefined-behaviour sanitizers, in a
# copy of the tree: some ten minutes, most of them the compiler's.
sanitize: $(VENV)/installed-dev
	rm -rf build/sanitize && mkdir -p build/sanitize
	git archive HEAD | tar -x -C build/sanitize
	cd build/sanitize && FASTSEQ_CUDA=0 FASTSEQ_SANITIZE=1 $(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	cd build/sanitize && for isa in avx512_bf16 avx512 avx2 generic; do \
	  FASTSEQ_CPU_ISA=$$isa ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  $(CURDIR)/$(BIN)/python -m fastseq verify --backend cpu || exit 1; done

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)

$(VENV)/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip setuptools wheel
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q $(TRITON) -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

INSTALL := $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .

$(VENV)/built: $(VENV)/installed-dev $(SOURCES)
	$(INSTALL)
	touch $@ $(VENV)/built-for-cpu

$(VENV)/built-for-cpu: $(VENV)/installed $(SOURCES)
	FASTSEQ_CUDA=0 FASTSEQ_NATIVE=1 $(INSTALL)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastseq/_C*.so
