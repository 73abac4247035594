// The circuits of one side as groups of edges, and what propagation alone says of its nodes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "circuit.hpp"

namespace clue::logic {

constexpr std::int8_t kOpen = 0, kTrue = 1, kFalse = -1;

// The edges that enter a node in one circuit through one kind of gate, the embedding left out.
struct Group {
  std::int32_t node, first, last;  // inputs[first, last)
  std::uint32_t name;              // circuit << 2 | gate
  bool all;                        // asks for all inputs, otherwise for any
};

// One side: its groups in order of their node, and the value of x (circuit.hpp) for each node.
struct Side {
  bool retain;
  Semantics semantics;
  std::vector<Group> groups;
  std::vector<std::int32_t> first_group;  // [n_nodes + 1] groups of node n are [first_group[n], first_group[n + 1])
  std::vector<std::int32_t> inputs;
  std::vector<std::uint8_t> member;  // node is in a circuit of this side
  std::vector<std::int8_t> x;        // kOpen, kTrue or kFalse; meaningful for members only
  bool pinned = false;               // some x is pinned to false, so that all x true is no model
  bool refuted = false;              // the pins allow no model

  bool open(std::int32_t node) const { return member[node] && x[node] == kOpen; }

  // Whether what the group asks for is known to hold.
  bool holds(const Group& group) const {
    const auto begin = inputs.begin() + group.first, end = inputs.begin() + group.last;
    const auto is_true = [&](std::int32_t input) { return x[input] == kTrue; };
    return group.all ? std::all_of(begin, end, is_true) : std::any_of(begin, end, is_true);
  }
  bool all_hold(std::int32_t node) const {
    return std::all_of(groups.begin() + first_group[node], groups.begin() + first_group[node + 1],
                       [&](const Group& group) { return holds(group); });
  }
};

// Sorts one side's edges into groups. A group that the embedding satisfies is left out. Where a limit strikes, groups
// are missing, members are not.
Side make_side(const Question& question, bool retain, Limits& limits);

// Unit propagation. Without pins all x true is a model, so nothing is ever refuted and x only becomes true.
void propagate(Side& side, Limits& limits);

}  // namespace clue::logic
