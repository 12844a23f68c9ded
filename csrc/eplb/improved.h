// A placement whose heaviest GPU is never heavier than the published algorithm's.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "placement.h"
#include "published.h"

namespace r1mega::eplb {

// Replicas on GPUs, equally many on each, with their loads: the thing that swaps improve.
class Assignment {
 public:
  struct Replica {
    double load;
    int32_t expert;
    bool stays;  // in its node
  };

  Assignment(int gpus, int slots_per_gpu, int nodes);
  Replica* on(int gpu) { return replica_.data() + gpu * slots_per_gpu_; }
  const Replica* on(int gpu) const { return replica_.data() + gpu * slots_per_gpu_; }
  double heaviest() const;
  // After swap_until_stuck:
  int heaviest_gpu() const;
  double total(int gpu) const { return total_[gpu]; }
  double mean_of_node(int node) const;
  // Exchange replicas of the heaviest GPU for others', as long as that makes it lighter.
  void swap_until_stuck();

 private:
  bool swap_once();
  void keep_order(int gpu, int changed);

  int gpus_, slots_per_gpu_, gpus_per_node_;
  std::vector<Replica> replica_;  // [gpus, slots_per_gpu], lightest first while swapping
  std::vector<double> total_;     // of each gpu
};

class Improved {
 public:
  Improved(const Shape& shape, Solver solver);
  // In: the published placement of the layer. Out: this one, the same where nothing better was found.
  void place_layer(const float* load, const float* group_load, const std::vector<int32_t>& node_of_group,
                   int64_t* expert_of_slot, int64_t* replica_of_slot, int64_t* replicas);

 private:
  void exchange_groups(const float* group_load);
  void replicate_within_nodes(const float* load);
  void replicate_across_nodes(const float* load);
  double spread_replicas(const float* load);
  bool shed_replica(const float* load);
  void pack_nodes(const float* load);

  Shape shape_;
  Solver solver_;
  Assignment assignment_, best_;
  BalancedPacking packing_;
  Replication replication_;
  std::vector<int32_t> node_of_group_, count_, best_count_;
  std::vector<float> priced_, item_load_;
  std::vector<double> price_, node_load_;
  std::vector<int32_t> free_slots_;
  std::vector<std::pair<uint64_t, int32_t>> redundant_, best_redundant_;  // (load and expert, node)
  struct Item {
    int32_t expert;
    bool stays;
  };
  std::vector<std::vector<Item>> items_;  // of each node
};

}  // namespace r1mega::eplb
