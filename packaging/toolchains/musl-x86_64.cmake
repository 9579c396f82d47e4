# Compiles the runtime for Linux with musl (Alpine) by the package ziglang, which has that C library and a C++ one.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR x86_64)
set(CMAKE_CXX_COMPILER ${CMAKE_CURRENT_LIST_DIR}/zig_cxx.py)
set(CMAKE_CXX_COMPILER_TARGET x86_64-linux-musl)
set(CMAKE_SHARED_LINKER_FLAGS_INIT -s)
