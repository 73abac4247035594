// From circuits to a formula and back.
//
// 1. Group each node's incoming edges by circuit and gate (one pass of counting sort over each side's edges).
// 2. Propagate from the outputs: what is true in every model. Conflicts found here are forced.
// 3. (support) Settle what every objective agrees on, in one sweep over the nodes per rule.
// 4. Split the rest into connected components, pack small ones together, and minimise each pack on its own: all
//    constraints and all objectives are sums over components, so their best models together are the best model.
//
// Every step looks at the limits, and what is open where one strikes becomes true: that is a model at any time, unless
// something is pinned to false.
#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "circuit.hpp"
#include "minimize.hpp"
#include "packs.hpp"
#include "record.hpp"
#include "sides.hpp"

namespace clue::logic {
namespace {

// The question with its two sides, and the steps of the answer.
class Instance {
 public:
  Instance(const Question& question, Limits& limits, const OnBounds& on_bounds, const Digest* digest)
      : q_(question),
        limits_(limits),
        on_bounds_(on_bounds),
        digest_(digest),
        n_(question.n_nodes),
        dead_(make_side(q_, false, limits)),
        works_(make_side(q_, true, limits)),
        components_(2 * question.n_nodes),
        known_(!pinned()) {}

  Answer answer() {
    propagate(dead_, limits_);
    propagate(works_, limits_);
    if (dead_.refuted || works_.refuted) return infeasible();
    const auto n = static_cast<std::size_t>(n_);
    found_.forced.assign(n, 0);
    found_.backbone.assign(q_.survey ? n : 0, 0);
    for (std::int32_t node = 0; node < n_; ++node)
      if (both(node) && works_.x[node] == kTrue && dead_.x[node] == kTrue) {
        found_.forced[node] = 1;
        if (q_.survey) found_.backbone[node] = 2;
        found_.lower_bound += q_.weight[node];
      }
    if (q_.semantics == Semantics::Support) settle();
    for (std::int32_t node = 0; node < n_; ++node)
      if (both(node) && works_.x[node] != kFalse && dead_.x[node] != kFalse) found_.cost += q_.weight[node];
    if (!tell(found_.lower_bound, found_.cost)) limits_.interrupt();
    encode();
    if (found_.feasible) minimize_components();
    if (!found_.feasible) return infeasible();
    if (!known_ && limits_.interrupted()) throw Interrupted();
    if (!known_) throw TimeUp("assignment that obeys the pins");
    report();
    found_.interrupted = limits_.interrupted();
    if (digest_ && found_.optimal) certify();
    return std::move(found_);
  }

 private:
  bool pinned() const { return dead_.pinned || works_.pinned; }

  Answer infeasible() {
    found_.feasible = false;
    found_.interrupted = limits_.interrupted();
    return std::move(found_);
  }

  bool both(std::int32_t node) const { return q_.editable[node] && works_.member[node] && dead_.member[node]; }

  // May this node still become a conflict that costs something?
  bool at_stake(std::int32_t node) const { return counts(node) && dead_.x[node] != kFalse; }
  // In a survey every conflict counts, those that cost nothing too.
  bool counts(std::int32_t node) const { return both(node) && (q_.weight[node] > 0 || q_.survey); }

  // False when the one who is told wants no more.
  bool tell(std::int64_t lower_bound, std::int64_t cost) {
    if (!on_bounds_ || !known_ || limits_.interrupted() || (lower_bound <= told_lower_bound_ && cost >= told_cost_))
      return true;
    told_lower_bound_ = lower_bound;
    told_cost_ = cost;
    return on_bounds_(lower_bound, cost);
  }

  // Gives x the value that no objective and no constraint speaks against.
  void settle() {
    if (limits_.expired()) return;
    // Dead: forget nodes outside the retain circuits that are worth reaching and need nothing open for it.
    for (std::int32_t node = 1; node < n_ && !limits_.tick(); ++node)
      if (dead_.open(node) && gains(node) && !works_.member[node] && dead_.all_hold(node)) dead_.x[node] = kTrue;
    // Not dead: nodes nobody's death needs, where nothing is gained by it.
    std::vector<std::uint8_t> needed(static_cast<std::size_t>(n_));
    for (std::int32_t node = n_ - 1; node > 0 && !limits_.tick(); --node) {
      if (!dead_.member[node]) continue;
      const bool asked = q_.survey && both(node) && q_.weight[node] == 0;
      if (dead_.x[node] == kOpen && !needed[node] && (!gains(node) || loses(node)) && !asked) dead_.x[node] = kFalse;
      if (dead_.x[node] == kFalse) continue;
      for (std::int32_t g = dead_.first_group[node]; g < dead_.first_group[node + 1]; ++g)
        if (const Group& group = dead_.groups[g]; !dead_.holds(group))
          for (std::int32_t i = group.first; i < group.last; ++i) needed[dead_.inputs[i]] = 1;
    }
    // Working: retain nodes that can no longer be a conflict and need nothing open for it.
    for (std::int32_t node = 1; node < n_ && !limits_.tick(); ++node)
      if (works_.open(node) && !at_stake(node) && works_.all_hold(node)) works_.x[node] = kTrue;
  }

