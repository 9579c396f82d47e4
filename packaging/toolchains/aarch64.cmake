# Compiles for Linux on arm64 elsewhere, with the compiler that Debian has in g++-aarch64-linux-gnu, and runs what was
# compiled with qemu-user.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
find_program(PYMTL_CROSS_COMPILER aarch64-linux-gnu-g++)
if(NOT PYMTL_CROSS_COMPILER)
  message(FATAL_ERROR "aarch64-linux-gnu-g++ was not found: install Debian's package g++-aarch64-linux-gnu")
endif()
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)
