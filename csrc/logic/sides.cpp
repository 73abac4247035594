// One pass of counting sort over a side's edges, and unit propagation over its groups.
#include "sides.hpp"

#include <algorithm>
#include <numeric>

namespace clue::logic {

Side make_side(const Question& q, bool retain, Limits& limits) {
  const auto n = static_cast<std::size_t>(q.n_nodes);
  const auto& circuits = retain ? q.retain : q.forget;
  Side side{retain, q.semantics, {}, {}, {}, std::vector<std::uint8_t>(n), std::vector<std::int8_t>(n, kOpen),
            false,  false};

  std::vector<std::int64_t> start(n + 1);
  for (const Circuit& circuit : circuits)
    for (std::size_t e = 0; e < circuit.src.size(); ++e) {
      ++start[static_cast<std::size_t>(circuit.dst[e]) + 1];
      side.member[circuit.src[e]] = side.member[circuit.dst[e]] = 1;
    }
  std::partial_sum(start.begin(), start.end(), start.begin());
  // circuit, gate and source in one number, so that sorting a receiver's edges groups them
  std::vector<std::uint64_t> keys(static_cast<std::size_t>(start.back()));
  std::vector<std::int64_t> next(start.begin(), start.end() - 1);
  for (std::size_t c = 0; c < circuits.size(); ++c)
    for (std::size_t e = 0; e < circuits[c].src.size() && !limits.tick(); ++e)
      keys[static_cast<std::size_t>(next[circuits[c].dst[e]]++)] = std::uint64_t{c} << 34 |
                                                                   std::uint64_t{circuits[c].gate[e]} << 32 |
                                                                   static_cast<std::uint32_t>(circuits[c].src[e]);

  if (const auto pins = retain ? q.retain_pin : q.forget_pin; !pins.empty())
    for (std::size_t node = 0; node < n; ++node)
      if (pins[node] >= 0 && side.member[node]) side.x[node] = (pins[node] == 1) == retain ? kTrue : kFalse;
  side.pinned = std::find(side.x.begin(), side.x.end(), kFalse) != side.x.end();
  side.x[0] = retain ? kTrue : kFalse;  // the embedding works
  side.x[n - 1] = kTrue;
  side.first_group.reserve(n + 1);
  side.inputs.reserve(keys.size());
  for (std::size_t node = 0; node < n && !limits.tick(); ++node) {
    side.first_group.push_back(static_cast<std::int32_t>(side.groups.size()));
    const auto first = keys.begin() + start[node], last = keys.begin() + start[node + 1];
    std::sort(first, last);
    const auto end = std::unique(first, last);
    for (auto edge = first; edge != end;) {
      const std::uint64_t group = *edge >> 32;
      const auto gate = static_cast<Gate>(group & 3);
      const bool all = gate == Gate::Adder || (gate == Gate::And) == retain;
      const auto begin = static_cast<std::int32_t>(side.inputs.size());
      bool embed = false;
      for (; edge != end && *edge >> 32 == group; ++edge) {
        const auto source = static_cast<std::int32_t>(*edge & 0xffffffffU);
        if (source == 0)
          embed = true;
        else
          side.inputs.push_back(source);
      }
      const auto stop = static_cast<std::int32_t>(side.inputs.size());
      const bool satisfied = begin == stop || (embed && retain && !all);
      if (satisfied) {
        side.inputs.resize(static_cast<std::size_t>(begin));
        // An equivalence with a group that always works makes the node work.
        if (retain && side.semantics == Semantics::Authors) {
          side.refuted = side.refuted || side.x[node] == kFalse;
          side.x[node] = kTrue;
        }
      } else {
        side.groups.push_back({static_cast<std::int32_t>(node), begin, stop, static_cast<std::uint32_t>(group), all});
      }
    }
  }
  side.first_group.push_back(static_cast<std::int32_t>(side.groups.size()));
  return side;
}

void propagate(Side& side, Limits& limits) {
  if (limits.expired()) return;
  std::vector<std::int32_t> queue;
  for (std::size_t node = 1; node < side.x.size(); ++node)
    if (side.x[node] == kTrue) queue.push_back(static_cast<std::int32_t>(node));
  const auto raise = [&](std::int32_t node) {
    side.refuted = side.refuted || side.x[node] == kFalse;
    if (side.x[node] != kOpen) return;
    side.x[node] = kTrue;
    queue.push_back(node);
  };

  // authors: the groups each node is an input of, and how many inputs of each group are still open
  std::vector<std::int64_t> first_use;
  std::vector<std::int32_t> uses, missing;
  if (side.semantics == Semantics::Authors) {
    first_use.assign(side.x.size() + 1, 0);
    for (const std::int32_t input : side.inputs) ++first_use[static_cast<std::size_t>(input) + 1];
    std::partial_sum(first_use.begin(), first_use.end(), first_use.begin());
    uses.resize(side.inputs.size());
    std::vector<std::int64_t> next(first_use.begin(), first_use.end() - 1);
    for (std::size_t g = 0; g < side.groups.size(); ++g) {
      if (limits.tick()) return;
      const Group& group = side.groups[g];
      missing.push_back(group.last - group.first);
      for (std::int32_t i = group.first; i < group.last; ++i)
        uses[static_cast<std::size_t>(next[side.inputs[i]]++)] = static_cast<std::int32_t>(g);
    }
  }

  while (!queue.empty() && !limits.tick()) {
    const std::int32_t node = queue.back();
    queue.pop_back();
    for (std::int32_t g = side.first_group[node]; g < side.first_group[node + 1]; ++g) {
      const Group& group = side.groups[g];
      if (group.all || group.last - group.first == 1)
        for (std::int32_t i = group.first; i < group.last; ++i) raise(side.inputs[i]);
    }
    if (uses.empty()) continue;
    for (std::int64_t u = first_use[node]; u < first_use[node + 1]; ++u) {
      const Group& group = side.groups[uses[u]];
      if (--missing[uses[u]] == 0 || !group.all) raise(group.node);
    }
  }
}

}  // namespace clue::logic