  // What the death of a node is worth: reach on the third level, risk on the second.
  bool gains(std::int32_t node) const { return q_.editable[node] && q_.reach[node] > 0; }
  bool loses(std::int32_t node) const { return q_.editable[node] && works_.member[node] && q_.risk[node] > 0; }

  // Residual variables, one per open x: d (dead) of node n is 2n, r (works) is 2n + 1.
  static std::int32_t variable(const Side& side, std::int32_t node) { return 2 * node + (side.retain ? 1 : 0); }

  void add_literal(const Side& side, std::int32_t node, bool positive) {
    const std::int8_t value = side.x[node];
    if (value == (positive ? kTrue : kFalse)) satisfied_ = true;
    if (value == kOpen) clause_.push_back(positive ? variable(side, node) : ~variable(side, node));
  }

  // A clause of a group; `input` where it is about one input only.
  void end_clause(const Side& side, const Group& group, std::int32_t input = 0) {
    if (!satisfied_ && clause_.empty()) found_.feasible = false;
    if (!satisfied_ && found_.feasible) {
      if (digest_) axioms_.push_back(axiom(side, group, input));
      for (const std::int32_t literal : clause_) components_.join(index(clause_.front()), index(literal));
      clauses_.insert(clauses_.end(), clause_.begin(), clause_.end());
      clause_ends_.push_back(static_cast<std::int64_t>(clauses_.size()));
    }
    clause_.clear();
    satisfied_ = false;
  }

  static std::int32_t index(std::int32_t literal) { return literal < 0 ? ~literal : literal; }

  // Collects the clauses over open variables and joins what they connect.
  void encode() {
    for (const Side* side : {&dead_, &works_})
      for (const Group& group : side->groups) {
        if (limits_.tick()) return;
        const bool authors = q_.semantics == Semantics::Authors;
        if (!authors && side->x[group.node] == kFalse) continue;
        if (group.all) {
          for (std::int32_t i = group.first; i < group.last; ++i) {
            add_literal(*side, group.node, false);
            add_literal(*side, side->inputs[i], true);
            end_clause(*side, group, side->inputs[i]);
          }
          if (!authors) continue;
          add_literal(*side, group.node, true);
          for (std::int32_t i = group.first; i < group.last; ++i) add_literal(*side, side->inputs[i], false);
          end_clause(*side, group);
        } else {
          add_literal(*side, group.node, false);
          for (std::int32_t i = group.first; i < group.last; ++i) add_literal(*side, side->inputs[i], true);
          end_clause(*side, group);
          if (!authors) continue;
          for (std::int32_t i = group.first; i < group.last; ++i) {
            add_literal(*side, group.node, true);
            add_literal(*side, side->inputs[i], false);
            end_clause(*side, group, side->inputs[i]);
          }
        }
      }
    for (std::int32_t node = 1; node < n_; ++node)
      if (at_stake(node) && works_.open(node) && dead_.open(node)) components_.join(2 * node, 2 * node + 1);
  }

  // Groups open variables and clauses by component, packs components, and minimises each pack.
  void minimize_components() {
    found_.optimal = found_.unique = !limits_.expired();
    if (limits_.expired()) return;
    std::vector<std::int32_t> variables;
    for (std::int32_t node = 1; node < n_; ++node) {
      if (dead_.open(node)) variables.push_back(2 * node);
      if (works_.open(node)) variables.push_back(2 * node + 1);
    }
    found_.variables = static_cast<std::int64_t>(variables.size());
    found_.clauses = static_cast<std::int64_t>(clause_ends_.size());
    std::vector<std::int32_t> first_of(clause_ends_.size());
    for (std::size_t c = 0; c < first_of.size(); ++c) first_of[c] = index(clauses_[clause_begin(c)]);
    const std::vector<Pack> packs = components_.packs(std::move(variables), first_of);
    found_.components = components_.count();
    local_.assign(2 * static_cast<std::size_t>(n_), 0);
    if (packs.empty() && !known_) {  // the pins leave nothing open
      known_ = true;
      if (!tell(found_.lower_bound, found_.cost)) limits_.interrupt();
    }
    for (const Pack& pack : packs) {
      if (limits_.expired()) {
        found_.optimal = found_.unique = false;
        return;
      }
      known_ = known_ || &pack == &packs.back();  // unless it turns out otherwise
      minimize_pack(pack.members, pack.clauses);
      if (!found_.feasible) return;
    }
  }

