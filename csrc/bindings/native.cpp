// What is not a tensor: the instruction sets, the cells, and how this library was built. No torch header here, so this
// module neither needs nor fixes a version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "kernels/cells.h"
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
  m.doc() = "Instruction sets, cells and build information of pymtl's kernels.";
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
      [](const std::string& dtype, int runs) {
        if (dtype == "float32") return pymtl::peak_gflops<float>(runs);
        if (dtype == "float64") return pymtl::peak_gflops<double>(runs);
        if (dtype == "bfloat16") return pymtl::peak_gflops<pymtl::BFloat16>(runs);
        throw std::invalid_argument("dtype: expected float32, float64 or bfloat16, got " + dtype);
      },
      pybind11::arg("dtype") = "float32", pybind11::arg("runs") = 10,
      pybind11::call_guard<pybind11::gil_scoped_release>(),
      "GFLOP/s of register-only multiply-adds on the calling thread, under the instruction set in use: the best of "
      "runs of some milliseconds. Raises ValueError for another dtype.");
  m.def("read_gigabytes", &pymtl::read_gigabytes, pybind11::arg("bytes"), pybind11::arg("runs") = 10,
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "GB/s at which the calling thread reads so many bytes again and again: the best of runs of some milliseconds.");
  m.def(
      "cells",
      [] {
        pybind11::list cells;
        for (const pymtl::CellSizes& cell : pymtl::kCells) {
          pybind11::dict sizes;
          sizes["mode"] = cell.mode;
          sizes["normalised"] = cell.normalised;
          sizes["has_cell"] = cell.has_cell;
          sizes["gates"] = cell.gates;
          sizes["reserve"] = cell.reserve;
          sizes["reserve_candidate"] = cell.reserve_candidate;
          sizes["gradients"] = cell.gradients;
          cells.append(sizes);
        }
        return cells;
      },
      "The cells of the recurrent layers and their sizes (csrc/kernels/cells.h), a dict each.");
  m.attr("version") = PYMTL_VERSION;
  m.attr("compiler") = PYMTL_COMPILER;
  m.attr("cuda_compiler") = PYMTL_CUDA_COMPILER;
  m.attr("build_type") = PYMTL_BUILD_TYPE;
}
