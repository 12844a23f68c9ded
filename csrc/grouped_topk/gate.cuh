// What one warp does in grouped_topk's forward and backward. grouped_topk.cu says how tokens and experts are divided.
#pragma once

#include <climits>
#include <cstdint>

namespace r1mega::grouped_topk {

using Count = unsigned long long;

constexpr unsigned kWarp = 0xffffffffu;
constexpr int kTokensPerWarp = 8;
constexpr float kTiny = 1e-20f;
constexpr float kFixedPoint = 1099511627776.0f;  // 2^40

// T tokens, E experts, K chosen, S sequences, R replicas; pointers may be null where grouped_topk's argument may be None.
struct Forward {
  const float* logits;      // [T, E]
  const float* bias;        // [E]
  const bool* counted;      // [T]
  const int64_t* sequence;  // [T]
  const int64_t* replay;    // [T, K]
  const int64_t* table;     // [E, R]
  const int64_t* count;     // [E]
  float* weight;            // [T, K]
  int64_t* expert;          // [T, K]
  int64_t* slot;            // [T, K]
  Count* load;              // [E]
  Count* chosen;            // [S, E]
  Count* share;             // [S, E], multiples of 2^-40
  int64_t tokens;
  int64_t sequences;
  int64_t max_replicas;
  int top_k;
  int num_groups;
  int kept_groups;
  float scale;
  bool normalise;
};

struct Backward {
  const float* grad_weight;  // [T, K]
  const float* grad_share;   // [S, E]
  const float* logits;       // [T, E]
  const int64_t* expert;     // [T, K]
  const int64_t* sequence;   // [T]
  float* grad_logits;        // [T, E]
  int64_t tokens;
  int64_t sequences;
  int top_k;
  float scale;
  bool normalise;
};

// An integer that orders like the float; -0 counts as 0.
__device__ __forceinline__ int ordered(float value) {
  const int bits = __float_as_int(value + 0.0f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

__device__ __forceinline__ float unordered(int key) { return __int_as_float(key ^ ((key >> 31) & 0x7fffffff)); }

// Whether a given index is one of `count`. What is out of range must not become an address: __init__.py says what it gives.
__device__ __forceinline__ bool exists(int64_t index, int64_t count) { return index >= 0 && index < count; }

__device__ __forceinline__ int expert_of(int64_t given, int experts) {
  return exists(given, experts) ? static_cast<int>(given) : -1;
}

__device__ __forceinline__ float sigmoid(float logit) { return 1.0f / (1.0f + expf(-logit)); }

// NaN of an expert that does not exist.
__device__ __forceinline__ float score_of(const float* row, int expert) {
  return expert < 0 ? __int_as_float(0x7fc00000) : sigmoid(row[expert]);
}

__device__ __forceinline__ float sum_over_warp(float value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kWarp, value, lanes);
  return value;
}

// The lane's part of a row of 32 * kPerLane floats.
template <int kPerLane>
__device__ __forceinline__ void load_row(const float* row, int lane, float (&values)[kPerLane]) {
  if constexpr (kPerLane % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(row + lane * kPerLane + i);
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[i] = row[lane * kPerLane + i];
  }
}

template <int kPerLane>
__device__ __forceinline__ void store_row(float* row, int lane, const float (&values)[kPerLane]) {
  if constexpr (kPerLane % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      *reinterpret_cast<float4*>(row + lane * kPerLane + i) =
          make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) row[lane * kPerLane + i] = values[i];
  }
}

// Takes the kept_groups groups of largest sum of their two largest scores; the keys of others become INT_MIN.
template <int kPerLane>
__device__ __forceinline__ void keep_best_groups(int (&keys)[kPerLane], int lane, int num_groups, int kept_groups) {
  const int lanes = 32 / num_groups;  // of a group
  int first = INT_MIN, second = INT_MIN;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    second = max(second, min(first, keys[i]));
    first = max(first, keys[i]);
  }
  for (int other = 1; other < lanes; other *= 2) {
    const int first_there = __shfl_xor_sync(kWarp, first, other);
    const int second_there = __shfl_xor_sync(kWarp, second, other);
    second = max(min(first, first_there), max(second, second_there));
    first = max(first, first_there);
  }
  const bool single = lanes * kPerLane == 1;
  const int score = single ? first : ordered(unordered(first) + unordered(second));
  const int group = lane / lanes;
  int better = 0;
  for (int g = 0; g < num_groups; ++g) {
    const int score_there = __shfl_sync(kWarp, score, g * lanes);
    better += score_there > score || (score_there == score && g < group);
  }
  if (better >= kept_groups) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) keys[i] = INT_MIN;
  }
}

// The top_k experts of largest key, of equals the lowest: lane i returns the i-th. Counts the lane's own in `hits`.
template <int kPerLane>
__device__ __forceinline__ int choose(int (&keys)[kPerLane], int lane, int top_k, int (&hits)[kPerLane], bool counts) {
  int mine = 0;
  for (int i = 0; i < top_k; ++i) {
    int best = keys[0], place = 0;
#pragma unroll
    for (int j = 1; j < kPerLane; ++j) {
      if (keys[j] > best) best = keys[j], place = j;
    }
    const int best_of_all = __reduce_max_sync(kWarp, best);
    const int candidate = best == best_of_all ? lane * kPerLane + place : INT_MAX;
    const int winner = __reduce_min_sync(kWarp, candidate);
    if (lane == i) mine = winner;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (winner == lane * kPerLane + j) keys[j] = INT_MIN, hits[j] += counts;
    }
  }
  return mine;
}