  std::size_t clause_begin(std::size_t c) const { return c == 0 ? 0 : static_cast<std::size_t>(clause_ends_[c - 1]); }

  void minimize_pack(const std::vector<std::int32_t>& members, const std::vector<std::int32_t>& clauses) {
    Formula formula;
    for (const std::int32_t v : members) local_[v] = ++formula.n_variables;
    for (const std::int32_t c : clauses) {
      for (auto i = clause_begin(static_cast<std::size_t>(c)); i < static_cast<std::size_t>(clause_ends_[c]); ++i)
        formula.clauses.push_back(clauses_[i] < 0 ? -local_[~clauses_[i]] : local_[clauses_[i]]);
      formula.clauses.push_back(0);
    }
    std::vector<Level> levels(3);
    Level &conflicts = levels[0], &risks = levels[1], &reaches = levels[2];
    std::vector<int> preference, asked;
    std::vector<std::int32_t> asked_nodes;
    std::vector<std::int32_t> choices;  // nodes of the clauses that are of no group
    for (const std::int32_t v : members) {
      const std::int32_t node = v / 2;
      const int literal = local_[v];
      const bool is_works = v % 2 == 1;
      if (at_stake(node)) {
        // On its own where the other side is settled; with both open, a variable of its own for the two together.
        int conflict = (is_works ? dead_ : works_).x[node] == kTrue ? literal : 0;
        if (is_works && dead_.open(node)) {
          conflict = ++formula.n_variables;
          formula.clauses.insert(formula.clauses.end(), {-literal, -local_[v - 1], conflict, 0});
          if (digest_) choices.push_back(node);
          if (q_.survey)
            formula.clauses.insert(formula.clauses.end(), {-conflict, literal, 0, -conflict, local_[v - 1], 0});
        }
        if (conflict && q_.weight[node] > 0) conflicts.push_back({-conflict, q_.weight[node]});
        if (conflict && q_.survey) {
          asked.push_back(conflict);
          asked_nodes.push_back(node);
        }
      }
      if (is_works) {
        if (q_.risk[node] > 0) risks.push_back({literal, q_.risk[node]});
      } else {
        if (loses(node)) risks.push_back({-literal, q_.risk[node]});
        if (gains(node)) reaches.push_back({literal, q_.reach[node]});
      }
      if (!q_.survey) preference.push_back(is_works ? literal : -literal);
    }
    std::vector<std::uint8_t> everything(static_cast<std::size_t>(formula.n_variables) + 1, 1);
    if (pinned()) everything.clear();
    std::int64_t here = 0, cost = 0;  // of this pack, with everything true and at its best
    for (const Soft& soft : conflicts) here += soft.weight;
    cost = here;
    OnBounds on_bounds;
    if (on_bounds_)
      on_bounds = [&](std::int64_t lower_bound, std::int64_t best) {
        cost = best;
        return tell(found_.lower_bound + lower_bound, found_.cost - here + best);
      };
    std::optional<Recorder> recorder;
    if (digest_ && !conflicts.empty()) recorder.emplace();
    const Optimum optimum = minimize(formula, levels, preference, std::move(everything), limits_, on_bounds,
                                     recorder ? &*recorder : nullptr, asked);
    found_.feasible = optimum.satisfiable;
    if (optimum.model.empty()) {
      known_ = false;
      return;
    }
    for (std::size_t i = 0; i < optimum.surveyed.size(); ++i)
      found_.backbone[static_cast<std::size_t>(asked_nodes[i])] = optimum.surveyed[i];
    found_.cost -= here - cost;
    if (recorder && optimum.levels_closed >= 1 && optimum.lower_bound > 0) {
      std::int64_t node = 0;
      const auto put_name = [&](std::size_t place) {
        const Name name = place < clauses.size() ? axioms_[static_cast<std::size_t>(clauses[place])]
                                                 : Name{choices[place - clauses.size()], 0};
        put_signed(sections_, name.node - std::exchange(node, name.node));
        put(sections_, name.what);
      };
      ++n_sections_;
      recorder->write(formula.clauses, optimum.lower_bound, put_name, sections_);
    }
    for (const std::int32_t v : members)
      (v % 2 == 1 ? works_ : dead_).x[v / 2] = optimum.model[local_[v]] ? kTrue : kFalse;
    found_.lower_bound += optimum.lower_bound;
    found_.optimal = found_.optimal && optimum.levels_closed >= 1 && optimum.surveyed.size() == asked.size();
    found_.unique = found_.unique && optimum.levels_closed == levels.size() + 1;
    found_.cores += optimum.cores;
    found_.solves += optimum.solves;
  }

