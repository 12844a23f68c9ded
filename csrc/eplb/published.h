// The published algorithm for one layer, and its two parts.
#pragma once

#include <cstdint>
#include <vector>

#include "placement.h"

namespace r1mega::eplb {

// The bits of a float that is not negative grow with it: above an index, they make an integer to sort by. The lower half
// is the index.
uint64_t ascending_key(float value, uint32_t index);
uint64_t descending_key(float value, uint32_t index);

// Heaviest first into the lightest bin that is not full; all bins get equally many items, sums are float32.
class BalancedPacking {
 public:
  void pack(const float* weight, int items, int bins);
  std::vector<int32_t> bin, rank;  // of each item

 private:
  std::vector<uint64_t> order_, heap_;
  std::vector<int32_t> filled_;
  std::vector<float> total_;
};

// Give one replica after another to the expert with the largest load per replica.
class Replication {
 public:
  void replicate(const float* weight, int experts, int slots);
  std::vector<int32_t> expert, rank;  // of each slot; the first `experts` slots are the experts themselves
  std::vector<int32_t> count;         // of each expert

 private:
  std::vector<uint64_t> heap_;
};

class Published {
 public:
  explicit Published(const Shape& shape);
  void place_layer(const float* load, const float* group_load, int64_t* expert_of_slot,
                   int64_t* replica_of_slot, int64_t* replicas);
  std::vector<int32_t> node_of_group;  // of the last layer placed

 private:
  Shape shape_;
  BalancedPacking packing_;
  Replication replication_;
  std::vector<int32_t> expert_at_;  // in the order of nodes
  std::vector<float> node_load_, slot_load_;
};

}  // namespace r1mega::eplb
