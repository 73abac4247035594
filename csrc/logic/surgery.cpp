// The formula of what the cone leaves open, its first cores, and the answer.
#include "surgery.hpp"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <utility>

#include "cone.hpp"
#include "cores.hpp"
#include "minimize.hpp"
#include "packs.hpp"

namespace clue::logic {
namespace {

// bool [nodes]: what works when some nodes are stopped. Nodes outside the side's circuits do.
std::vector<std::uint8_t> simulate(const Side& side, const std::vector<std::uint8_t>& stopped) {
  std::vector<std::uint8_t> works(stopped.size(), 1);
  for (std::size_t node = 0; node < works.size(); ++node) {
    if (!side.member[node]) continue;
    const std::int32_t first = side.first_group[node], last = side.first_group[node + 1];
    // x of the groups: they all work, or they all are dead
    const bool asked = std::all_of(side.groups.begin() + first, side.groups.begin() + last, [&](const Group& group) {
      const auto begin = side.inputs.begin() + group.first, end = side.inputs.begin() + group.last;
      const auto x = [&](std::int32_t input) { return (works[input] != 0) == side.retain; };
      return group.all ? std::all_of(begin, end, x) : std::any_of(begin, end, x);
    });
    works[node] = !stopped[node] && (side.retain ? asked : !asked || first == last);
  }
  return works;
}

class Surgeon {
 public:
  Surgeon(const Operation& operation, Limits& limits)
      : operation_(operation), q_(operation.question), limits_(limits), n_(q_.n_nodes), cone_(operation, limits) {}

  Edits answer() {
    if (!cone_.complete()) give_up();
    const auto n = static_cast<std::size_t>(n_);
    std::vector<std::uint8_t> all(n);
    for (std::int32_t node = 0; node < n_; ++node) all[node] = cone_.may_edit(node);
    found_.feasible = !simulate(cone_.dead, all).back();
    if (!found_.feasible) return std::move(found_);
    cone_.propagate();
    found_.forced.assign(n, 0);
    for (std::int32_t node = 0; node < n_; ++node) found_.forced[node] = conflicts_for_sure(node);
    cone_.reduce();
    for (std::int32_t node = 0; node < n_; ++node)
      if (cone_.edit[node] == kTrue && (operation_.least || conflicts_for_sure(node)))
        found_.lower_bound += q_.weight[node];
    name_variables();
    found_.levels_closed = n_levels();
    edit_before_ = cone_.edit;
    works_before_ = cone_.works.x;
    encode();
    if (found_.feasible) minimize_packs();
    if (!found_.feasible) return std::move(found_);
    if (!known_) give_up();
    report();
    return std::move(found_);
  }

 private:
  enum class Kind : std::uint8_t { Edit, Dead, Works, Conflict, Limit };
  struct Variable {
    std::int32_t node;
    Kind kind;
  };

  [[noreturn]] void give_up() const {
    if (limits_.interrupted()) throw Interrupted();
    throw TimeUp("edit set");
  }

  std::size_t n_levels() const { return operation_.least ? 1 : 5; }

  bool conflicts_for_sure(std::int32_t node) const {
    return cone_.both(node) && cone_.edit[node] == kTrue && cone_.works.x[node] == kTrue;
  }

  std::int32_t make(std::int32_t node, Kind kind) {
    variables_.push_back({node, kind});
    return static_cast<std::int32_t>(variables_.size()) - 1;
  }

