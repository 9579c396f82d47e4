// The instruction sets the kernels are compiled for, and the one in use. Chosen once, at the first
// call: the best the CPU has, or the one named by the environment variable PYMTL_ISA.
#pragma once

#include <string>
#include <vector>

namespace pymtl {

// avx2_vnni, avx512_vnni, neon_dotprod: with products of 8-bit integers; avx512_bf16: besides, of bfloat16 numbers;
// amx: besides, of tiles of 8-bit integers.
enum class Isa { baseline, avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16, amx, neon, neon_dotprod };

const char* isa_name(Isa isa);

// Every instruction set this library holds kernels for, slowest first.
std::vector<Isa> compiled_isas();

// Those of compiled_isas() that this CPU can run, slowest first; never empty.
std::vector<Isa> available_isas();

// The one in use. Throws std::runtime_error if PYMTL_ISA names one that is unknown or that the CPU lacks.
Isa active_isa();

// Makes `name` the one in use from the next kernel call on. Throws std::invalid_argument if the name is
// unknown and std::runtime_error if this CPU or this build lacks it. Not for use while kernels run.
void force_isa(const std::string& name);

}  // namespace pymtl