  // What a clause of a group is called in a certificate.
  struct Name {
    std::int64_t node;
    std::uint64_t what;
  };

  static Name axiom(const Side& side, const Group& group, std::int32_t input) {
    Axiom kind;
    if (input != 0)
      kind = group.all ? Axiom::NeedsInput : Axiom::FollowsInput;
    else
      kind = group.all ? Axiom::FollowsAll : Axiom::NeedsAny;
    const auto which = input != 0 ? static_cast<std::uint64_t>(group.node - input)
                                  : 3 * std::uint64_t{group.name >> 2} + (group.name & 3);
    return {group.node, 8 * which + 4 * side.retain + static_cast<std::uint64_t>(kind)};
  }

  void certify() {
    std::string& out = found_.certificate;
    put_head(out, kOfCircuits, true, *digest_);
    put(out, static_cast<std::uint64_t>(found_.cost));
    std::string bits((2 * static_cast<std::size_t>(n_) + 7) / 8, '\0');
    for (std::int32_t node = 0; node < n_; ++node) {
      const int x = (works_.x[node] == kTrue) + 2 * (dead_.x[node] == kTrue);
      bits[static_cast<std::size_t>(node / 4)] =
          static_cast<char>(bits[static_cast<std::size_t>(node / 4)] | x << 2 * (node % 4));
    }
    out += bits;
    put(out, n_sections_);
    out += sections_;
  }

  void report() {
    const auto n = static_cast<std::size_t>(n_);
    for (Side* side : {&dead_, &works_})
      for (std::int8_t& x : side->x)
        if (x == kOpen) x = kTrue;
    found_.cost = 0;
    found_.retain_works.assign(n, -1);
    found_.forget_works.assign(n, -1);
    found_.conflict.assign(n, 0);
    for (std::int32_t node = 0; node < n_; ++node) {
      if (works_.member[node]) found_.retain_works[node] = works_.x[node] == kTrue;
      if (dead_.member[node]) found_.forget_works[node] = dead_.x[node] != kTrue;
      if (both(node) && works_.x[node] == kTrue && dead_.x[node] == kTrue) {
        found_.conflict[node] = 1;
        found_.cost += q_.weight[node];
      }
    }
    if (found_.lower_bound > found_.cost || (found_.optimal && found_.lower_bound < found_.cost))
      throw std::logic_error("the cost of the model and the proven bound disagree");
  }

  const Question& q_;
  Limits& limits_;
  const OnBounds& on_bounds_;
  const Digest* const digest_;  // null where no certificate is wanted
  const std::int32_t n_;
  Side dead_, works_;
  Components components_;  // of the variables
  bool known_;             // there is an assignment: with what is open true, or the one that the last pack completes
  Answer found_;
  std::vector<std::int32_t> clauses_, clause_;  // literals: a variable or its complement
  std::vector<std::int64_t> clause_ends_;
  std::vector<Name> axioms_;  // of each clause, for the certificate
  std::string sections_;      // of the certificate
  std::uint64_t n_sections_ = 0;
  std::vector<int> local_;  // of a variable in its pack's formula
  bool satisfied_ = false;
  std::int64_t told_lower_bound_ = -1, told_cost_ = 0;
};

}  // namespace

Answer assign(const Question& question, const std::function<bool()>& interrupted, const OnBounds& on_bounds,
              const Digest* digest) {
  Limits limits(question.time_limit, interrupted);
  require_valid(question);
  if (digest && (question.survey || !question.retain_pin.empty() || !question.forget_pin.empty()))
    throw std::invalid_argument("digest: there are no certificates of questions with pins or a survey");
  return Instance(question, limits, on_bounds, digest).answer();
}

}  // namespace clue::logic
