# Every target sets up what it needs in .venv, again only when its inputs have changed.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py setup_cuda.py pyproject.toml $(wildcard csrc/common/* csrc/cpu/*)
CUDA_SOURCES := setup_cuda.py $(wildcard csrc/common/* csrc/cuda/*)
STYLED := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh examples/*/*.cpp tests/*.cpp) \
	$(wildcard $(addprefix tests/cuda_on_cpu/,*.cpp *.h *.cu */*.cu */*.cuh */*.h))
RESULTS := benchmarks/results
CASES := resnet18:16:fp32 resnet18:1:fp32 resnet50:16:fp32 resnet50:1:fp32 \
	resnext50_32x4d:16:fp32 wide_resnet50_2:16:fp32 \
	resnet18:16:bf16 resnet18:1:bf16 resnet50:16:bf16 resnet50:1:bf16 \
	resnext50_32x4d:16:bf16 wide_resnet50_2:16:bf16
TRAINING := resnet18:112:fp32 resnet18:224:fp32 resnet50:112:fp32 resnet18:112:bf16

.PHONY: demo test test-triton fuzz mutate sanitize sanitize-threads sanitize-cuda lint format bench \
	gpu clean

demo: .venv/.ready
	$(BIN)/python benchmarks/demo.py

test: .venv/.ready .venv/.cuda
	$(BIN)/python tests/cuda_on_cpu/build.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --ignore tests/test_speedup.py
	$(MAKE) --no-print-directory test-triton
	$(BIN)/python -m pytest -q tests/test_speedup.py

# Triton's kernels on CPU tensors, in its interpreter: that wants a process of its own.
test-triton: .venv/.ready
	TRITON_INTERPRET=1 RESNET_FUSED_NO_NATIVE=1 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -q -n auto \
			tests/test_triton_ops.py tests/test_triton_train.py tests/test_triton_models.py \
			tests/test_triton_tune.py

# Random networks, any number of them; make test runs the first thousand of seed 0.
N ?= 5000
SEED ?= 1
fuzz: .venv/.ready
	$(BIN)/python tests/fuzz/fuzz.py --cases $(N) --seed $(SEED) $(FUZZ_ARGS)

# The kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, with a build of its own;
# without those that judge rounding alone.
SANITIZED := build/sanitized
sanitize: $(SANITIZED)/.ready
	rm -f $(SANITIZED)/report.*
	PYTHONPATH=$(CURDIR)/$(SANITIZED)/lib RESNET_FUSED_POOL_BYTES=0 OMP_NUM_THREADS=1 \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:log_path=$(CURDIR)/$(SANITIZED)/report \
	UBSAN_OPTIONS=print_stacktrace=1:log_path=$(CURDIR)/$(SANITIZED)/report \
		$(BIN)/pytest -q -n auto -p no:cacheprovider \
		-k "not within_eagers_budget and not scaled_gradients and not within_a_quarter \
			and not root_mean_square and not many_channels and not many_passes[200 \
			and not gradcheck and not opcheck" \
		$(wildcard $(addprefix tests/test_, \
			conv_kinds.py head.py hostile_arguments.py max_pool.py ops.py overwrite.py \
			packed_conv.py packed_conv_op.py running_statistics.py train_bfloat16.py \
			train_block.py train_call.py train_conv.py train_pool.py)) \
		|| { cat $(SANITIZED)/report.*; exit 1; }

$(SANITIZED)/.ready: .venv/.packages $(SOURCES) $(wildcard resnet_fused/*.py resnet_fused/*/*.py)
	RESNET_FUSED_SANITIZE=memory RESNET_FUSED_NO_CUDA_BUILD=1 $(BIN)/python setup.py -q build \
		--build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	touch $@

