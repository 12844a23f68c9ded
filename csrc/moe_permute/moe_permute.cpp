#include "moe_permute/moe_permute.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace r1mega::moe_permute {

template <typename Index>
int64_t slots(const Index* indices, int64_t pairs, int64_t experts, int64_t multiple, int64_t rows,
              int32_t* row_of_pair, int32_t* pair_of_row, int64_t* counts) {
  std::fill_n(counts, experts, 0);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    if (indices[pair] >= 0) ++counts[indices[pair]];
  }
  std::vector<int64_t> next(experts);
  int64_t needed = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    next[expert] = needed;
    needed += (counts[expert] + multiple - 1) / multiple * multiple;
  }
  if (needed > rows) return needed;
  std::fill_n(pair_of_row, rows, -1);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t row = indices[pair] >= 0 ? next[indices[pair]]++ : -1;
    row_of_pair[pair] = static_cast<int32_t>(row);
    if (row >= 0) pair_of_row[row] = static_cast<int32_t>(pair);
  }
  return needed;
}

template int64_t slots(const int32_t*, int64_t, int64_t, int64_t, int64_t, int32_t*, int32_t*, int64_t*);
template int64_t slots(const int64_t*, int64_t, int64_t, int64_t, int64_t, int32_t*, int32_t*, int64_t*);

void permute(const uint8_t* in, const int32_t* pair_of_row, int64_t rows, int64_t per_token, int64_t bytes,
             uint8_t* out) {
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t pair = pair_of_row[row];
    if (pair >= 0) {
      std::memcpy(out + row * bytes, in + pair / per_token * bytes, bytes);
    } else {
      std::memset(out + row * bytes, 0, bytes);
    }
  }
}

void unpermute(const float* in, const int32_t* row_of_pair, const float* weights, int64_t tokens, int64_t per_token,
               int64_t hidden, float* out) {
  for (int64_t token = 0; token < tokens; ++token) {
    float* sum = out + token * hidden;
    std::fill_n(sum, hidden, 0.0f);
    for (int64_t pair = token * per_token; pair < (token + 1) * per_token; ++pair) {
      if (row_of_pair[pair] < 0) continue;
      const float* row = in + row_of_pair[pair] * hidden;
      if (weights == nullptr) {
        for (int64_t i = 0; i < hidden; ++i) sum[i] += row[i];
      } else {
        for (int64_t i = 0; i < hidden; ++i) sum[i] += weights[pair] * row[i];
      }
    }
  }
}

}  // namespace r1mega::moe_permute
