// What of a surgical question is left to choose: the edits that the best edit set may contain.
#pragma once

#include <compare>
#include <cstdint>
#include <vector>

#include "sides.hpp"
#include "surgery.hpp"

namespace clue::logic {

// What an edit costs on the levels of the order, the earlier ones counting infinitely more. Sums that grow too large
// are infinite.
struct Price {
  std::int64_t conflict = 0, edit = 0, risk = 0, minus_reach = 0;

  static Price infinite() { return {kMost, 0, 0, 0}; }
  Price operator+(const Price& other) const;
  auto operator<=>(const Price&) const = default;

 private:
  static constexpr std::int64_t kMost = std::int64_t{1} << 61;
};

// Starts with what follows by unit propagation, then fixes more, such that the best edit set stays what it is.
class Cone {
 public:
  Cone(const Operation& operation, Limits& limits);

  bool complete() const;  // false where a limit struck before all groups were known
  void propagate();
  void reduce();

  bool both(std::int32_t node) const { return editable_[node] && works.member[node]; }
  bool may_edit(std::int32_t node) const { return editable_[node] && edit[node] != kFalse; }
  // Editing it is worth something by itself, and costs nothing.
  bool gains(std::int32_t node) const;
  // Its death asks something of its inputs.
  bool asks(std::int32_t node) const;
  std::int64_t risk(std::int32_t node) const { return works.member[node] ? q_.risk[node] : 0; }

  Side dead, works;                  // x is d and r
  std::vector<std::int8_t> edit;     // e
  std::vector<std::uint8_t> wanted;  // d_n may be of use
  std::vector<std::int8_t> below;    // kTrue: its groups are surely dead; kFalse: one cannot die, or there is none

 private:
  // From the inputs to the outputs: what can die, and at which price; and back: what is needed for that.
  void forward(bool choose);
  void backward(bool choose);
  void settle_works();
  std::int8_t below_of(std::int32_t node) const;
  Price price(std::int32_t node, bool least) const;
  std::int32_t common(std::int32_t a, std::int32_t b) const;
  void fix(std::int8_t& value, std::int8_t to) {
    changed_ = changed_ || value != to;
    value = to;
  }

  const Question& q_;
  Limits& limits_;
  const bool limited_;
  bool changed_ = false;
  std::vector<std::uint8_t> editable_;
  std::vector<Price> kill_, cut_;        // least known price of n's death, and of doing without it
  std::vector<std::int32_t> dominator_;  // the next node that all paths from n to what must die pass
  std::vector<std::int32_t> cheapest_;   // of these, up to what must die: the one that is best edited; -1 is none
};

}  // namespace clue::logic
