// The CUDA C++ code of a warp (csrc/grouped_topk/gate.cuh) on a CPU: 32 contexts take turns, and exchange values where
// the warp does. For test_grouped_topk.py, which compiles it and calls it through ctypes.
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

namespace {

constexpr int kLanes = 32;
ucontext_t scheduler;
std::array<ucontext_t, kLanes> lanes;
std::array<int, kLanes> slots;
std::function<void(int)> body;
int running = 0;

// Let the other lanes come to the same place.
void take_turns() { swapcontext(&lanes[running], &scheduler); }

std::array<int, kLanes> exchanged(int value) {
  slots[running] = value;
  take_turns();
  const auto seen = slots;
  take_turns();
  return seen;
}

void lane_of_warp(int lane) {
  body(lane);
  running = kLanes;  // done
}

void run_warp(std::function<void(int)> what) {
  constexpr size_t kStack = 1 << 16;
  static std::vector<char> stacks(kLanes * kStack);
  body = std::move(what);
  std::array<bool, kLanes> done{};
  for (int lane = 0; lane < kLanes; ++lane) {
    getcontext(&lanes[lane]);
    lanes[lane].uc_stack.ss_sp = stacks.data() + lane * kStack;
    lanes[lane].uc_stack.ss_size = kStack;
    lanes[lane].uc_link = &scheduler;
    makecontext(&lanes[lane], reinterpret_cast<void (*)()>(&lane_of_warp), 1, lane);
  }
  for (int left = kLanes; left > 0;) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (done[lane]) continue;
      running = lane;
      swapcontext(&scheduler, &lanes[lane]);
      if (running == kLanes) done[lane] = true, --left;
    }
  }
}

}  // namespace

#define __device__
#define __forceinline__ inline

using std::max;
using std::min;

struct float4 {
  float x, y, z, w;
};

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __shfl_sync(unsigned, int value, int lane) { return exchanged(value)[lane]; }
inline float __shfl_sync(unsigned, float value, int lane) {
  return std::bit_cast<float>(exchanged(std::bit_cast<int>(value))[lane]);
}
inline int __shfl_xor_sync(unsigned, int value, int other) {
  const int lane = running;
  return exchanged(value)[lane ^ other];
}
inline float __shfl_xor_sync(unsigned mask, float value, int other) {
  return std::bit_cast<float>(__shfl_xor_sync(mask, std::bit_cast<int>(value), other));
}
inline int __reduce_max_sync(unsigned, int value) {
  const auto seen = exchanged(value);
  return *std::max_element(seen.begin(), seen.end());
}
inline int __reduce_min_sync(unsigned, int value) {
  const auto seen = exchanged(value);
  return *std::min_element(seen.begin(), seen.end());
}
inline void atomicAdd(unsigned long long* at, unsigned long long value) { *at += value; }

#include "grouped_topk/gate.cuh"

namespace {

using namespace r1mega::grouped_topk;

template <typename Run>
void for_experts(int experts, Run run) {
  switch (experts / 32) {
    case 1: run(std::integral_constant<int, 1>()); break;
    case 2: run(std::integral_constant<int, 2>()); break;
    case 4: run(std::integral_constant<int, 4>()); break;
    case 8: run(std::integral_constant<int, 8>()); break;
    default: run(std::integral_constant<int, 16>());
  }
}

}  // namespace

extern "C" void forward(int experts, const Forward* arguments) {
  for_experts(experts, [&](auto per_lane) {
    for (int64_t warp = 0; warp * kTokensPerWarp < arguments->tokens + kTokensPerWarp; ++warp) {  // one beyond the end
      run_warp([&](int lane) { forward_warp<per_lane>(*arguments, warp, lane); });
    }
  });
}

extern "C" void backward(int experts, const Backward* arguments) {
  for_experts(experts, [&](auto per_lane) {
    for (int64_t token = 0; token <= arguments->tokens; ++token) {
      run_warp([&](int lane) { backward_warp<per_lane>(*arguments, token, lane); });
    }
  });
}
