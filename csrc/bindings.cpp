// Python bindings of the C++ solvers: module r1mega_kernels._C.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "eplb/placement.h"
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

using Loads = py::array_t<float, py::array::c_style>;

py::tuple place_experts(const Loads& load, const Loads& group_load, int64_t slots, int64_t nodes, int64_t gpus,
                        const std::string& solver) {
  using namespace r1mega::eplb;
  const Shape shape{load.shape(0), load.shape(1), slots, group_load.shape(1), nodes, gpus};
  const Solver kind = solver == "published"      ? Solver::kPublished
                      : solver == "within_nodes" ? Solver::kWithinNodes
                                                 : Solver::kAcrossNodes;
  Placement result;
  {
    py::gil_scoped_release release;
    result = place(load.data(), group_load.data(), shape, kind);
  }
  const auto array = [&](const std::vector<int64_t>& values, int64_t columns) {
    return py::array_t<int64_t>({shape.layers, columns}, values.data());
  };
  return py::make_tuple(array(result.expert_of_slot, slots), array(result.replica_of_slot, slots),
                        array(result.replicas, shape.experts));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ solvers of r1mega.";
  module.def("pack_best_fit", &pack_best_fit, py::arg("lengths"), py::arg("capacity"), py::arg("num_ranks"),
             R"(Best-fit-decreasing packing of sequences into chunks of `capacity` tokens.

lengths: int64 [n], each in [1, capacity]. Returns (bin_of_sequence: int32 [n], num_bins), where
num_bins is a multiple of num_ranks (at least num_ranks); a bin is empty only where there are fewer
sequences than bins. Raises ValueError for a sequence that fits nowhere. Releases the GIL.)");
  module.def("place_experts", &place_experts, py::arg("load"), py::arg("group_load"), py::arg("slots"),
             py::arg("nodes"), py::arg("gpus"), py::arg("solver"),
             R"(Placement of expert replicas; r1mega_kernels.eplb checks its arguments and says what they are.

load: float32 [layers, experts], group_load: float32 [layers, groups]. Returns int64 (expert_of_slot
[layers, slots], replica_of_slot [layers, slots], replicas [layers, experts]). Releases the GIL.)");
}
