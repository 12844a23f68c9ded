#include "published.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace r1mega::eplb {

namespace {

uint64_t bits_of(float value) {
  uint32_t bits;
  value += 0.0f;  // -0 becomes 0
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

uint32_t index_of(uint64_t key) { return static_cast<uint32_t>(key); }

// Restores a heap with its smallest key on top, after the top has changed.
void sift_down(std::vector<uint64_t>& heap) {
  const size_t size = heap.size();
  if (size == 0) return;
  const uint64_t key = heap[0];
  size_t place = 0;
  for (size_t child = 1; child < size; child = 2 * place + 1) {
    if (child + 1 < size && heap[child + 1] < heap[child]) ++child;
    if (heap[child] >= key) break;
    heap[place] = heap[child];
    place = child;
  }
  heap[place] = key;
}

}  // namespace

uint64_t ascending_key(float value, uint32_t index) { return bits_of(value) << 32 | index; }

uint64_t descending_key(float value, uint32_t index) { return (~bits_of(value) << 32) | index; }

void BalancedPacking::pack(const float* weight, int items, int bins) {
  const int capacity = items / bins;
  bin.resize(items);
  rank.assign(items, 0);
  if (capacity == 1) {
    std::iota(bin.begin(), bin.end(), 0);
    return;
  }
  order_.resize(items);
  for (int item = 0; item < items; ++item) order_[item] = descending_key(weight[item], item);
  std::sort(order_.begin(), order_.end());
  heap_.resize(bins);
  for (int i = 0; i < bins; ++i) heap_[i] = ascending_key(0.0f, i);
  filled_.assign(bins, 0);
  total_.assign(bins, 0.0f);
  for (const uint64_t key : order_) {
    const uint32_t item = index_of(key), lightest = index_of(heap_[0]);
    bin[item] = static_cast<int32_t>(lightest);
    rank[item] = filled_[lightest]++;
    total_[lightest] += weight[item];
    if (filled_[lightest] == capacity) {
      heap_[0] = heap_.back();
      heap_.pop_back();
    } else {
      heap_[0] = ascending_key(total_[lightest], lightest);
    }
    sift_down(heap_);
  }
}

void Replication::replicate(const float* weight, int experts, int slots) {
  expert.resize(slots);
  std::iota(expert.begin(), expert.begin() + experts, 0);
  rank.assign(slots, 0);
  count.assign(experts, 1);
  if (slots == experts) return;
  heap_.resize(experts);
  for (int e = 0; e < experts; ++e) heap_[e] = descending_key(weight[e], e);
  std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
  for (int slot = experts; slot < slots; ++slot) {
    const uint32_t hottest = index_of(heap_[0]);
    expert[slot] = static_cast<int32_t>(hottest);
    rank[slot] = count[hottest]++;
    heap_[0] = descending_key(weight[hottest] / static_cast<float>(count[hottest]), hottest);
    sift_down(heap_);
  }
}

Published::Published(const Shape& shape) : shape_(shape) {
  expert_at_.resize(shape.experts);
  node_load_.resize(shape.experts);
  slot_load_.resize(shape.slots);
}

void Published::place_layer(const float* load, const float* group_load, int64_t* expert_of_slot,
                            int64_t* replica_of_slot, int64_t* replicas) {
  const int groups = shape_.groups, nodes = shape_.nodes;
  const int group_size = shape_.experts / groups, groups_per_node = groups / nodes;
  const int experts_per_node = shape_.experts / nodes, slots_per_node = shape_.slots / nodes;
  const int gpus_per_node = shape_.gpus / nodes, slots_per_gpu = shape_.slots / shape_.gpus;

  packing_.pack(group_load, groups, nodes);
  node_of_group = packing_.bin;
  for (int group = 0; group < groups; ++group) {
    const int first = (packing_.bin[group] * groups_per_node + packing_.rank[group]) * group_size;
    for (int i = 0; i < group_size; ++i) {
      expert_at_[first + i] = group * group_size + i;
      node_load_[first + i] = load[group * group_size + i];
    }
  }
  for (int node = 0; node < nodes; ++node) {
    const float* load_here = node_load_.data() + node * experts_per_node;
    const int32_t* expert_here = expert_at_.data() + node * experts_per_node;
    replication_.replicate(load_here, experts_per_node, slots_per_node);
    for (int slot = 0; slot < slots_per_node; ++slot) {
      const int e = replication_.expert[slot];
      slot_load_[slot] = load_here[e] / static_cast<float>(replication_.count[e]);
    }
    packing_.pack(slot_load_.data(), slots_per_node, gpus_per_node);
    for (int slot = 0; slot < slots_per_node; ++slot) {
      const int place = node * slots_per_node + packing_.bin[slot] * slots_per_gpu + packing_.rank[slot];
      expert_of_slot[place] = expert_here[replication_.expert[slot]];
      replica_of_slot[place] = replication_.rank[slot];
    }
    for (int e = 0; e < experts_per_node; ++e) replicas[expert_here[e]] = replication_.count[e];
  }
}

}  // namespace r1mega::eplb