  // Variables from 1 on, in the order of the last level. A conflict has one of its own only where e and r are open.
  void name_variables() {
    const auto n = static_cast<std::size_t>(n_);
    make(0, Kind::Limit);
    for (std::vector<std::int32_t>* of : {&e_, &d_, &r_, &c_}) of->assign(n, 0);
    for (std::int32_t node = 1; node < n_; ++node) {
      if (cone_.may_edit(node) && cone_.edit[node] == kOpen) e_[node] = make(node, Kind::Edit);
      if (cone_.dead.open(node) && cone_.wanted[node]) d_[node] = make(node, Kind::Dead);
      if (cone_.works.open(node)) r_[node] = make(node, Kind::Works);
      if (!cone_.both(node)) continue;
      if (e_[node] && r_[node])
        c_[node] = make(node, Kind::Conflict);
      else if (e_[node] && cone_.works.x[node] == kTrue)
        c_[node] = e_[node];
      else if (r_[node] && cone_.edit[node] == kTrue)
        c_[node] = r_[node];
    }
  }

  void end_clause() {
    if (clause_.empty()) found_.feasible = false;
    clauses_.insert(clauses_.end(), clause_.begin(), clause_.end());
    ends_.push_back(static_cast<std::int64_t>(clauses_.size()));
    clause_.clear();
  }

  // x of the node, or its edit, implies its groups.
  void add_groups(const Side& side, std::int32_t node, const std::vector<std::int32_t>& x) {
    const bool freed = !side.retain && e_[node];
    const auto begin = [&] {
      if (x[node]) clause_.push_back(-x[node]);
      if (freed) clause_.push_back(e_[node]);
    };
    for (std::int32_t g = side.first_group[node]; g < side.first_group[node + 1]; ++g) {
      const Group& group = side.groups[g];
      if (side.holds(group)) continue;
      if (!group.all) begin();
      for (std::int32_t i = group.first; i < group.last; ++i) {
        const std::int32_t input = side.inputs[i];
        if (side.x[input] != kOpen) continue;
        if (group.all) begin();
        clause_.push_back(x[input]);
        if (group.all) end_clause();
      }
      if (!group.all) end_clause();
    }
  }

  void encode() {
    for (std::int32_t node = 1; node < n_ && !limits_.tick(); ++node) {
      if (cone_.asks(node)) {
        add_groups(cone_.dead, node, d_);
      } else if (d_[node] && e_[node] && cone_.below[node] == kFalse) {
        clause_ = {-d_[node], e_[node]};
        end_clause();
      }
      if (cone_.works.member[node] && cone_.works.x[node] != kFalse) add_groups(cone_.works, node, r_);
      if (c_[node] && c_[node] != e_[node] && c_[node] != r_[node]) {
        clause_ = {-e_[node], -r_[node], c_[node]};
        end_clause();
      }
    }
    std::vector<std::int32_t> own;  // of the further variables of the limits
    bool satisfied = false;
    for (const std::int32_t literal : operation_.limits) {
      if (literal == 0) {
        if (!satisfied) end_clause();
        clause_.clear();
        satisfied = false;
        continue;
      }
      const auto v = static_cast<std::size_t>(std::abs(literal)) - 1;
      std::int32_t variable = 0;
      if (v < e_.size()) {
        variable = e_[v];
        if (!variable) {
          satisfied = satisfied || (cone_.edit[v] == kTrue) == (literal > 0);
          continue;
        }
      } else {
        if (own.size() <= v - e_.size()) own.resize(v - e_.size() + 1);
        std::int32_t& mine = own[v - e_.size()];
        if (!mine) mine = make(0, Kind::Limit);
        variable = mine;
      }
      clause_.push_back(literal > 0 ? variable : -variable);
    }
  }

