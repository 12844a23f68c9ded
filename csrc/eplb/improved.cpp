#include "improved.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

namespace r1mega::eplb {

namespace {

constexpr double kWorthwhile = 1.0 - 1e-7;  // smaller gains are rounding
constexpr int kPriceRounds = 12, kFruitlessRounds = 4;
constexpr int kSheddings = 16;
constexpr double kUneven = 1.01;  // where shedding replicas is tried
constexpr double kEven = 1.0005;  // nodes that differ less need no better prices

double per_replica(float load, int32_t count) { return static_cast<double>(load) / count; }

}  // namespace

Assignment::Assignment(int gpus, int slots_per_gpu, int nodes)
    : gpus_(gpus),
      slots_per_gpu_(slots_per_gpu),
      gpus_per_node_(gpus / nodes),
      replica_(static_cast<size_t>(gpus) * slots_per_gpu),
      total_(gpus) {}

double Assignment::heaviest() const {
  double heaviest = 0.0;
  for (int gpu = 0; gpu < gpus_; ++gpu) {
    double total = 0.0;
    for (int i = 0; i < slots_per_gpu_; ++i) total += on(gpu)[i].load;
    heaviest = std::max(heaviest, total);
  }
  return heaviest;
}

int Assignment::heaviest_gpu() const {
  return static_cast<int>(std::max_element(total_.begin(), total_.end()) - total_.begin());
}

double Assignment::mean_of_node(int node) const {
  const double* first = total_.data() + node * gpus_per_node_;
  return std::accumulate(first, first + gpus_per_node_, 0.0) / gpus_per_node_;
}

void Assignment::swap_until_stuck() {
  for (int gpu = 0; gpu < gpus_; ++gpu) {
    std::sort(on(gpu), on(gpu) + slots_per_gpu_,
              [](const Replica& a, const Replica& b) { return a.load < b.load; });
    total_[gpu] = 0.0;
    for (int i = 0; i < slots_per_gpu_; ++i) total_[gpu] += on(gpu)[i].load;
  }
  for (int swaps = 0; swaps < 2 * gpus_ * slots_per_gpu_ && swap_once(); ++swaps) {
  }
}

// Of all exchanges of one replica of the heaviest GPU `a` for one of another GPU `b`, the one after which the heavier
// of the two is lightest: their difference in load lies closest to half the gap between the GPUs.
bool Assignment::swap_once() {
  const int a = heaviest_gpu();
  const Replica* mine = on(a);
  double best = total_[a] * kWorthwhile;
  int best_gpu = -1, best_mine = 0, best_theirs = 0;
  for (int b = 0; b < gpus_; ++b) {
    const double middle = 0.5 * (total_[a] + total_[b]), half_gap = total_[a] - middle;
    if (b == a || middle >= best) continue;
    const bool anything = a / gpus_per_node_ == b / gpus_per_node_;
    const Replica* theirs = on(b);
    for (int i = 0, above = 0; i < slots_per_gpu_; ++i) {
      if (!anything && mine[i].stays) continue;
      const double wanted = mine[i].load - half_gap;
      while (above < slots_per_gpu_ && theirs[above].load < wanted) ++above;
      int j = above;  // the first not below what is wanted, that may move
      if (!anything) while (j < slots_per_gpu_ && theirs[j].stays) ++j;
      if (j < slots_per_gpu_ && middle + theirs[j].load - wanted < best) {
        best = middle + theirs[j].load - wanted;
        best_gpu = b, best_mine = i, best_theirs = j;
      }
      j = above - 1;  // the last below
      if (!anything) while (j >= 0 && theirs[j].stays) --j;
      if (j >= 0 && middle + wanted - theirs[j].load < best) {
        best = middle + wanted - theirs[j].load;
        best_gpu = b, best_mine = i, best_theirs = j;
      }
    }
  }
  if (best_gpu < 0) return false;
  const double moved = mine[best_mine].load - on(best_gpu)[best_theirs].load;
  total_[a] -= moved;
  total_[best_gpu] += moved;
  std::swap(on(a)[best_mine], on(best_gpu)[best_theirs]);
  keep_order(a, best_mine);
  keep_order(best_gpu, best_theirs);
  return true;
}

void Assignment::keep_order(int gpu, int changed) {
  Replica* replica = on(gpu);
  for (; changed > 0 && replica[changed].load < replica[changed - 1].load; --changed)
    std::swap(replica[changed], replica[changed - 1]);
  for (; changed + 1 < slots_per_gpu_ && replica[changed + 1].load < replica[changed].load; ++changed)
    std::swap(replica[changed], replica[changed + 1]);
}

Improved::Improved(const Shape& shape, Solver solver)
    : shape_(shape),
      solver_(solver),
      assignment_(shape.gpus, shape.slots / shape.gpus, shape.nodes),
      best_(assignment_),
      priced_(shape.experts),
      item_load_(shape.slots),
      items_(shape.nodes) {}

void Improved::place_layer(const float* load, const float* group_load,
                           const std::vector<int32_t>& node_of_group, int64_t* expert_of_slot,
                           int64_t* replica_of_slot, int64_t* replicas) {
  const int slots_per_gpu = shape_.slots / shape_.gpus, gpus = shape_.gpus;
  count_.assign(replicas, replicas + shape_.experts);
  for (int gpu = 0; gpu < gpus; ++gpu)
    for (int i = 0; i < slots_per_gpu; ++i) {
      const int slot = gpu * slots_per_gpu + i, e = static_cast<int>(expert_of_slot[slot]);
      assignment_.on(gpu)[i] = {per_replica(load[e], count_[e]), e, true};
    }
  const double published = assignment_.heaviest();
  double heaviest = std::numeric_limits<double>::infinity();
  const auto consider = [&] {
    assignment_.swap_until_stuck();
    const double other = assignment_.heaviest();
    if (other >= heaviest) return;
    heaviest = other;
    best_ = assignment_;
    best_count_ = count_;
  };
  consider();
  if (shape_.nodes > 1) {
    node_of_group_ = node_of_group;
    exchange_groups(group_load);
    if (node_of_group_ != node_of_group) {
      replicate_within_nodes(load);
      pack_nodes(load);
      consider();
    }
    if (solver_ == Solver::kAcrossNodes && shape_.slots > shape_.experts) {
      replicate_across_nodes(load);
      pack_nodes(load);
      consider();
    }
  }
  assignment_ = best_;
  count_ = best_count_;
  for (int i = 0; i < kSheddings && shed_replica(load); ++i) consider();
  if (heaviest >= published * kWorthwhile) return;
  for (int e = 0; e < shape_.experts; ++e) replicas[e] = best_count_[e];
  std::fill(count_.begin(), count_.end(), 0);
  for (int gpu = 0; gpu < gpus; ++gpu)
    for (int i = 0; i < slots_per_gpu; ++i) {
      const int e = best_.on(gpu)[i].expert;
      expert_of_slot[gpu * slots_per_gpu + i] = e;
      replica_of_slot[gpu * slots_per_gpu + i] = count_[e]++;
    }
}

// The heaviest GPU has two replicas that are too heavy to lie together, and there are more like them than GPUs: one goes,
// and a much lighter expert gets its slot. False where there is no such pair, or the node is even already.
bool Improved::shed_replica(const float* load) {
  const int gpus = shape_.gpus, slots_per_gpu = shape_.slots / gpus, gpus_per_node = gpus / shape_.nodes;
  const bool anything = shape_.nodes == 1 || solver_ == Solver::kWithinNodes;
  const int gpu = assignment_.heaviest_gpu(), node = gpu / gpus_per_node;
  if (assignment_.total(gpu) < kUneven * assignment_.mean_of_node(node)) return false;
  Assignment::Replica* shed = nullptr;
  for (int i = 0; i < slots_per_gpu; ++i) {
    Assignment::Replica& replica = assignment_.on(gpu)[i];
    if (count_[replica.expert] > 1 && (anything || !replica.stays) && (!shed || replica.load > shed->load))
      shed = &replica;
  }
  if (!shed) return false;
  const Assignment::Replica* grown = nullptr;
  for (int other = node * gpus_per_node; other < (node + 1) * gpus_per_node; ++other)
    for (int i = 0; i < slots_per_gpu; ++i) {
      const Assignment::Replica& replica = assignment_.on(other)[i];
      if (replica.load <= 0.5 * shed->load && (!grown || replica.load > grown->load)) grown = &replica;
    }
  if (!grown) return false;
  --count_[shed->expert];
  ++count_[grown->expert];
  shed->expert = grown->expert;
  for (int other = 0; other < gpus; ++other)
    for (int i = 0; i < slots_per_gpu; ++i) {
      Assignment::Replica& replica = assignment_.on(other)[i];
      replica.load = per_replica(load[replica.expert], count_[replica.expert]);
    }
  return true;
}

// The swaps of replicas, applied to groups in nodes: the published packing leaves room for them where a node has three
// groups or more.
void Improved::exchange_groups(const float* group_load) {
  const int groups = shape_.groups, nodes = shape_.nodes, groups_per_node = groups / nodes;
  if (groups_per_node < 3) return;
  Assignment on_nodes(nodes, groups_per_node, 1);
  std::vector<int32_t> filled(nodes, 0);
  for (int group = 0; group < groups; ++group) {
    const int node = node_of_group_[group];
    on_nodes.on(node)[filled[node]++] = {group_load[group], group, false};
  }
  const double before = on_nodes.heaviest();
  on_nodes.swap_until_stuck();
  if (on_nodes.heaviest() >= before * kWorthwhile) return;
  for (int node = 0; node < nodes; ++node)
    for (int i = 0; i < groups_per_node; ++i) node_of_group_[on_nodes.on(node)[i].expert] = node;
}

// Sets count_ and items_: in each node, replicas of its own experts.
void Improved::replicate_within_nodes(const float* load) {
  const int group_size = shape_.experts / shape_.groups;
  for (auto& items : items_) items.clear();
  for (int e = 0; e < shape_.experts; ++e) items_[node_of_group_[e / group_size]].push_back({e, true});
  for (auto& items : items_) {
    const int experts = static_cast<int>(items.size());
    for (int i = 0; i < experts; ++i) priced_[i] = load[items[i].expert];
    replication_.replicate(priced_.data(), experts, shape_.slots / shape_.nodes);
    for (int i = 0; i < experts; ++i) count_[items[i].expert] = replication_.count[i];
    for (int slot = experts; slot < shape_.slots / shape_.nodes; ++slot)
      items.push_back({items[replication_.expert[slot]].expert, solver_ == Solver::kWithinNodes});
  }
}

// Sets count_ and items_: the redundant slots of all nodes go to the experts whose load, times a price of their home
// node, is largest per replica. The prices of nodes that came out too heavy rise, so that their experts get more
// replicas, which lie in the lightest nodes.
void Improved::replicate_across_nodes(const float* load) {
  const int experts = shape_.experts, nodes = shape_.nodes, group_size = experts / shape_.groups;
  const double total = std::accumulate(load, load + experts, 0.0), fair = total / nodes;
  if (total == 0.0) return replicate_within_nodes(load);
  price_.assign(nodes, 1.0);
  double best = std::numeric_limits<double>::infinity();
  for (int round = 0, fruitless = 0; round < kPriceRounds && fruitless < kFruitlessRounds; ++round) {
    for (int e = 0; e < experts; ++e)
      priced_[e] = static_cast<float>(load[e] * price_[node_of_group_[e / group_size]]);
    replication_.replicate(priced_.data(), experts, shape_.slots);
    const double heaviest = spread_replicas(load);
    ++fruitless;
    if (heaviest < best) {
      best = heaviest, fruitless = 0;
      best_redundant_ = redundant_;
      count_ = replication_.count;
      if (heaviest * (shape_.gpus / nodes) < fair * kEven) break;
    }
    for (int node = 0; node < nodes; ++node) price_[node] *= node_load_[node] / fair;
  }
  for (auto& items : items_) items.clear();
  for (int e = 0; e < experts; ++e) items_[node_of_group_[e / group_size]].push_back({e, true});
  for (const auto& [key, node] : best_redundant_) items_[node].push_back({static_cast<int32_t>(key), false});
}

// Sets redundant_ and node_load_ for the counts of replication_: the redundant replicas, heaviest first, each in the
// lightest node with a free slot. Returns what the heaviest GPU has at least: a node's mean, or one replica.
double Improved::spread_replicas(const float* load) {
  const int experts = shape_.experts, nodes = shape_.nodes, group_size = experts / shape_.groups;
  const int num_redundant = shape_.slots - experts;
  float heaviest = 0.0f;
  node_load_.assign(nodes, 0.0);
  free_slots_.assign(nodes, num_redundant / nodes);
  for (int e = 0; e < experts; ++e) {
    priced_[e] = load[e] / static_cast<float>(replication_.count[e]);  // without a price
    heaviest = std::max(heaviest, priced_[e]);
    node_load_[node_of_group_[e / group_size]] += priced_[e];
  }
  redundant_.clear();
  for (int i = 0; i < num_redundant; ++i) {
    const int e = replication_.expert[experts + i];
    redundant_.emplace_back(descending_key(priced_[e], e), 0);
  }
  std::sort(redundant_.begin(), redundant_.end());
  for (auto& [key, node] : redundant_) {
    int lightest = -1;
    for (int n = 0; n < nodes; ++n)
      if (free_slots_[n] > 0 && (lightest < 0 || node_load_[n] < node_load_[lightest])) lightest = n;
    --free_slots_[lightest];
    node_load_[lightest] += priced_[static_cast<uint32_t>(key)];
    node = lightest;
  }
  const double node = *std::max_element(node_load_.begin(), node_load_.end());
  return std::max<double>(heaviest, node / (shape_.gpus / nodes));
}

// Sets assignment_ from items_ and count_: balanced packing in each node.
void Improved::pack_nodes(const float* load) {
  const int slots = shape_.slots / shape_.nodes, gpus = shape_.gpus / shape_.nodes;
  for (int node = 0; node < shape_.nodes; ++node) {
    const auto& items = items_[node];
    for (int i = 0; i < slots; ++i)
      item_load_[i] = load[items[i].expert] / static_cast<float>(count_[items[i].expert]);
    packing_.pack(item_load_.data(), slots, gpus);
    for (int i = 0; i < slots; ++i) {
      const int e = items[i].expert;
      assignment_.on(node * gpus + packing_.bin[i])[packing_.rank[i]] = {per_replica(load[e], count_[e]), e,
                                                                         items[i].stays};
    }
  }
}

}  // namespace r1mega::eplb
