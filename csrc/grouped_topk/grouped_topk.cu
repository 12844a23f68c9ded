// grouped_topk (kernels/r1mega_kernels/grouped_topk) in CUDA C++, for sm_90a, through torch's stable ABI: one library for
// every torch from 2.13 on, loadable without a GPU. Never run on a GPU so far.
//
// A warp has a token and lane l the experts [l E/32, (l+1) E/32), so a group of experts is a run of lanes. Scores are
// compared as integers that order like them; a maximum over the warp is one instruction, another finds the lowest of the
// experts that have it. A warp takes kTokensPerWarp tokens in a row and counts in registers; what it counted is added to
// memory by integer atomics (sums of scores as multiples of 2^-40), so that no order of warps shows in the results.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <climits>
#include <optional>
#include <tuple>

#include "grouped_topk/gate.cuh"

namespace r1mega::grouped_topk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int kWarpsPerBlock = 4;

template <int kPerLane>
__global__ void __launch_bounds__(32 * kWarpsPerBlock) forward_kernel(const Forward arguments) {
  forward_warp<kPerLane>(arguments, blockIdx.x * kWarpsPerBlock + threadIdx.x / 32, threadIdx.x % 32);
}

template <int kPerLane>
__global__ void __launch_bounds__(32 * kWarpsPerBlock) backward_kernel(const Backward arguments) {
  backward_warp<kPerLane>(arguments, blockIdx.x * kWarpsPerBlock + threadIdx.x / 32, threadIdx.x % 32);
}

template <typename T>
const T* pointer(const MaybeTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

void check_aligned(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0, name, " does not start on 16 bytes");
}

void check(const Tensor& logits, int64_t top_k) {
  const int64_t experts = logits.size(1);
  STD_TORCH_CHECK(experts == 32 || experts == 64 || experts == 128 || experts == 256 || experts == 512,
                  "grouped_topk takes 32, 64, 128, 256 or 512 experts, not ", experts);
  STD_TORCH_CHECK(top_k <= 32, "grouped_topk takes at most the top 32, not ", top_k);
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float && logits.is_contiguous(),
                  "grouped_topk takes contiguous float32 logits");
  check_aligned("logits", logits);
}

// Calls launch(std::integral_constant<int, experts per lane>) with the device and stream of `logits`.
template <typename Launch>
void on_device_of(const Tensor& logits, Launch launch) {
  const auto device = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto stream =
      static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(device).nativeHandle());
  switch (logits.size(1) / 32) {
    case 1: launch(std::integral_constant<int, 1>(), stream); break;
    case 2: launch(std::integral_constant<int, 2>(), stream); break;
    case 4: launch(std::integral_constant<int, 4>(), stream); break;
    case 8: launch(std::integral_constant<int, 8>(), stream); break;
    default: launch(std::integral_constant<int, 16>(), stream);
  }
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "grouped_topk: ", cudaGetErrorString(error));
}

unsigned blocks(int64_t tokens, int tokens_per_warp) {
  const int64_t per_block = static_cast<int64_t>(tokens_per_warp) * kWarpsPerBlock;
  return static_cast<unsigned>((tokens + per_block - 1) / per_block);
}

// share is int64: multiples of 2^-40.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& logits, const Tensor& bias, int64_t top_k, int64_t num_groups, int64_t kept_groups, bool normalise,
    double scale, const MaybeTensor& counted, const MaybeTensor& sequence, int64_t num_sequences,
    const MaybeTensor& replay, const MaybeTensor& table, const MaybeTensor& count) {
  check(logits, top_k);
  check_aligned("bias", bias);
  STD_TORCH_CHECK(num_groups <= 32 && 32 % num_groups == 0, "grouped_topk takes 1, 2, 4 ... 32 groups, not ", num_groups);
  const int64_t tokens = logits.size(0), experts = logits.size(1), rows = sequence ? num_sequences : 0;
  const auto index = ScalarType::Long;
  Tensor weight = torch::stable::new_empty(logits, {tokens, top_k});
  Tensor expert = torch::stable::new_empty(logits, {replay ? 0 : tokens, top_k}, index);
  Tensor slot = torch::stable::new_empty(logits, {table ? tokens : 0, top_k}, index);
  Tensor load = torch::stable::new_zeros(logits, {experts}, index);
  Tensor chosen = torch::stable::new_zeros(logits, {rows, experts}, index);
  Tensor share = torch::stable::new_zeros(logits, {rows, experts}, index);
  if (tokens > 0) {
    const Forward arguments{
        pointer<float>(logits),     pointer<float>(bias),      pointer<bool>(counted),
        pointer<int64_t>(sequence), pointer<int64_t>(replay),  pointer<int64_t>(table),
        pointer<int64_t>(count),    pointer<float>(weight),    pointer<int64_t>(expert),
        pointer<int64_t>(slot),     pointer<Count>(load),      pointer<Count>(chosen),
        pointer<Count>(share),      tokens,                    rows,
        table ? table->size(1) : 0,
        static_cast<int>(top_k),    static_cast<int>(num_groups), static_cast<int>(kept_groups),
        static_cast<float>(scale),  normalise};
    on_device_of(logits, [&](auto per_lane, cudaStream_t stream) {
      forward_kernel<per_lane><<<blocks(tokens, kTokensPerWarp), 32 * kWarpsPerBlock, 0, stream>>>(arguments);
    });
  }
  return {weight, expert, slot, load, chosen, share};
}

Tensor backward(const Tensor& grad_weight, const MaybeTensor& grad_share, const Tensor& logits, const Tensor& expert,
                const MaybeTensor& sequence, bool normalise, double scale) {
  check(logits, expert.size(1));
  if (grad_share) check_aligned("grad_share", *grad_share);
  const int64_t tokens = logits.size(0);
  Tensor grad_logits = torch::stable::empty_like(logits);
  if (tokens > 0) {
    const Backward arguments{
        pointer<float>(grad_weight), pointer<float>(grad_share),    pointer<float>(logits),
        pointer<int64_t>(expert),    pointer<int64_t>(sequence),    pointer<float>(grad_logits),
        tokens,                      grad_share ? grad_share->size(0) : 0,
        static_cast<int>(expert.size(1)), static_cast<float>(scale),
        normalise};
    on_device_of(logits, [&](auto per_lane, cudaStream_t stream) {
      backward_kernel<per_lane><<<blocks(tokens, 1), 32 * kWarpsPerBlock, 0, stream>>>(arguments);
    });
  }
  return grad_logits;
}

}  // namespace
}  // namespace r1mega::grouped_topk

STABLE_TORCH_LIBRARY_FRAGMENT(r1mega_cuda, library) {
  library.def(
      "grouped_topk(Tensor logits, Tensor bias, int top_k, int num_groups, int kept_groups, bool normalise, float scale, "
      "Tensor? counted, Tensor? sequence, int num_sequences, Tensor? replay, Tensor? table, Tensor? count) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "grouped_topk_backward(Tensor grad_weight, Tensor? grad_share, Tensor logits, Tensor expert, Tensor? sequence, "
      "bool normalise, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(r1mega_cuda, CUDA, library) {
  library.impl("grouped_topk", TORCH_BOX(&r1mega::grouped_topk::forward));
  library.impl("grouped_topk_backward", TORCH_BOX(&r1mega::grouped_topk::backward));
}
