# As musl-x86_64.cmake, for arm64.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER ${CMAKE_CURRENT_LIST_DIR}/zig_cxx.py)
set(CMAKE_CXX_COMPILER_TARGET aarch64-linux-musl)