template <int kPerLane>
__device__ void add_to(Count* row, int lane, const int (&counts)[kPerLane]) {
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (counts[j] != 0) atomicAdd(row + lane * kPerLane + j, static_cast<Count>(counts[j]));
  }
}

template <int kPerLane>
__device__ void forward_warp(const Forward& a, int64_t warp, int lane) {
  constexpr int kExperts = 32 * kPerLane;
  const int64_t start = warp * kTokensPerWarp;
  if (start >= a.tokens) return;  // all lanes alike
  const int64_t end = min(start + kTokensPerWarp, a.tokens);
  float bias[kPerLane];
  load_row<kPerLane>(a.bias, lane, bias);
  int load[kPerLane] = {}, chosen[kPerLane] = {};
  float share[kPerLane] = {};
  int64_t current = a.sequence ? a.sequence[start] : 0;  // the sequence whose tokens chosen and share are sums over

  const auto add_statistics = [&] {
    const bool there = exists(current, a.sequences);
    if (there) add_to<kPerLane>(a.chosen + current * kExperts, lane, chosen);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const Count fixed = static_cast<Count>(static_cast<long long>(share[j] * kFixedPoint));
      if (there) atomicAdd(a.share + current * kExperts + lane * kPerLane + j, fixed);
      chosen[j] = 0, share[j] = 0.0f;
    }
  };

  for (int64_t token = start; token < end; ++token) {
    const float* row = a.logits + token * kExperts;
    const bool counts = !a.counted || a.counted[token];
    const bool chooser = lane < a.top_k;
    float scores[kPerLane];
    int keys[kPerLane], expert;
    if (!a.replay || a.sequence) {
      load_row<kPerLane>(row, lane, scores);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) scores[j] = sigmoid(scores[j]);
    }
    if (a.replay) {
      expert = chooser ? expert_of(a.replay[token * a.top_k + lane], kExperts) : 0;
      for (int i = 0; i < a.top_k; ++i) {
        const int given = __shfl_sync(kWarp, expert, i);
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) load[j] += counts && given == lane * kPerLane + j;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) keys[j] = ordered(scores[j] + bias[j]);
      if (a.kept_groups < a.num_groups) keep_best_groups<kPerLane>(keys, lane, a.num_groups, a.kept_groups);
      expert = choose<kPerLane>(keys, lane, a.top_k, load, counts);
    }
    float weight = chooser ? score_of(row, expert) : 0.0f;  // the row is in the cache
    if (a.normalise) weight /= sum_over_warp(weight) + kTiny;
    if (chooser) {
      const int64_t place = token * a.top_k + lane;
      a.weight[place] = weight * a.scale;
      if (!a.replay) a.expert[place] = expert;
      if (a.table) a.slot[place] = expert < 0 ? -1 : a.table[expert * a.max_replicas + token % a.count[expert]];
    }
    if (a.sequence) {
      if (a.sequence[token] != current) {
        add_statistics();
        current = a.sequence[token];
      }
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) total += scores[j], keys[j] = ordered(scores[j]);
      total = sum_over_warp(total) + kTiny;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) share[j] += scores[j] / total;
      choose<kPerLane>(keys, lane, a.top_k, chosen, true);
    }
  }
  add_to<kPerLane>(a.load, lane, load);
  if (a.sequence) add_statistics();
}

template <int kPerLane>
__device__ void backward_warp(const Backward& a, int64_t token, int lane) {
  constexpr int kExperts = 32 * kPerLane;
  if (token >= a.tokens) return;  // all lanes alike
  const float* row = a.logits + token * kExperts;
  const bool chooser = lane < a.top_k;
  const int expert = chooser ? expert_of(a.expert[token * a.top_k + lane], kExperts) : 0;
  const float score = chooser ? score_of(row, expert) : 0.0f;
  float gradient = chooser ? a.grad_weight[token * a.top_k + lane] : 0.0f;
  if (a.normalise) {
    const float total = sum_over_warp(score) + kTiny;
    gradient = (gradient - sum_over_warp(gradient * score) / total) / total;
  }
  gradient *= a.scale * score * (1.0f - score);

  float out[kPerLane] = {};
  if (a.sequence && exists(a.sequence[token], a.sequences)) {
    const float* grad_share = a.grad_share + a.sequence[token] * kExperts;
    float scores[kPerLane], total = 0.0f, mean = 0.0f;
    load_row<kPerLane>(row, lane, scores);
    load_row<kPerLane>(grad_share, lane, out);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      scores[j] = sigmoid(scores[j]);
      total += scores[j], mean += out[j] * scores[j];
    }
    total = sum_over_warp(total) + kTiny;
    mean = sum_over_warp(mean) / total;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) out[j] = (out[j] - mean) / total * scores[j] * (1.0f - scores[j]);
  }
  for (int i = 0; i < a.top_k; ++i) {
    const int there = __shfl_sync(kWarp, expert, i);
    const float added = __shfl_sync(kWarp, gradient, i);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) out[j] += there == lane * kPerLane + j ? added : 0.0f;
  }
  store_row<kPerLane>(a.grad_logits + token * kExperts, lane, out);
}

}  // namespace r1mega::grouped_topk
