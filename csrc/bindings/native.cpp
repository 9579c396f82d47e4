// What is not a tensor: the instruction sets and how this library was built. No torch header here, so this
// module neither needs nor fixes a version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels/isa.h"
#include "kernels/peak.h"

namespace {

std::vector<std::string> names(const std::vector<pymtl::Isa>& isas) {
  std::vector<std::string> result;
  for (const pymtl::Isa isa : isas) result.emplace_back(pymtl::isa_name(isa));
  return result;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Instruction sets and build information of pymtl's kernels.";
  m.def(
      "compiled_isas", [] { return names(pymtl::compiled_isas()); },
      "Every instruction set this build holds kernels for, slowest first.");
  m.def(
      "available_isas", [] { return names(pymtl::available_isas()); },
      "Those of compiled_isas() that this CPU can run, slowest first.");
  m.def(
      "active_isa", [] { return pymtl::isa_name(pymtl::active_isa()); },
      "The instruction set in use. Raises RuntimeError if PYMTL_ISA names one that is unknown or missing.");
  m.def("force_isa", &pymtl::force_isa, pybind11::arg("name"),
        "Use this instruction set from the next call on. Raises ValueError for an unknown name and RuntimeError for "
        "one that this CPU or this build lacks.");
  m.def(
      "peak_gflops",
      [](bool float64, int runs) {
        return float64 ? pymtl::peak_gflops<double>(runs) : pymtl::peak_gflops<float>(runs);
      },
      pybind11::arg("float64") = false, pybind11::arg("runs") = 10,
      pybind11::call_guard<pybind11::gil_scoped_release>(),
      "GFLOP/s of register-only multiply-adds on the calling thread, under the instruction set in use: the best of "
      "runs of some milliseconds.");
  m.attr("version") = PYMTL_VERSION;
  m.attr("compiler") = PYMTL_COMPILER;
  m.attr("build_type") = PYMTL_BUILD_TYPE;
}
