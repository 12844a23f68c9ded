// Best-fit-decreasing bin packing of sequences into chunks of a fixed number of tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace r1mega::packing {

struct Packing {
  std::vector<int32_t> bin_of_sequence;
  int64_t num_bins;  // a multiple of num_ranks
};

// Capacities above this would make the per-capacity tables larger than the data they serve.
constexpr int64_t kMaxCapacity = int64_t{1} << 24;

// Throws std::invalid_argument for a length outside [1, capacity], naming the sequence.
//
// The number of bins is rounded up to a multiple of num_ranks by halving the fullest bins, so that a
// bin stays empty only where there are fewer sequences than bins. Deterministic: ties go to the sequence
// of lowest index and to the bin opened or refilled last.
Packing pack_best_fit(const int64_t* lengths, size_t num_sequences, int64_t capacity, int64_t num_ranks);

}  // namespace r1mega::packing
