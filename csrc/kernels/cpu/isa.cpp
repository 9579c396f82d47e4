#include "../isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace pymtl {

#if defined(__x86_64__)
extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const LayersFor<BFloat16> bfloat16_baseline;
extern const LayersFor<BFloat16> bfloat16_avx2;
extern const LayersFor<BFloat16> bfloat16_avx512;
extern const LayersFor<BFloat16> bfloat16_avx512_bf16;
extern const NarrowRnn int8_baseline;
extern const NarrowRnn int8_avx2;
extern const NarrowRnn int8_avx2_vnni;
extern const NarrowRnn int8_avx512;
extern const NarrowRnn int8_avx512_vnni;
extern const NarrowRnn int8_amx;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
extern const LayersFor<BFloat16> bfloat16_neon;
extern const NarrowRnn int8_neon;
extern const NarrowRnn int8_neon_dotprod;
#endif

namespace {

struct Entry {
  Isa isa;
  const char* name;
  const Kernels* kernels;  // null: not compiled for this architecture
  const LayersFor<BFloat16>* bfloat16;
  const NarrowRnn* int8;
};

#if defined(__x86_64__)
constexpr Entry kEntries[] = {
    {Isa::baseline, "baseline", &kernels_baseline, &bfloat16_baseline, &int8_baseline},
    {Isa::avx2, "avx2", &kernels_avx2, &bfloat16_avx2, &int8_avx2},
    {Isa::avx2_vnni, "avx2_vnni", &kernels_avx2, &bfloat16_avx2, &int8_avx2_vnni},
    {Isa::avx512, "avx512", &kernels_avx512, &bfloat16_avx512, &int8_avx512},
    {Isa::avx512_vnni, "avx512_vnni", &kernels_avx512, &bfloat16_avx512, &int8_avx512_vnni},
    {Isa::avx512_bf16, "avx512_bf16", &kernels_avx512, &bfloat16_avx512_bf16, &int8_avx512_vnni},
    {Isa::amx, "amx", &kernels_avx512, &bfloat16_avx512_bf16, &int8_amx},
    {Isa::neon, "neon", nullptr, nullptr, nullptr},
    {Isa::neon_dotprod, "neon_dotprod", nullptr, nullptr, nullptr}};
#elif defined(__aarch64__)
constexpr Entry kEntries[] = {{Isa::baseline, "baseline", nullptr, nullptr, nullptr},
                              {Isa::avx2, "avx2", nullptr, nullptr, nullptr},
                              {Isa::avx2_vnni, "avx2_vnni", nullptr, nullptr, nullptr},
                              {Isa::avx512, "avx512", nullptr, nullptr, nullptr},
                              {Isa::avx512_vnni, "avx512_vnni", nullptr, nullptr, nullptr},
                              {Isa::avx512_bf16, "avx512_bf16", nullptr, nullptr, nullptr},
                              {Isa::amx, "amx", nullptr, nullptr, nullptr},
                              {Isa::neon, "neon", &kernels_neon, &bfloat16_neon, &int8_neon},
                              {Isa::neon_dotprod, "neon_dotprod", &kernels_neon, &bfloat16_neon, &int8_neon_dotprod}};
#endif

#if defined(__x86_64__)
constexpr int kTileData = 18;  // XFEATURE_XTILEDATA

// __builtin_cpu_supports of GCC 12 does not know its name. The registers are those of AVX2.
bool has_avx_vnni() {
  unsigned int a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
}

// Whether there are tiles and their products of 8-bit integers, and Linux knows how to save them.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned int kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr int kSupported = 0x1021;  // ARCH_GET_XCOMP_SUPP
  unsigned int a = 0, b = 0, c = 0, d = 0;
  uint64_t states = 0;
  const bool there = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kTile) != 0 && (d & kInt8) != 0;
  return there && syscall(SYS_arch_prctl, kSupported, &states) == 0 && (states & (uint64_t{1} << kTileData)) != 0;
