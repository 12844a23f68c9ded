// Python bindings of the C++ solvers: module r1mega_kernels._C.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "packing/best_fit.h"

namespace py = pybind11;

namespace {

py::tuple pack_best_fit(const py::array& lengths, int64_t capacity, int64_t num_ranks) {
  if (lengths.ndim() != 1 || !py::isinstance<py::array_t<int64_t>>(lengths)) {
    throw std::invalid_argument("lengths must be a one-dimensional int64 array, got dtype " +
                                py::str(lengths.dtype()).cast<std::string>() + " with " +
                                std::to_string(lengths.ndim()) + " dims");
  }
  const auto contiguous = py::array_t<int64_t, py::array::c_style>::ensure(lengths);
  r1mega::packing::Packing packing;
  {
    py::gil_scoped_release release;
    packing = r1mega::packing::pack_best_fit(contiguous.data(), contiguous.size(), capacity, num_ranks);
  }
  py::array_t<int32_t> bin_of_sequence(static_cast<py::ssize_t>(packing.bin_of_sequence.size()));
  std::copy(packing.bin_of_sequence.begin(), packing.bin_of_sequence.end(), bin_of_sequence.mutable_data());
  return py::make_tuple(std::move(bin_of_sequence), packing.num_bins);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ solvers of r1mega.";
  module.def("pack_best_fit", &pack_best_fit, py::arg("lengths"), py::arg("capacity"), py::arg("num_ranks"),
             R"(Best-fit-decreasing packing of sequences into chunks of `capacity` tokens.

lengths: int64 [n], each in [1, capacity]. Returns (bin_of_sequence: int32 [n], num_bins), where
num_bins is a multiple of num_ranks (at least num_ranks); a bin is empty only where there are fewer
sequences than bins. Raises ValueError for a sequence that fits nowhere. Releases the GIL.)");
}
