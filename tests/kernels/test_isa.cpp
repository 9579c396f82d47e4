// Which instruction sets there are, and how one is chosen.
#include <cmath>
#include <cstdlib>
#include <stdexcept>

#include "check.h"
#include "kernels/activation.h"
#include "kernels/isa.h"
#include "kernels/rnn.h"

namespace pymtl::test {
namespace {

// What a call throws: "invalid_argument: ...", "runtime_error: ..." or nothing.
template <typename Call>
std::string thrown(Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return std::string("invalid_argument: ") + error.what();
  } catch (const std::runtime_error& error) {
    return std::string("runtime_error: ") + error.what();
  }
  return "";
}

bool begins(const std::string& text, const std::string& with) { return text.rfind(with, 0) == 0; }
bool holds(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// What happens where the first choice is impossible. Runs before run_tests, which makes that choice for good.
void impossible_choices() {
  const char* const given = std::getenv("PYMTL_ISA");
  const std::string wanted = given == nullptr ? "" : given;
  setenv("PYMTL_ISA", "sse9", 1);
  const std::string unknown = thrown([] { active_isa(); });
  CHECK(begins(unknown, "runtime_error: "), unknown);
  CHECK(holds(unknown, "PYMTL_ISA") && holds(unknown, "sse9"), unknown);
  for (const Isa isa : kIsas) {
    const std::vector<Isa> available = available_isas();
    if (std::count(available.begin(), available.end(), isa) > 0) continue;
    setenv("PYMTL_ISA", isa_name(isa), 1);
    const std::string lacking = thrown([] { active_isa(); });
    CHECK(begins(lacking, "runtime_error: "), lacking);
    CHECK(holds(lacking, isa_name(isa)), lacking);
  }
  if (wanted.empty()) {
    unsetenv("PYMTL_ISA");
  } else {
    setenv("PYMTL_ISA", wanted.c_str(), 1);
  }
}

void names() {
  CHECK(std::string(isa_name(Isa::baseline)) == "baseline");
  CHECK(std::string(isa_name(Isa::avx2)) == "avx2");
  CHECK(std::string(isa_name(Isa::avx2_vnni)) == "avx2_vnni");
  CHECK(std::string(isa_name(Isa::avx512)) == "avx512");
  CHECK(std::string(isa_name(Isa::avx512_vnni)) == "avx512_vnni");
  CHECK(std::string(isa_name(Isa::avx512_bf16)) == "avx512_bf16");
  CHECK(std::string(isa_name(Isa::amx)) == "amx");
  CHECK(std::string(isa_name(Isa::neon)) == "neon");
  CHECK(std::string(isa_name(Isa::neon_dotprod)) == "neon_dotprod");
  const std::vector<Isa> compiled = compiled_isas();
  const std::vector<Isa> available = available_isas();
  CHECK(!available.empty());
  CHECK(std::is_sorted(compiled.begin(), compiled.end()));
  CHECK(std::is_sorted(available.begin(), available.end()));
  CHECK(std::includes(compiled.begin(), compiled.end(), available.begin(), available.end()));
#if defined(__x86_64__)
  CHECK(compiled == (std::vector<Isa>{Isa::baseline, Isa::avx2, Isa::avx2_vnni, Isa::avx512, Isa::avx512_vnni,
                                      Isa::avx512_bf16, Isa::amx}));
  CHECK(available.front() == Isa::baseline);
#elif defined(__aarch64__)
  CHECK(available.front() == Isa::neon);
#endif
}

void environment() {
  const char* const wanted = std::getenv("PYMTL_ISA");
  const std::string expected =
      wanted == nullptr || *wanted == '\0' ? isa_name(available_isas().back()) : std::string(wanted);
  CHECK(isa_name(active_isa()) == expected, isa_name(active_isa()), expected);
  setenv("PYMTL_ISA", "sse9", 1);  // it was read once
  CHECK(isa_name(active_isa()) == expected, isa_name(active_isa()), expected);
  setenv("PYMTL_ISA", expected.c_str(), 1);
}

void forcing() {
  const Isa before = active_isa();
  for (const std::string name : {"sse9", "", "AVX2"}) {
    const std::string unknown = thrown([&] { force_isa(name); });
    CHECK(begins(unknown, "invalid_argument: "), name, unknown);
    CHECK(holds(unknown, "'" + name + "'"), name, unknown);
    CHECK(active_isa() == before);
  }
  const std::vector<Isa> available = available_isas();
  for (const Isa isa : kIsas) {
    const std::string error = thrown([isa] { force_isa(isa_name(isa)); });
    if (std::count(available.begin(), available.end(), isa) == 0) {
      CHECK(begins(error, "runtime_error: "), isa_name(isa), error);
    } else {
      CHECK(error.empty(), isa_name(isa), error);
      CHECK(active_isa() == isa, isa_name(active_isa()), isa_name(isa));
    }
  }
  force_isa(isa_name(before));

  // The kernels follow: vectors of another width make panels of another size, and the same numbers.
  std::vector<size_t> sizes;
  for (const Isa isa : available) {
    if (isa == Isa::avx2_vnni || isa > Isa::avx512) continue;  // as wide as the one before
    force_isa(isa_name(isa));
    sizes.push_back(rnn_prepacked_size<float>(Cell::lstm, 1, 1, 1));
    float x[] = {-1.5f, 0.0f, 2.5f};
    sigmoid(x, x, 3);
    CHECK(std::abs(x[0] - 0.182425524f) < 1e-7f && x[1] == 0.5f && std::abs(x[2] - 0.924141820f) < 2e-7f, x[0], x[1],
          x[2]);
  }
  CHECK(std::is_sorted(sizes.begin(), sizes.end()) && std::adjacent_find(sizes.begin(), sizes.end()) == sizes.end());
  force_isa(isa_name(before));
}

}  // namespace
}  // namespace pymtl::test

int main() {
  using namespace pymtl::test;
  impossible_choices();
  return run_tests({
      {"names", names},
      {"environment", environment},
      {"forcing", forcing},
  });
}
