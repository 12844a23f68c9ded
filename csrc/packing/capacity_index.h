// A set of bins keyed by remaining capacity, for best fit: "the fullest bin that still takes n tokens".
//
// A hierarchical bitset (64-way tree) says which remaining capacities occur; bins of equal remaining
// capacity form a linked stack. Every operation costs one word per tree level: 3 levels at 32,768 tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace r1mega::packing {

class CapacityIndex {
 public:
  static constexpr int32_t kNone = -1;

  // Remaining capacities lie in [0, capacity]; at most max_bins bins, numbered from 0.
  CapacityIndex(int64_t capacity, size_t max_bins)
      : top_of_stack_(static_cast<size_t>(capacity) + 1, kNone), next_(max_bins, kNone) {
    size_t size = static_cast<size_t>(capacity) + 1;
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(size, 0);
    } while (size > 1);
  }

  void push(int32_t bin, int64_t remaining) {
    next_[bin] = top_of_stack_[remaining];
    top_of_stack_[remaining] = bin;
    size_t position = static_cast<size_t>(remaining);
    for (auto& level : levels_) {
      uint64_t& word = level[position / 64];
      const bool was_empty = word == 0;
      word |= uint64_t{1} << (position % 64);
      if (!was_empty) break;
      position /= 64;
    }
  }

  // The bin last pushed with this remaining capacity; the caller found it with smallest_at_least.
  int32_t pop(int64_t remaining) {
    const int32_t bin = top_of_stack_[remaining];
    top_of_stack_[remaining] = next_[bin];
    if (next_[bin] != kNone) return bin;
    size_t position = static_cast<size_t>(remaining);
    for (auto& level : levels_) {
      uint64_t& word = level[position / 64];
      word &= ~(uint64_t{1} << (position % 64));
      if (word != 0) break;
      position /= 64;
    }
    return bin;
  }

  // The smallest remaining capacity that occurs and is at least `length`, or -1.
  int64_t smallest_at_least(int64_t length) const {
    size_t position = static_cast<size_t>(length);
    for (size_t height = 0; height < levels_.size(); ++height) {
      const size_t index = position / 64;
      if (index >= levels_[height].size()) return -1;
      const uint64_t candidates = levels_[height][index] & (~uint64_t{0} << (position % 64));
      if (candidates != 0) return descend(height, index * 64 + lowest_bit(candidates));
      position = index + 1;  // everything further right is one bit to the right, one level up
    }
    return -1;
  }

 private:
  static size_t lowest_bit(uint64_t word) { return static_cast<size_t>(__builtin_ctzll(word)); }

  int64_t descend(size_t height, size_t position) const {
    while (height > 0) {
      --height;
      position = position * 64 + lowest_bit(levels_[height][position]);
    }
    return static_cast<int64_t>(position);
  }

  std::vector<std::vector<uint64_t>> levels_;  // levels_[0] has one bit per remaining capacity
  std::vector<int32_t> top_of_stack_;
  std::vector<int32_t> next_;
};

}  // namespace r1mega::packing