  void minimize_packs() {
    if (limits_.expired()) {  // clauses may be missing
      found_.levels_closed = 0;
      known_ = operation_.limits.empty();
      return;
    }
    found_.variables = static_cast<std::int64_t>(variables_.size()) - 1;
    found_.clauses = static_cast<std::int64_t>(ends_.size());
    Components components(static_cast<std::int32_t>(variables_.size()));
    std::vector<std::int32_t> open(variables_.size() - 1), first_of(ends_.size());
    for (std::size_t v = 0; v < open.size(); ++v) open[v] = static_cast<std::int32_t>(v) + 1;
    std::size_t at = 0;
    for (std::size_t c = 0; c < ends_.size(); ++c) {
      first_of[c] = std::abs(clauses_[at]);
      for (; at < static_cast<std::size_t>(ends_[c]); ++at) components.join(first_of[c], std::abs(clauses_[at]));
    }
    const std::vector<Pack> packs = components.packs(std::move(open), first_of);
    found_.components = components.count();

    std::vector<std::int64_t> price(static_cast<std::size_t>(n_));
    for (std::int32_t node = 0; node < n_; ++node)
      if (e_[node] && (operation_.least || c_[node] == e_[node])) price[node] = q_.weight[node];
    std::vector<std::vector<std::int32_t>> cores_of(variables_.size());  // by the first node's e
    for (std::vector<std::int32_t>& core : first_cores(cone_, price, limits_)) {
      const std::int32_t first = e_[core.front()];
      cores_of[first].push_back(static_cast<std::int32_t>(cores_.size()));
      cores_.push_back(std::move(core));
    }
    local_.assign(variables_.size(), 0);
    for (const Pack& pack : packs) {
      if (limits_.expired()) {
        found_.levels_closed = 0;
        known_ = known_ && operation_.limits.empty();
        return;
      }
      minimize_pack(pack, cores_of);
      if (!found_.feasible) return;
    }
  }

  void minimize_pack(const Pack& pack, const std::vector<std::vector<std::int32_t>>& cores_of) {
    Formula formula;
    for (const std::int32_t v : pack.members) local_[v] = ++formula.n_variables;
    const auto local = [&](std::int32_t literal) { return literal > 0 ? local_[literal] : -local_[-literal]; };
    for (const std::int32_t c : pack.clauses) {
      for (std::int64_t i = c == 0 ? 0 : ends_[c - 1]; i < ends_[c]; ++i) formula.clauses.push_back(local(clauses_[i]));
      formula.clauses.push_back(0);
    }
    std::vector<Level> levels(4);
    std::vector<int> preference;
    for (const std::int32_t v : pack.members) {
      const auto [node, kind] = variables_[v];
      if (kind == Kind::Limit || kind == Kind::Dead) continue;
      const auto add = [&](std::size_t level, int literal, std::int64_t weight) {
        if (weight > 0) levels[level].push_back({literal, weight});
      };
      if (kind == Kind::Edit) {
        add(1, -local_[v], q_.weight[node]);
        add(2, -local_[v], cone_.risk(node));
        add(3, local_[v], q_.reach[node]);
        for (const std::int32_t core : cores_of[v]) {
          formula.guesses.emplace_back();
          for (const std::int32_t member : cores_[core]) formula.guesses.back().push_back(-local_[e_[member]]);
        }
      }
      if (c_[node] == v) add(0, -local_[v], q_.weight[node]);
      if (kind == Kind::Edit || c_[node] == v) preference.push_back(-local_[v]);
    }
    if (operation_.least) {
      levels = {levels[1]};
      preference.clear();
    }
    std::vector<std::uint8_t> everything(static_cast<std::size_t>(formula.n_variables) + 1, 1);
    if (!operation_.limits.empty()) everything.clear();
    const Optimum optimum = minimize(formula, levels, preference, std::move(everything), limits_, nullptr);
    found_.feasible = optimum.satisfiable;
    found_.lower_bound += optimum.lower_bound;
    found_.levels_closed = std::min(found_.levels_closed, optimum.levels_closed);
    found_.cores += optimum.cores;
    found_.solves += optimum.solves;
    known_ = known_ && !optimum.model.empty();
    if (optimum.model.empty()) return;
    for (const std::int32_t v : pack.members) {
      const auto [node, kind] = variables_[v];
      const std::int8_t value = optimum.model[local_[v]] ? kTrue : kFalse;
      if (kind == Kind::Edit) cone_.edit[node] = value;
      if (kind == Kind::Works) cone_.works.x[node] = value;
    }
  }

