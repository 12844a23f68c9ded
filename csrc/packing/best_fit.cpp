#include "packing/best_fit.h"

#include <algorithm>
#include <limits>
#include <queue>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "packing/capacity_index.h"

namespace r1mega::packing {
namespace {

void check(const int64_t* lengths, size_t num_sequences, int64_t capacity, int64_t num_ranks) {
  if (capacity < 1 || capacity > kMaxCapacity) {
    throw std::invalid_argument("capacity is " + std::to_string(capacity) + " tokens; it must lie in [1, " +
                                std::to_string(kMaxCapacity) + "]");
  }
  constexpr int64_t kMaxBins = std::numeric_limits<int32_t>::max();
  if (num_ranks < 1 || num_ranks > kMaxBins) {
    throw std::invalid_argument("num_ranks is " + std::to_string(num_ranks) + "; it must be at least 1");
  }
  if (num_sequences > static_cast<size_t>(kMaxBins - num_ranks)) {
    throw std::invalid_argument(std::to_string(num_sequences) + " sequences are too many for int32 bin numbers");
  }
  for (size_t i = 0; i < num_sequences; ++i) {
    if (lengths[i] >= 1 && lengths[i] <= capacity) continue;
    const std::string what = "sequence " + std::to_string(i) + " has " + std::to_string(lengths[i]) + " tokens";
    if (lengths[i] < 1) throw std::invalid_argument(what + "; drop empty sequences before packing");
    throw std::invalid_argument(what + ", a chunk holds " + std::to_string(capacity) +
                                "; raise tokens_per_chunk or drop longer sequences");
  }
}

struct Sorted {
  std::vector<int32_t> order;
  std::vector<int32_t> end;  // end[c]: past the last sequence of length capacity - c
};

// Sequence indices by falling length, ties by rising index (counting sort).
Sorted by_falling_length(const int64_t* lengths, size_t num_sequences, int64_t capacity) {
  std::vector<int32_t> first(static_cast<size_t>(capacity) + 2, 0);  // first[c]: slot of length capacity - c
  for (size_t i = 0; i < num_sequences; ++i) ++first[capacity - lengths[i] + 1];
  for (size_t c = 1; c < first.size(); ++c) first[c] += first[c - 1];
  std::vector<int32_t> order(num_sequences);
  for (size_t i = 0; i < num_sequences; ++i) order[first[capacity - lengths[i]]++] = static_cast<int32_t>(i);
  return {std::move(order), std::move(first)};
}

struct Bin {
  int64_t tokens;
  int32_t number;
  std::vector<int32_t> sequences;  // by falling length

  // Fullest first, then lowest number: the order in which bins are split.
  bool operator<(const Bin& other) const {
    return std::tie(tokens, other.number) < std::tie(other.tokens, number);
  }
};

// Moves about half of a bin's tokens to a new bin: each sequence, longest first, joins the lighter side.
std::pair<Bin, Bin> halve(const Bin& bin, int32_t new_number, const int64_t* lengths) {
  Bin kept{0, bin.number, {}};
  Bin moved{0, new_number, {}};
  for (const int32_t sequence : bin.sequences) {
    Bin& lighter = moved.tokens < kept.tokens ? moved : kept;
    lighter.sequences.push_back(sequence);
    lighter.tokens += lengths[sequence];
  }
  return {std::move(kept), std::move(moved)};
}

// The `count` fullest bins that hold two or more sequences (fewer if there are not so many).
std::vector<Bin> fullest_divisible(const std::vector<int32_t>& order, const std::vector<int32_t>& bin_of_sequence,
                                   const int64_t* lengths, int64_t num_bins, size_t count) {
  std::vector<int64_t> tokens(num_bins, 0);
  std::vector<int32_t> sizes(num_bins, 0);
  for (size_t i = 0; i < bin_of_sequence.size(); ++i) {
    tokens[bin_of_sequence[i]] += lengths[i];
    ++sizes[bin_of_sequence[i]];
  }
  std::vector<Bin> chosen;
  for (int32_t b = 0; b < num_bins; ++b) {
    if (sizes[b] > 1) chosen.push_back({tokens[b], b, {}});
  }
  count = std::min(count, chosen.size());
  std::partial_sort(chosen.begin(), chosen.begin() + count, chosen.end(),
                    [](const Bin& a, const Bin& b) { return b < a; });
  chosen.resize(count);
  std::vector<int32_t> slot_of_bin(num_bins, -1);
  for (size_t slot = 0; slot < chosen.size(); ++slot) slot_of_bin[chosen[slot].number] = static_cast<int32_t>(slot);
  for (const int32_t sequence : order) {
    const int32_t slot = slot_of_bin[bin_of_sequence[sequence]];
    if (slot >= 0) chosen[slot].sequences.push_back(sequence);
  }
  return chosen;
}

// Splits bins until their number is a multiple of num_ranks or every bin holds a single sequence.
int64_t split_to_multiple(const std::vector<int32_t>& order, const int64_t* lengths, int64_t num_ranks,
                          int64_t num_bins, std::vector<int32_t>& bin_of_sequence) {
  const int64_t wanted = std::max<int64_t>(1, (num_bins + num_ranks - 1) / num_ranks) * num_ranks;
  if (num_bins == wanted) return wanted;
  std::priority_queue<Bin> divisible;
  for (Bin& bin : fullest_divisible(order, bin_of_sequence, lengths, num_bins, wanted - num_bins)) {
    divisible.push(std::move(bin));
  }
  while (num_bins < wanted && !divisible.empty()) {
    auto [kept, moved] = halve(divisible.top(), static_cast<int32_t>(num_bins++), lengths);
    divisible.pop();
    for (const int32_t sequence : moved.sequences) bin_of_sequence[sequence] = moved.number;
    if (kept.sequences.size() > 1) divisible.push(std::move(kept));
    if (moved.sequences.size() > 1) divisible.push(std::move(moved));
  }
  return wanted;
}

}  // namespace

Packing pack_best_fit(const int64_t* lengths, size_t num_sequences, int64_t capacity, int64_t num_ranks) {
  check(lengths, num_sequences, capacity, num_ranks);
  const auto [order, end] = by_falling_length(lengths, num_sequences, capacity);
  std::vector<int32_t> bin_of_sequence(num_sequences);
  CapacityIndex open_bins(capacity, num_sequences);
  int32_t num_bins = 0;
  for (int64_t length = capacity, next = 0; length > 0; --length) {
    for (const int32_t last = end[capacity - length]; next < last;) {
      const int64_t fit = open_bins.smallest_at_least(length);
      const int32_t bin = fit < 0 ? num_bins++ : open_bins.pop(fit);
      int64_t remaining = fit < 0 ? capacity : fit;
      // As long as the bin takes another sequence of this length it stays the best fit: nothing lay between.
      do {
        bin_of_sequence[order[next++]] = bin;
        remaining -= length;
      } while (remaining >= length && next < last);
      open_bins.push(bin, remaining);
    }
  }
  const int64_t rounded = split_to_multiple(order, lengths, num_ranks, num_bins, bin_of_sequence);
  return {std::move(bin_of_sequence), rounded};
}

}  // namespace r1mega::packing
