#include "placement.h"

#include "improved.h"
#include "published.h"

namespace r1mega::eplb {

Placement place(const float* load, const float* group_load, const Shape& shape, Solver solver) {
  Placement result;
  result.expert_of_slot.resize(shape.layers * shape.slots);
  result.replica_of_slot.resize(shape.layers * shape.slots);
  result.replicas.resize(shape.layers * shape.experts);
  Published published(shape);
  Improved improved(shape, solver);
  for (int64_t layer = 0; layer < shape.layers; ++layer) {
    const float* load_here = load + layer * shape.experts;
    const float* group_load_here = group_load + layer * shape.groups;
    int64_t* expert_of_slot = result.expert_of_slot.data() + layer * shape.slots;
    int64_t* replica_of_slot = result.replica_of_slot.data() + layer * shape.slots;
    int64_t* replicas = result.replicas.data() + layer * shape.experts;
    published.place_layer(load_here, group_load_here, expert_of_slot, replica_of_slot, replicas);
    if (solver != Solver::kPublished)
      improved.place_layer(load_here, group_load_here, published.node_of_group, expert_of_slot,
                           replica_of_slot, replicas);
  }
  return result;
}

}  // namespace r1mega::eplb
