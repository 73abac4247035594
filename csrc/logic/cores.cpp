// Packing of cores: as flows are packed along paths, but that a group which asks for any input needs all of them cut.
//
// 1. A node can die for free if it can be edited for free, or each of its groups can die for free.
// 2. For a node that must die and cannot for free, follow one of the inputs that cannot of each group that asks for
// all,
//    and all inputs of one that asks for any, down to where there are no inputs. The nodes on the way are a core.
// 3. Its least price is taken off each of them. Some are free then, and so may be what they feed.
#include "cores.hpp"

#include <algorithm>
#include <limits>
#include <numeric>

namespace clue::logic {
namespace {

constexpr std::int64_t kFar = std::numeric_limits<std::int32_t>::max();

class Packing {
 public:
  Packing(const Cone& cone, std::vector<std::int64_t> price, Limits& limits)
      : cone_(cone),
        side_(cone.dead),
        limits_(limits),
        n_(static_cast<std::int32_t>(side_.x.size())),
        price_(std::move(price)),
        free_(side_.x.size()),
        open_groups_(side_.x.size()),
        missing_(side_.groups.size()),
        length_(side_.x.size()),
        seen_(side_.x.size(), -1) {}

  std::vector<std::vector<std::int32_t>> cores() {
    prepare();
    std::vector<std::int32_t> roots;
    for (std::int32_t node = 1; node < n_; ++node)
      if (side_.member[node] && side_.x[node] == kTrue && !free_[node]) roots.push_back(node);
    std::stable_sort(roots.begin(), roots.end(),
                     [&](std::int32_t a, std::int32_t b) { return length_[a] < length_[b]; });
    for (const std::int32_t node : roots)
      while (!free_[node] && !limits_.tick() && take(node)) {
      }
    return std::move(found_);
  }

 private:
  bool can_edit_free(std::int32_t node) const {
    return cone_.may_edit(node) && (cone_.edit[node] == kTrue || price_[node] == 0);
  }

  // What is free from the start, the shortest core below each node, and the groups that each node is an input of.
  void prepare() {
    first_use_.assign(side_.x.size() + 1, 0);
    for (const std::int32_t input : side_.inputs) ++first_use_[static_cast<std::size_t>(input) + 1];
    std::partial_sum(first_use_.begin(), first_use_.end(), first_use_.begin());
    uses_.resize(side_.inputs.size());
    std::vector<std::int64_t> next(first_use_.begin(), first_use_.end() - 1);
    for (std::int32_t node = 1; node < n_ && !limits_.tick(); ++node) {
      if (!side_.member[node]) continue;
      const std::int32_t first = side_.first_group[node], last = side_.first_group[node + 1];
      std::int64_t shortest = first == last ? 0 : kFar;
      for (std::int32_t g = first; g < last; ++g) {
        const Group& group = side_.groups[g];
        std::int64_t length = group.all ? kFar : 0;
        for (std::int32_t i = group.first; i < group.last; ++i) {
          const std::int32_t input = side_.inputs[i];
          uses_[static_cast<std::size_t>(next[input]++)] = g;
          missing_[g] += free_[input] ? 0 : 1;
          length = group.all ? std::min(length, length_[input]) : std::min(kFar, length + length_[input]);
        }
        if (!group.all) missing_[g] = missing_[g] == group.last - group.first ? 1 : 0;
        open_groups_[node] += missing_[g] > 0;
        if (missing_[g] > 0) shortest = std::min(shortest, length);
      }
      length_[node] = std::min(kFar, shortest + (cone_.may_edit(node) ? 1 : 0));
      free_[node] = can_edit_free(node) || (first != last && open_groups_[node] == 0);
    }
  }

  void set_free(std::int32_t node) {
    free_[node] = 1;
    queue_.assign(1, node);
    while (!queue_.empty()) {
      const std::int32_t input = queue_.back();
      queue_.pop_back();
      for (std::int64_t u = first_use_[input]; u < first_use_[static_cast<std::size_t>(input) + 1]; ++u) {
        const Group& group = side_.groups[uses_[u]];
        std::int32_t& missing = missing_[uses_[u]];
        if (missing == 0 || --missing > 0) continue;
        if (--open_groups_[group.node] > 0 || free_[group.node]) continue;
        free_[group.node] = 1;
        queue_.push_back(group.node);
      }
    }
  }

  // One core of a node that must die. False if there is none.
  bool take(std::int32_t root) {
    const auto stamp = static_cast<std::int32_t>(found_.size());
    std::vector<std::int32_t> core;
    seen_[root] = stamp;
    queue_.assign(1, root);
    while (!queue_.empty()) {
      const std::int32_t node = queue_.back();
      queue_.pop_back();
      if (cone_.may_edit(node)) core.push_back(node);
      // the group with the shortest core
      std::int32_t best = -1, nearest = 0;
      std::int64_t least = std::numeric_limits<std::int64_t>::max();
      for (std::int32_t g = side_.first_group[node]; g < side_.first_group[node + 1]; ++g) {
        if (missing_[g] == 0) continue;
        const Group& group = side_.groups[g];
        std::int64_t length = 0;
        std::int32_t near = 0;
        for (std::int32_t i = group.first; i < group.last; ++i) {
          const std::int32_t input = side_.inputs[i];
          if (!group.all) {
            length += length_[input];
          } else if (!free_[input] && (near == 0 || length_[input] < length)) {
            near = input;
            length = length_[input];
          }
        }
        if (length >= least) continue;
        least = length;
        best = g;
        nearest = near;
      }
      if (best < 0) continue;
      const Group& group = side_.groups[best];
      for (std::int32_t i = group.first; i < group.last; ++i) {
        const std::int32_t input = side_.inputs[i];
        if ((group.all && input != nearest) || seen_[input] == stamp) continue;
        seen_[input] = stamp;
        queue_.push_back(input);
      }
    }
    if (core.empty()) return false;
    std::int64_t least = price_[core.front()];
    for (const std::int32_t node : core) least = std::min(least, price_[node]);
    for (const std::int32_t node : core)
      if ((price_[node] -= least) == 0 && !free_[node]) set_free(node);
    found_.push_back(std::move(core));
    return true;
  }

  const Cone& cone_;
  const Side& side_;
  Limits& limits_;
  const std::int32_t n_;
  std::vector<std::int64_t> price_;
  std::vector<std::uint8_t> free_;
  std::vector<std::int32_t> open_groups_;  // by node: groups that cannot die for free
  std::vector<std::int32_t> missing_;      // by group: inputs that have to be free and are not
  std::vector<std::int64_t> length_;       // by node: about how many nodes its shortest core has
  std::vector<std::int32_t> seen_;         // by node: the last core whose search met it
  std::vector<std::int64_t> first_use_;
  std::vector<std::int32_t> uses_, queue_;
  std::vector<std::vector<std::int32_t>> found_;
};

}  // namespace

std::vector<std::vector<std::int32_t>> first_cores(const Cone& cone, std::vector<std::int64_t> price, Limits& limits) {
  return Packing(cone, std::move(price), limits).cores();
}

}  // namespace clue::logic
