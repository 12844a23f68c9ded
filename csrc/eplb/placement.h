// Placement of expert replicas on GPUs: DeepSeek's EPLB and a solver that starts from its result.
#pragma once

#include <cstdint>
#include <vector>

namespace r1mega::eplb {

struct Shape {
  int64_t layers, experts, slots, groups, nodes, gpus;  // slots: replicas of all experts, over all gpus
};

enum class Solver {
  kPublished,    // the published algorithm, bit for bit
  kWithinNodes,  // better packing; every replica stays in the node of its expert's group
  kAcrossNodes,  // every expert keeps a replica in its group's node, further ones may lie in other nodes
};

struct Placement {
  std::vector<int64_t> expert_of_slot;   // [layers, slots]; slot s lies on GPU s / (slots / gpus)
  std::vector<int64_t> replica_of_slot;  // [layers, slots]: which of its expert's replicas it is
  std::vector<int64_t> replicas;         // [layers, experts]
};

// load: [layers, experts], finite, not negative. group_load: [layers, groups], its sums over groups as the caller's
// float32 arithmetic gives them (the published algorithm compares these). The groups are those that the algorithm
// uses: one group and one node in its global mode. Ties go to the lowest index.
Placement place(const float* load, const float* group_load, const Shape& shape, Solver solver);

}  // namespace r1mega::eplb
