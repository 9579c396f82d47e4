#!/usr/bin/env python3
"""The C++ compiler of the package ziglang, told of processors as GCC and Clang are."""

import os
import sys

# Zig writes x86_64 for x86-64, and knows arm64 processors by their names: Linux's least is `generic`.
SPELLED = {
    "-march=x86-64": ["-march=x86_64"],
    "-march=armv8-a": ["-mcpu=generic"],
    "-march=armv8.2-a+dotprod": ["-mcpu=generic+dotprod"],
}

if __name__ == "__main__":
    arguments = [word for argument in sys.argv[1:] for word in SPELLED.get(argument, [argument])]
    # -I: pip, when it builds, hides the environment's packages by PYTHONPATH.
    os.execv(sys.executable, [sys.executable, "-I", "-m", "ziglang", "c++", *arguments])
