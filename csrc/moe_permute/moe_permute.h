// Tokens sorted by expert, and back: the CPU's default of r1mega_kernels.moe_permute, whose words these are.
#pragma once

#include <cstdint>

namespace r1mega::moe_permute {

// A counting sort. indices [pairs] in [-1, experts); counts [experts] comes out without padding, row_of_pair [pairs] and
// pair_of_row [rows] with -1 for none. Returns the rows that are needed; where `rows` is less, nothing else is written.
template <typename Index>
int64_t slots(const Index* indices, int64_t pairs, int64_t experts, int64_t multiple, int64_t rows,
              int32_t* row_of_pair, int32_t* pair_of_row, int64_t* counts);

// out[n] = in[pair_of_row[n] / per_token], rows of `bytes` bytes; zero where the pair is -1.
void permute(const uint8_t* in, const int32_t* pair_of_row, int64_t rows, int64_t per_token, int64_t bytes,
             uint8_t* out);

// out[t] = sum over k of in[row_of_pair[t, k]] (times weights[t, k] unless null), in the order of k, from zero.
void unpermute(const float* in, const int32_t* row_of_pair, const float* weights, int64_t tokens, int64_t per_token,
               int64_t hidden, float* out);

}  // namespace r1mega::moe_permute