# The threaded tests under ThreadSanitizer, with a build of its own; of the options that change no
# thread's work one. pytest's workers do not hand on
# their exit status, so it is the reports that are asked for.
RACES := build/sanitized_threads
sanitize-threads: $(RACES)/.ready
	rm -f $(RACES)/report.*
	PYTHONPATH=$(CURDIR)/$(RACES)/lib OMP_NUM_THREADS=4 MKL_NUM_THREADS=4 \
	LD_PRELOAD="$$(gcc -print-file-name=libtsan.so) $$(gcc -print-file-name=libstdc++.so)" \
	TSAN_OPTIONS="log_path=$(CURDIR)/$(RACES)/report suppressions=$(CURDIR)/tests/thread_sanitizer.supp report_mutex_bugs=0" \
		$(BIN)/pytest -q -n auto -p no:cacheprovider \
			-k "not child and not workers and not low and not frozen and not momentum \
				and not uncounted and not untracked and not cumulative" \
		$(addprefix tests/test_, thread_sanitizer.py threads.py \
			packed_conv.py::test_same_bits_for_any_thread_count head.py::test_average \
			train_conv.py::test_random_steps train_conv.py::test_many_passes[64-winograd4] \
			train_conv.py::test_repeats_are_the_same_bits train_pool.py::test_max_pool_of_an_activation \
			train_call.py::test_one_call_gives_the_bits_of_its_steps \
			running_statistics.py::test_running_statistics) \
		&& ! ls $(RACES)/report.* 2>/dev/null \
		|| { cat $(RACES)/report.*; exit 1; }

$(RACES)/.ready: .venv/.packages $(SOURCES) $(wildcard resnet_fused/*.py resnet_fused/*/*.py)
	RESNET_FUSED_SANITIZE=threads RESNET_FUSED_NO_CUDA_BUILD=1 $(BIN)/python setup.py -q build \
		--build-base $(RACES) --build-lib $(RACES)/lib
	touch $@

# The CUDA kernels' tests on the CPU (tests/cuda_on_cpu): under AddressSanitizer; with every access to
# memory watched, for races; and with threads in other orders.
CUDA_TESTS := $(wildcard $(addprefix tests/test_cuda_, \
	conv.py ops.py pack.py pool.py running_statistics.py train_conv.py))
CUDA_PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto -p no:cacheprovider $(CUDA_TESTS)
sanitize-cuda: .venv/.ready
	rm -f build/cuda_on_cpu/asan/report.*
	$(BIN)/python tests/cuda_on_cpu/build.py --mode asan
	RESNET_FUSED_CUDA_MODE=asan \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:log_path=$(CURDIR)/build/cuda_on_cpu/asan/report \
		$(CUDA_PYTEST) tests/test_cuda_hostile_arguments.py \
		|| { cat build/cuda_on_cpu/asan/report.*; exit 1; }
	$(BIN)/python tests/cuda_on_cpu/build.py --mode watch
	RESNET_FUSED_CUDA_MODE=watch $(CUDA_PYTEST)
	RESNET_FUSED_CUDA_ORDER=reverse $(CUDA_PYTEST)
	RESNET_FUSED_CUDA_ORDER=random:1 $(CUDA_PYTEST)

# Plants the faults of tests/mutation, one at a time: the tests have to notice.
mutate: .venv/.ready
	PYTHONPATH=.:tests $(BIN)/python -m mutation.run --json $(RESULTS)/mutation.json

lint: .venv/.packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(STYLED)

format: .venv/.packages
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(STYLED)

# The figures of the README, one file each.
bench: .venv/.ready
	for case in $(CASES); do set -- $$(echo $$case | tr : ' '); \
		$(BIN)/resnet-fused bench $$1 --batch-size $$2 --dtype $$3 --peers all \
			--json $(RESULTS)/cpu_$$1_b$$2_$$3.json || exit 1; done
	$(BIN)/python benchmarks/bench_conv_bn_act.py --json $(RESULTS)/cpu_layers_b16_fp32.json \
		--plot $(RESULTS)/cpu_layers_b16_fp32.png
	for case in $(TRAINING); do set -- $$(echo $$case | tr : ' '); \
		$(BIN)/resnet-fused bench $$1 --batch-size 16 --image-size $$2 --dtype $$3 --mode training \
			--peers channels_last,compile,fused_low \
			--json $(RESULTS)/cpu_training_$$1_$$2_$$3.json || exit 1; done