#else
  return false;
#endif
}

// Asks Linux for tiles: not before they are needed, since signal handlers' stacks of this process have to be larger
// from then on. It refuses where one is too small already.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequest = 0x1023;  // ARCH_REQ_XCOMP_PERM
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

bool cpu_has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    case Isa::avx2_vnni:
      return cpu_has(Isa::avx2) && has_avx_vnni();
    case Isa::avx512_vnni:
      return cpu_has(Isa::avx512) && __builtin_cpu_supports("avx512vnni");
    case Isa::avx512_bf16:
      return cpu_has(Isa::avx512_vnni) && __builtin_cpu_supports("avx512bf16");
    case Isa::amx:
      return cpu_has(Isa::avx512_bf16) && has_amx();
    case Isa::neon:
    case Isa::neon_dotprod:
      return false;
  }
  return false;
#else
#if defined(__linux__)
  const bool has_dotprod = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  constexpr bool has_dotprod = true;  // every Mac with an arm64 processor
#endif
  return isa == Isa::neon || (isa == Isa::neon_dotprod && has_dotprod);
#endif
}

std::string names_of(const std::vector<Isa>& isas) {
  std::string names;
  for (const Isa isa : isas) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  return names;
}

const Entry& entry_named(const std::string& name) {
  for (const Entry& entry : kEntries) {
    if (name != entry.name) continue;
    if (entry.kernels == nullptr) {
      throw std::runtime_error("instruction set '" + name + "': this build has no kernels for it, only for " +
                               names_of(compiled_isas()));
    }
    if (!cpu_has(entry.isa)) {
      throw std::runtime_error("instruction set '" + name + "': this CPU does not have it, only " +
                               names_of(available_isas()));
    }
    return entry;
  }
  throw std::invalid_argument("instruction set '" + name + "' is unknown: expected one of " +
                              names_of(compiled_isas()));
}

const Entry& chosen_at_start() {
  const char* const forced = std::getenv("PYMTL_ISA");
  if (forced != nullptr && *forced != '\0') {
    try {
      return entry_named(forced);
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string("PYMTL_ISA: ") + error.what());
    }
  }
  return entry_named(isa_name(available_isas().back()));
}

std::atomic<const Entry*> active{nullptr};

const Entry& active_entry() {
  const Entry* entry = active.load(std::memory_order_acquire);
  if (entry == nullptr) {
    entry = &chosen_at_start();
    active.store(entry, std::memory_order_release);
  }
  return *entry;
}

}  // namespace

const char* isa_name(Isa isa) {
  for (const Entry& entry : kEntries) {
    if (entry.isa == isa) return entry.name;
  }
  return "unknown";
}

std::vector<Isa> compiled_isas() {
  std::vector<Isa> isas;
  for (const Entry& entry : kEntries) {
    if (entry.kernels != nullptr) isas.push_back(entry.isa);
  }
  return isas;
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (const Isa isa : compiled_isas()) {
    if (cpu_has(isa)) isas.push_back(isa);
  }
  return isas;
}

Isa active_isa() { return active_entry().isa; }

void force_isa(const std::string& name) { active.store(&entry_named(name), std::memory_order_release); }

const Kernels& active_kernels() { return *active_entry().kernels; }

template <>
const LayersFor<float>& active_layers() {
  return active_kernels().layers_f32;
}
template <>
const LayersFor<double>& active_layers() {
  return active_kernels().layers_f64;
}
template <>
const LayersFor<BFloat16>& active_layers() {
  return *active_entry().bfloat16;
}

const NarrowRnn& active_narrow_rnn(WeightFormat format) {
  if (format == WeightFormat::bfloat16) return active_kernels().bfloat16_weights;
  const NarrowRnn* const int8 = active_entry().int8;
#if defined(__x86_64__)
  if (int8 == &int8_amx && !may_use_tiles()) return int8_avx512_vnni;  // the same panels
#endif
  return *int8;
}

}  // namespace pymtl
