// Python bindings of the C++ solvers: module r1mega_kernels._C.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "eplb/placement.h"
#include "fp8_block/fp8_block.h"
#include "moe_permute/moe_permute.h"
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

template <typename T>
using Matrix = py::array_t<T, py::array::c_style>;

void check_blocks(const py::array& matrix, const py::array& scales, const py::array& result, int64_t block_rows) {
  const int64_t block = r1mega::fp8_block::kBlock;
  const bool fits = matrix.ndim() == 2 && scales.ndim() == 2 && result.ndim() == 2 && block_rows > 0 &&
                    result.shape(0) == matrix.shape(0) && result.shape(1) == matrix.shape(1) &&
                    scales.shape(0) == (matrix.shape(0) + block_rows - 1) / block_rows &&
                    scales.shape(1) == (matrix.shape(1) + block - 1) / block;
  if (!fits) throw std::invalid_argument("shapes of matrix, scales and result do not fit");
}

template <typename Out, void (*Convert)(const uint8_t*, const float*, Out*, r1mega::fp8_block::Shape)>
void fp8_dequantize(const Matrix<uint8_t>& values, const Matrix<float>& scales, Matrix<Out>& out,
                    int64_t block_rows) {
  check_blocks(values, scales, out, block_rows);
  Out* to = out.mutable_data();
  py::gil_scoped_release release;
  Convert(values.data(), scales.data(), to, {values.shape(0), values.shape(1), block_rows});
}

template <typename In, bool (*Convert)(const In*, uint8_t*, float*, r1mega::fp8_block::Shape)>
bool fp8_quantize(const Matrix<In>& in, Matrix<uint8_t>& values, Matrix<float>& scales, int64_t block_rows) {
  check_blocks(in, scales, values, block_rows);
  uint8_t* to = values.mutable_data();
  float* scales_to = scales.mutable_data();
  py::gil_scoped_release release;
  return Convert(in.data(), to, scales_to, {in.shape(0), in.shape(1), block_rows});
}

// Addresses of tensors, not arrays: a numpy view makes a tensor's storage unresizable for good, and Megatron frees what
// it sends between ranks by resizing it. The caller (moe_permute/compiled.py) answers for the sizes.
template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename Index>
int64_t moe_slots(uintptr_t indices, int64_t pairs, int64_t experts, int64_t multiple, int64_t rows,
                  uintptr_t row_of_pair, uintptr_t pair_of_row, uintptr_t counts) {
  return r1mega::moe_permute::slots(at<Index>(indices), pairs, experts, multiple, rows, at<int32_t>(row_of_pair),
                                    at<int32_t>(pair_of_row), at<int64_t>(counts));
}

void moe_permute(uintptr_t tokens, uintptr_t pair_of_row, int64_t rows, int64_t per_token, int64_t bytes,
                 uintptr_t out) {
  r1mega::moe_permute::permute(at<uint8_t>(tokens), at<int32_t>(pair_of_row), rows, per_token, bytes,
                               at<uint8_t>(out));
}

void moe_unpermute(uintptr_t rows, uintptr_t row_of_pair, uintptr_t weights, int64_t tokens, int64_t per_token,
                   int64_t hidden, uintptr_t out) {
  r1mega::moe_permute::unpermute(at<float>(rows), at<int32_t>(row_of_pair), at<float>(weights), tokens, per_token,
                                 hidden, at<float>(out));
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

  namespace fp8 = r1mega::fp8_block;
  const auto block_rows = py::arg("block_rows");
  const auto in = py::arg("matrix").noconvert(), values = py::arg("values").noconvert();
  const auto scales = py::arg("scales").noconvert(), out = py::arg("out").noconvert();
  // bfloat16 travels as uint16, fp8 as uint8: numpy has neither. Outputs are written in place.
  module.def("fp8_dequantize", &fp8_dequantize<float, fp8::dequantize_to_float>, values, scales, out, block_rows);
  module.def("fp8_dequantize", &fp8_dequantize<uint16_t, fp8::dequantize_to_bfloat16>, values, scales, out,
             block_rows);
  module.def("fp8_quantize", &fp8_quantize<float, fp8::quantize_float>, in, values, scales, block_rows,
             "False where an input is NaN or infinite.");
  module.def("fp8_quantize", &fp8_quantize<uint16_t, fp8::quantize_bfloat16>, in, values, scales, block_rows);

  const auto free_of_gil = py::call_guard<py::gil_scoped_release>();
  module.def("moe_slots_int32", &moe_slots<int32_t>, free_of_gil);
  module.def("moe_slots_int64", &moe_slots<int64_t>, free_of_gil);
  module.def("moe_permute", &moe_permute, free_of_gil);
  module.def("moe_unpermute", &moe_unpermute, free_of_gil);
}