# On a machine with a GPU: uses PYTHON's own packages, so that its CUDA build of torch is measured. A
# red test does not keep the benchmark from running, which may be all that the machine is there for.
# The CUDA library is built for this GPU alone; without nvcc Triton's kernels are left. The CPU's have
# no part in this. The options of pytest in pyproject.toml need plug-ins that may be missing.
# With SANITIZE=1 some of the tests run once more under each tool of NVIDIA's compute-sanitizer, and
# the library is built with line numbers for its reports.
BUDGET ?= 240
TEST_SECONDS ?= 150
SANITIZE_SECONDS ?= 240
SANITIZED_GPU := $(filter 1,$(SANITIZE))
OUT ?= $(RESULTS)
GPU_ARGS ?=
GPU_ENV := RESNET_FUSED_NO_NATIVE=1 RESNET_FUSED_CACHE_DIR=$(CURDIR)/build/gpu_cache
# The most valuable first: networks, then kernels, then what a CPU can show as well.
GPU_TESTS := tests/test_triton_gpu.py \
	$(filter-out %gate.py %on_cpu.py %build.py,$(wildcard tests/test_cuda_*.py)) \
	$(addprefix tests/test_, triton_ops.py triton_train.py triton_models.py cuda_build.py \
	capture.py triton_tune.py gpu_choice.py)
gpu:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null \
		|| { echo "make gpu: torch of $(PYTHON) sees no CUDA GPU; nothing to run"; exit 0; } \
		&& $(MAKE) --no-print-directory gpu-run

.PHONY: gpu-run
gpu-run:
	@$(PYTHON) -c 'import pathlib, shutil, sys, sysconfig; \
		header = pathlib.Path(sysconfig.get_path("include"), "Python.h"); \
		sys.exit(not (header.exists() and any(map(shutil.which, ("gcc", "clang")))))' \
		|| echo "make gpu: Triton needs gcc or clang, and Python.h, to start its kernels"
	@build=done; tests=passed; sanitizers=passed; bench=passed; \
	$(if $(SANITIZED_GPU),export NVCC_APPEND_FLAGS="$$NVCC_APPEND_FLAGS -lineinfo";) \
	RESNET_FUSED_CUDA_ARCHS=native $(PYTHON) setup_cuda.py || build=failed; \
	workers=$$($(PYTHON) -c 'import os, xdist; print("-n", max(1, min(14, os.cpu_count() - 2)))' \
		2>/dev/null); \
	$(GPU_ENV) TORCHINDUCTOR_COMPILE_THREADS=1 timeout -s INT -k 20 $(TEST_SECONDS) \
		$(PYTHON) -m pytest -q -o addopts=-ra --durations=8 $$workers $(GPU_TESTS) \
		|| tests="failed, or took over $(TEST_SECONDS) s"; \
	$(if $(SANITIZED_GPU),$(GPU_ENV) $(PYTHON) benchmarks/sanitize_gpu.py \
		--seconds $(SANITIZE_SECONDS) || sanitizers=failed;) \
	$(GPU_ENV) PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --budget $(BUDGET) --out $(OUT) $(GPU_ARGS) || bench=failed; \
	echo "make gpu: build $$build; tests $$tests;$(if $(SANITIZED_GPU), \
		sanitizers $$sanitizers;) benchmark $$bench"; \
	test "$$build" = done -a "$$tests" = passed -a "$$sanitizers" = passed -a "$$bench" = passed

clean:
	rm -rf .venv build *.egg-info resnet_fused/_C_*.so .pytest_cache .mypy_cache .ruff_cache

# torchvision and timm would pull another torch: they come without their dependencies.
.venv/.packages: requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps torchvision==0.28.0 timm
	touch $@

.venv/.ready: .venv/.packages $(SOURCES)
	RESNET_FUSED_NO_CUDA_BUILD=1 $(BIN)/python -m pip install -q --disable-pip-version-check \
		--no-build-isolation --no-deps -e .
	touch $@

# By itself, and only what has changed: pip would compile the CPU's library anew as well.
.venv/.cuda: .venv/.packages $(CUDA_SOURCES)
	$(BIN)/python setup_cuda.py
	touch $@