  // What is open becomes true, which is an edit set. Where the best one was not reached: without what it can do
  // without, and no worse than what was known before the search, whose models may be far from the best for long.
  void report() {
    settle();
    if (found_.levels_closed < n_levels() && operation_.limits.empty()) {
      const auto weights = [&] {
        std::int64_t edits = 0, conflicts = 0;
        for (std::int32_t node = 0; node < n_; ++node) {
          edits += found_.edited[node] ? q_.weight[node] : 0;
          conflicts += found_.conflict[node] ? q_.weight[node] : 0;
        }
        return std::pair(operation_.least ? 0 : conflicts, edits);
      };
      const auto searched = weights();
      const Edits kept = found_;
      cone_.edit.swap(edit_before_);
      cone_.works.x.swap(works_before_);
      settle();
      if (searched < weights()) found_ = kept;
    }
    std::vector<std::uint8_t> stopped = found_.edited;
    for (std::int32_t node = 0; node < n_; ++node)
      if (found_.conflict[node]) stopped[node] = 0;
    found_.forget_works = simulate(cone_.dead, found_.edited);
    found_.retain_works = simulate(cone_.works, stopped);
    if (found_.forget_works.back() || (!operation_.least && !found_.retain_works.back()))
      throw std::logic_error("the edit set does not do what was proven of it");
  }

  void settle() {
    const auto n = static_cast<std::size_t>(n_);
    found_.edited.assign(n, 0);
    found_.conflict.assign(n, 0);
    for (std::int32_t node = 0; node < n_; ++node) found_.edited[node] = cone_.may_edit(node);
    if (found_.levels_closed < n_levels()) drop_needless();
    for (std::int32_t node = 0; node < n_; ++node)
      found_.conflict[node] = found_.edited[node] && cone_.both(node) && cone_.works.x[node] != kFalse;
  }

  void drop_needless() {
    const std::vector<std::uint8_t> alive = simulate(cone_.dead, found_.edited);
    std::vector<std::uint8_t> needed(alive.size());
    needed.back() = 1;
    for (std::int32_t node = n_ - 1; node > 0; --node) {
      const bool must = !q_.forget_pin.empty() && q_.forget_pin[node] == 0;
      if (found_.edited[node] && !needed[node] && !must) found_.edited[node] = 0;
      if (!needed[node] || found_.edited[node]) continue;
      for (std::int32_t g = cone_.dead.first_group[node]; g < cone_.dead.first_group[node + 1]; ++g) {
        const Group& group = cone_.dead.groups[g];
        const auto begin = cone_.dead.inputs.begin() + group.first, end = cone_.dead.inputs.begin() + group.last;
        if (group.all)
          std::for_each(begin, end, [&](std::int32_t input) { needed[input] = 1; });
        else
          needed[*std::find_if(begin, end, [&](std::int32_t input) { return !alive[input]; })] = 1;
      }
    }
  }

  const Operation& operation_;
  const Question& q_;
  Limits& limits_;
  const std::int32_t n_;
  Cone cone_;
  Edits found_;
  bool known_ = true;  // there is an edit set: that of the packs done so far, with what is open true
  std::vector<Variable> variables_;
  std::vector<std::int32_t> e_, d_, r_, c_;  // variables by node; 0 is none
  std::vector<std::int32_t> clauses_, clause_;
  std::vector<std::int64_t> ends_;
  std::vector<std::int8_t> edit_before_, works_before_;  // what the search started from
  std::vector<std::vector<std::int32_t>> cores_;         // nodes
  std::vector<int> local_;                               // of a variable in its pack's formula
};

}  // namespace

Edits operate(const Operation& operation, const std::function<bool()>& interrupted) {
  Limits limits(operation.question.time_limit, interrupted);
  require_valid(operation.question);
  Edits edits = Surgeon(operation, limits).answer();
  edits.interrupted = limits.interrupted();
  return edits;
}

}  // namespace clue::logic
