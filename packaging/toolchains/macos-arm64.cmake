# Compiles the runtime for Macs with an arm64 processor by the package ziglang, which has what macOS's C library declares.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_CXX_COMPILER ${CMAKE_CURRENT_LIST_DIR}/zig_cxx.py)
set(CMAKE_CXX_COMPILER_TARGET aarch64-macos.11.0)
set(CMAKE_SHARED_LINKER_FLAGS_INIT -s)
