// Rules that fix edits. Each names a better edit set for every one that breaks it, so the best one, which is unique,
// obeys them all at once:
//
// 1. What nobody's death needs is not edited, unless that is worth something by itself and free.
// 2. Above: n is not edited if a cut between n and what must die costs no more, such as one node that all paths pass.
//    At equal price the cut is better, since its nodes have higher ids.
// 3. Below: n is not edited if killing its inputs costs less.
// 4. What n's death asks of its inputs follows once n is not edited; what cannot die otherwise is edited.
//
// Under limits on edits a set may not become larger or dearer in weight: rule 2 then holds for single nodes of no more
// weight, and rule 3 where the inputs are dead anyway.
#include "cone.hpp"

#include <algorithm>
#include <utility>

namespace clue::logic {
namespace {

constexpr int kRounds = 20;
constexpr int kClimbs = 64;  // most steps to find where two chains of dominators meet

Question without_pins(Question question) {
  question.forget_pin = question.retain_pin = {};
  question.semantics = Semantics::Support;
  return question;
}

}  // namespace

Price Price::operator+(const Price& other) const {
  const Price sum{conflict + other.conflict, edit + other.edit, risk + other.risk, minus_reach + other.minus_reach};
  const bool fits = sum.conflict < kMost && sum.edit < kMost && sum.risk < kMost && sum.minus_reach > -kMost;
  return fits ? sum : infinite();
}

Cone::Cone(const Operation& operation, Limits& limits)
    : dead(make_side(without_pins(operation.question), false, limits)),
      works(make_side(without_pins(operation.question), true, limits)),
      q_(operation.question),
      limits_(limits),
      limited_(!operation.limits.empty()),
      editable_(q_.editable.begin(), q_.editable.end()) {
  const auto n = static_cast<std::size_t>(q_.n_nodes);
  edit.assign(n, kFalse);
  wanted.assign(n, 0);
  below.assign(n, kOpen);
  kill_.resize(n);
  cut_.resize(n);
  dominator_.assign(n, 0);
  cheapest_.assign(n, -1);
  for (std::size_t node = 0; node < n; ++node) {
    editable_[node] = editable_[node] && dead.member[node] && node != 0 && node != n - 1;
    if (!editable_[node]) continue;
    const std::int8_t pin = q_.forget_pin.empty() ? std::int8_t{-1} : q_.forget_pin[node];
    edit[node] = pin == 1 ? kFalse : pin == 0 ? kTrue : kOpen;
  }
  if (!operation.least) return;
  std::fill(works.member.begin(), works.member.end(), std::uint8_t{0});
  works.groups.clear();
  std::fill(works.first_group.begin(), works.first_group.end(), 0);
}

bool Cone::complete() const {
  const auto n = static_cast<std::size_t>(q_.n_nodes);
  return dead.first_group.size() == n + 1 && works.first_group.size() == n + 1;
}

void Cone::propagate() {
  logic::propagate(works, limits_);
  forward(false);
  backward(false);
  forward(false);
}

void Cone::reduce() {
  if (!limited_)
    for (std::int32_t node = 1; node < q_.n_nodes; ++node)
      if (editable_[node] && edit[node] == kOpen && gains(node)) edit[node] = kTrue;
  changed_ = true;
  for (int round = 0; round < kRounds && changed_ && !limits_.expired(); ++round) {
    changed_ = false;
    settle_works();
    forward(true);
    backward(true);
  }
  settle_works();
  do {
    changed_ = false;
    forward(false);
    backward(false);
  } while (changed_ && !limits_.expired());
}

bool Cone::gains(std::int32_t node) const { return q_.weight[node] == 0 && risk(node) == 0 && q_.reach[node] > 0; }

bool Cone::asks(std::int32_t node) const {
  return wanted[node] && edit[node] != kTrue && dead.x[node] != kFalse && below[node] == kOpen;
}

Price Cone::price(std::int32_t node, bool least) const {
  const bool conflict = both(node) && (least ? works.x[node] == kTrue : works.x[node] != kFalse);
  return {conflict ? q_.weight[node] : 0, q_.weight[node], risk(node), -q_.reach[node]};
}

std::int8_t Cone::below_of(std::int32_t node) const {
  bool open = false;
  const std::int32_t first = dead.first_group[node], last = dead.first_group[node + 1];
  for (std::int32_t g = first; g < last; ++g) {
    const Group& group = dead.groups[g];
    if (dead.holds(group)) continue;
    open = true;
    const auto begin = dead.inputs.begin() + group.first, end = dead.inputs.begin() + group.last;
    const auto lives = [&](std::int32_t input) { return dead.x[input] == kFalse; };
    if (group.all ? std::any_of(begin, end, lives) : std::all_of(begin, end, lives)) return kFalse;
  }
  return first == last ? kFalse : open ? kOpen : kTrue;
}

void Cone::forward(bool choose) {
  for (std::int32_t node = 1; node < q_.n_nodes && !limits_.tick(); ++node) {
    if (!dead.member[node]) continue;
    below[node] = below_of(node);
    if (below[node] == kFalse && edit[node] == kOpen && dead.x[node] == kTrue) fix(edit[node], kTrue);
    if (below[node] == kFalse && edit[node] == kFalse) fix(dead.x[node], kFalse);
    if (edit[node] == kTrue || below[node] == kTrue) fix(dead.x[node], kTrue);
    if (!choose) continue;
    Price inputs = below[node] == kFalse ? Price::infinite() : Price{};
    if (below[node] == kOpen)
      for (std::int32_t g = dead.first_group[node]; g < dead.first_group[node + 1]; ++g) {
        const Group& group = dead.groups[g];
        if (group.all) {
          for (std::int32_t i = group.first; i < group.last; ++i) inputs = inputs + kill_[dead.inputs[i]];
        } else {
          Price least = Price::infinite();
          for (std::int32_t i = group.first; i < group.last; ++i) least = std::min(least, kill_[dead.inputs[i]]);
          inputs = inputs + least;
        }
      }
    if (edit[node] == kOpen && !gains(node) && (below[node] == kTrue || (!limited_ && inputs < price(node, true))))
      fix(edit[node], kFalse);
    kill_[node] = dead.x[node] == kTrue ? Price{} : edit[node] == kOpen ? std::min(inputs, price(node, false)) : inputs;
  }
}

// Where the chains of two nodes' dominators meet; the output if that takes too long.
std::int32_t Cone::common(std::int32_t a, std::int32_t b) const {
  for (int climbs = 0; a != b; ++climbs) {
    if (climbs == kClimbs) return q_.n_nodes - 1;
    (a < b ? a : b) = dominator_[std::min(a, b)];
  }
  return a;
}

void Cone::backward(bool choose) {
  const std::int32_t output = q_.n_nodes - 1;
  std::fill(wanted.begin(), wanted.end(), std::uint8_t{0});
  std::fill(dominator_.begin(), dominator_.end(), 0);
  for (std::int32_t node = output; node > 0 && !limits_.tick(); --node) {
    if (!dead.member[node]) continue;
    const bool must_die = dead.x[node] == kTrue;
    if (must_die) wanted[node] = 1;
    if (choose) {
      if (!wanted[node] && edit[node] == kOpen && !gains(node)) fix(edit[node], kFalse);
      // cut_ is the sum over what asks for the node by now
      std::int32_t best = -1;
      if (must_die || dominator_[node] == 0) {
        dominator_[node] = output;
        cut_[node] = Price::infinite();
      } else if (const std::int32_t next = dominator_[node]; next != output) {
        best = cheapest_[next];
        if (edit[next] == kOpen && (best < 0 || price(next, false) < price(best, false))) best = next;
      }
      cheapest_[node] = best;
      if (limited_ && (best < 0 || q_.weight[best] > q_.weight[node])) cut_[node] = Price::infinite();
      if (limited_ && best >= 0 && q_.weight[best] <= q_.weight[node]) cut_[node] = price(best, false);
      if (!limited_ && best >= 0) cut_[node] = std::min(cut_[node], price(best, false));
      if (edit[node] == kOpen && !gains(node) && cut_[node] <= price(node, true)) fix(edit[node], kFalse);
      if (edit[node] == kOpen) cut_[node] = std::min(cut_[node], price(node, false));
    }
    if (!asks(node)) continue;
    const bool follows = must_die && edit[node] == kFalse;
    for (std::int32_t g = dead.first_group[node]; g < dead.first_group[node + 1]; ++g) {
      const Group& group = dead.groups[g];
      if (dead.holds(group)) continue;
      std::int32_t open = 0;
      for (std::int32_t i = group.first; i < group.last; ++i) open += dead.x[dead.inputs[i]] == kOpen;
      for (std::int32_t i = group.first; i < group.last; ++i) {
        const std::int32_t input = dead.inputs[i];
        if (dead.x[input] != kOpen) continue;
        if (choose) {
          const bool first = !wanted[input];
          dominator_[input] = first ? node : common(dominator_[input], node);
          cut_[input] = first ? cut_[node] : cut_[input] + cut_[node];
        }
        wanted[input] = 1;
        if (follows && (group.all || open == 1)) fix(dead.x[input], kTrue);
      }
    }
  }
}

// r: true where nothing can become a conflict by it, false where nobody relies on it.
void Cone::settle_works() {
  for (std::int32_t node = 1; node < q_.n_nodes && !limits_.tick(); ++node)
    if (works.open(node) && !(both(node) && edit[node] != kFalse) && works.all_hold(node)) fix(works.x[node], kTrue);
  std::vector<std::uint8_t> needed(static_cast<std::size_t>(q_.n_nodes));
  for (std::int32_t node = q_.n_nodes - 1; node > 0 && !limits_.tick(); --node) {
    if (!works.member[node]) continue;
    if (works.x[node] == kOpen && !needed[node]) fix(works.x[node], kFalse);
    if (works.x[node] == kFalse) continue;
    for (std::int32_t g = works.first_group[node]; g < works.first_group[node + 1]; ++g)
      if (const Group& group = works.groups[g]; !works.holds(group))
        for (std::int32_t i = group.first; i < group.last; ++i) needed[works.inputs[i]] = 1;
  }
}

}  // namespace clue::logic
