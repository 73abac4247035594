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
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "circuit.hpp"
#include "minimize.hpp"
#include "record.hpp"

namespace clue::logic {
namespace {

constexpr std::int8_t kOpen = 0, kTrue = 1, kFalse = -1;

// Components are packed together up to about this many variables, since a solver costs more than a small component.
constexpr int kPack = 512;

struct Group {
  std::int32_t node, first, last;  // inputs[first, last)
  std::uint32_t name;              // circuit << 2 | gate
  bool all;                        // asks for all inputs, otherwise for any
};

// One side: its groups in order of their node, and the value of x for each node.
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
};

// Sorts one side's edges into groups. A group that the embedding satisfies is left out. Where a limit strikes, groups
// are missing, members are not.
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

// Unit propagation. Without pins all x true is a model, so nothing is ever refuted and x only becomes true.
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
    if (!known_) throw TimeUp();
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
      if (open(dead_, node) && gains(node) && !works_.member[node] && groups_true(dead_, node)) dead_.x[node] = kTrue;
    // Not dead: nodes nobody's death needs, where nothing is gained by it.
    std::vector<std::uint8_t> needed(static_cast<std::size_t>(n_));
    for (std::int32_t node = n_ - 1; node > 0 && !limits_.tick(); --node) {
      if (!dead_.member[node]) continue;
      const bool asked = q_.survey && both(node) && q_.weight[node] == 0;
      if (dead_.x[node] == kOpen && !needed[node] && (!gains(node) || loses(node)) && !asked) dead_.x[node] = kFalse;
      if (dead_.x[node] == kFalse) continue;
      for (std::int32_t g = dead_.first_group[node]; g < dead_.first_group[node + 1]; ++g)
        if (const Group& group = dead_.groups[g]; !group_true(dead_, group))
          for (std::int32_t i = group.first; i < group.last; ++i) needed[dead_.inputs[i]] = 1;
    }
    // Working: retain nodes that can no longer be a conflict and need nothing open for it.
    for (std::int32_t node = 1; node < n_ && !limits_.tick(); ++node)
      if (open(works_, node) && !at_stake(node) && groups_true(works_, node)) works_.x[node] = kTrue;
  }

  static bool open(const Side& side, std::int32_t node) { return side.member[node] && side.x[node] == kOpen; }

  // What the death of a node is worth: reach on the third level, risk on the second.
  bool gains(std::int32_t node) const { return q_.editable[node] && q_.reach[node] > 0; }
  bool loses(std::int32_t node) const { return q_.editable[node] && works_.member[node] && q_.risk[node] > 0; }

  static bool group_true(const Side& side, const Group& group) {
    const auto first = side.inputs.begin() + group.first, last = side.inputs.begin() + group.last;
    const auto is_true = [&](std::int32_t input) { return side.x[input] == kTrue; };
    return group.all ? std::all_of(first, last, is_true) : std::any_of(first, last, is_true);
  }

  static bool groups_true(const Side& side, std::int32_t node) {
    return std::all_of(side.groups.begin() + side.first_group[node], side.groups.begin() + side.first_group[node + 1],
                       [&](const Group& group) { return group_true(side, group); });
  }

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
      for (const std::int32_t literal : clause_) join(clause_.front(), literal);
      clauses_.insert(clauses_.end(), clause_.begin(), clause_.end());
      clause_ends_.push_back(static_cast<std::int64_t>(clauses_.size()));
    }
    clause_.clear();
    satisfied_ = false;
  }

  static std::int32_t index(std::int32_t literal) { return literal < 0 ? ~literal : literal; }

  std::int32_t root(std::int32_t v) {
    while (parent_[v] != v) v = parent_[v] = parent_[parent_[v]];
    return v;
  }

  void join(std::int32_t a, std::int32_t b) {
    a = root(index(a));
    b = root(index(b));
    parent_[std::max(a, b)] = std::min(a, b);  // a component is named by its lowest variable
  }

  // Collects the clauses over open variables and joins what they connect.
  void encode() {
    parent_.resize(2 * static_cast<std::size_t>(n_));
    std::iota(parent_.begin(), parent_.end(), 0);
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
      if (at_stake(node) && open(works_, node) && open(dead_, node)) join(2 * node, 2 * node + 1);
  }

  // Groups open variables and clauses by component, packs components, and minimises each pack.
  void minimize_components() {
    found_.optimal = found_.unique = !limits_.expired();
    if (limits_.expired()) return;
    std::vector<std::int32_t> variables;
    for (std::int32_t node = 1; node < n_; ++node) {
      if (open(dead_, node)) variables.push_back(2 * node);
      if (open(works_, node)) variables.push_back(2 * node + 1);
    }
    found_.variables = static_cast<std::int64_t>(variables.size());
    found_.clauses = static_cast<std::int64_t>(clause_ends_.size());
    for (const std::int32_t v : variables) parent_[v] = root(v);
    std::stable_sort(variables.begin(), variables.end(),
                     [&](std::int32_t a, std::int32_t b) { return parent_[a] < parent_[b]; });

    // pack of each component, by its root
    std::vector<std::int32_t> pack_of(parent_.size(), -1), pack_start;
    for (std::size_t first = 0; first < variables.size(); ++found_.components) {
      const std::int32_t component = parent_[variables[first]];
      if (pack_start.empty() || static_cast<int>(first) - pack_start.back() >= kPack)
        pack_start.push_back(static_cast<std::int32_t>(first));
      pack_of[component] = static_cast<std::int32_t>(pack_start.size()) - 1;
      while (first < variables.size() && parent_[variables[first]] == component) ++first;
    }
    const std::size_t packs = pack_start.size();
    pack_start.push_back(static_cast<std::int32_t>(variables.size()));

    std::vector<std::vector<std::int32_t>> clauses_of(packs);
    for (std::size_t c = 0; c < clause_ends_.size(); ++c)
      clauses_of[pack_of[parent_[index(clauses_[clause_begin(c)])]]].push_back(static_cast<std::int32_t>(c));

    // Smallest first, so that a time limit leaves as few of them as possible undone.
    std::vector<std::size_t> order(packs);
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return pack_start[a + 1] - pack_start[a] < pack_start[b + 1] - pack_start[b];
    });

    local_.assign(parent_.size(), 0);
    if (order.empty() && !known_) {  // the pins leave nothing open
      known_ = true;
      if (!tell(found_.lower_bound, found_.cost)) limits_.interrupt();
    }
    for (const std::size_t p : order) {
      if (limits_.expired()) {
        found_.optimal = found_.unique = false;
        return;
      }
      std::vector<std::int32_t> members(variables.begin() + pack_start[p], variables.begin() + pack_start[p + 1]);
      std::sort(members.begin(), members.end());
      known_ = known_ || p == order.back();  // unless it turns out otherwise
      minimize_pack(members, clauses_of[p]);
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
        if (is_works && open(dead_, node)) {
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
  bool known_;  // there is an assignment: with what is open true, or the one that the last pack completes
  Answer found_;
  std::vector<std::int32_t> clauses_, clause_;  // literals: a variable or its complement
  std::vector<std::int64_t> clause_ends_;
  std::vector<Name> axioms_;  // of each clause, for the certificate
  std::string sections_;      // of the certificate
  std::uint64_t n_sections_ = 0;
  std::vector<std::int32_t> parent_;  // union-find over variables
  std::vector<int> local_;            // of a variable in its pack's formula
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
