// The question is read anew, independently of encode.cpp, and never becomes a formula as a whole: propagation at the
// root, the model's check and each axiom look at the edges into one node at a time.
#include "check.hpp"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <string>
#include <vector>

#include "derivation.hpp"

namespace clue::logic {
namespace {

struct Group {
  bool all;                        // asks for all inputs, otherwise for any
  bool satisfied;                  // by the embedding
  std::span<std::int32_t> inputs;  // without the embedding; in the order of the edges, and they may repeat
};

// The edges of one side by their receiver.
class Side {
 public:
  Side(const Question& question, bool retain)
      : retain_(retain), member_(static_cast<std::size_t>(question.n_nodes)), start_(member_.size() + 1) {
    const auto& circuits = retain ? question.retain : question.forget;
    for (const Circuit& circuit : circuits)
      for (std::size_t e = 0; e < circuit.src.size(); ++e) {
        ++start_[static_cast<std::size_t>(circuit.dst[e]) + 1];
        member_[circuit.src[e]] = member_[circuit.dst[e]] = 1;
      }
    std::partial_sum(start_.begin(), start_.end(), start_.begin());
    edges_.resize(static_cast<std::size_t>(start_.back()));
    std::vector<std::int64_t> next(start_.begin(), start_.end() - 1);
    for (std::uint32_t c = 0; c < circuits.size(); ++c)
      for (std::size_t e = 0; e < circuits[c].src.size(); ++e)
        edges_[static_cast<std::size_t>(next[circuits[c].dst[e]]++)] = {circuits[c].src[e],
                                                                        c << 2 | circuits[c].gate[e]};
  }

  bool member(std::int32_t node) const { return member_[node] != 0; }
  // Whether a group of this gate asks for all inputs.
  bool all(std::uint32_t gate) const {
    return gate == static_cast<std::uint32_t>(Gate::Adder) ||
           (gate == static_cast<std::uint32_t>(Gate::And)) == retain_;
  }

  // Calls `visit` with the source of each edge into the node, the embedding left out, and whether its group asks for
  // all inputs.
  template <typename Visit>
  void sources(std::int32_t node, Visit visit) const {
    for (std::int64_t e = start_[node]; e < start_[node + 1]; ++e)
      if (edges_[e].source != 0) visit(edges_[e].source, all(edges_[e].name & 3));
  }

  // Calls `visit` with each group of the node until it returns false.
  template <typename Visit>
  void groups(std::int32_t node, Visit visit) {
    for (std::int64_t e = start_[node]; e < start_[node + 1];) {
      const std::uint32_t circuit = edges_[e].name >> 2;
      bool there[3] = {}, embed[3] = {};
      for (auto& inputs : inputs_) inputs.clear();
      for (; e < start_[node + 1] && edges_[e].name >> 2 == circuit; ++e) {
        const std::uint32_t gate = edges_[e].name & 3;
        there[gate] = true;
        if (edges_[e].source == 0)
          embed[gate] = true;
        else
          inputs_[gate].push_back(edges_[e].source);
      }
      for (std::uint8_t gate = 0; gate < 3; ++gate) {
        if (!there[gate]) continue;
        const bool satisfied = inputs_[gate].empty() || (embed[gate] && retain_ && !all(gate));
        if (!visit(Group{all(gate), satisfied, inputs_[gate]})) return;
      }
    }
  }

  // The inputs of one group in order of their ids; empty if there is none.
  std::span<const std::int32_t> inputs(std::int32_t node, std::uint64_t circuit, std::uint32_t gate) {
    const auto last = edges_.begin() + start_[node + 1];
    auto edge = std::lower_bound(edges_.begin() + start_[node], last, circuit,
                                 [](const Edge& e, std::uint64_t wanted) { return e.name >> 2 < wanted; });
    auto& found = inputs_[gate];
    found.clear();
    bool embed = false;
    for (; edge != last && edge->name >> 2 == circuit; ++edge) {
      if ((edge->name & 3) != gate) continue;
      if (edge->source == 0)
        embed = true;
      else
        found.push_back(edge->source);
    }
    if (embed && retain_ && !all(gate)) found.clear();
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    return found;
  }

 private:
  struct Edge {
    std::int32_t source;
    std::uint32_t name;  // circuit and gate
  };

  bool retain_;
  std::vector<std::uint8_t> member_;
  std::vector<std::int64_t> start_;
  std::vector<Edge> edges_;
  std::vector<std::int32_t> inputs_[3];
};

class Check {
 public:
  Check(const Question& question, const std::function<bool()>& interrupted)
      : q_(question),
        n_(question.n_nodes),
        poll_([&interrupted] {
          if (interrupted()) throw Interrupted();
        }),
        sides_{Side(question, false), Side(question, true)} {}

  Checked run(const Digest& digest, std::string_view certificate) {
    Reader in(certificate);
    if (!in.head(kOfCircuits, digest)) throw Refuted("it claims that there is no assignment: there always is one");
    for (const bool retain : {false, true}) {
      if (q_.semantics == Semantics::Support)
        propagate_down(retain);
      else
        propagate(retain);
      poll_();
    }
    for (std::int32_t node = 0; node < n_; ++node)
      if (counts(node) && top_[0][node] && top_[1][node]) checked_.root += q_.weight[node];

    checked_.cost = in.amount();
    check_model(in.bytes((2 * static_cast<std::size_t>(n_) + 7) / 8));
    poll_();

    seen_.assign(3 * static_cast<std::size_t>(n_), 0);
    local_.assign(seen_.size(), 0);
    for (auto& stamp : stamp_) stamp.assign(static_cast<std::size_t>(n_), 0);
    Derivation derivation(in, checked_, poll_);
    std::int64_t proven = checked_.root;
    for (std::size_t left = in.count(); left > 0; --left) {
      const std::int64_t k = in.amount();
      read_axioms(in, derivation);
      derivation.steps(k, false);
      for (const std::size_t variable : globals_) local_[variable] = 0;
      proven += k;  // what is proven never exceeds the cost of the model
    }
    if (!in.at_end()) throw Refuted("there is more after its end");
    if (proven != checked_.cost)
      throw Refuted("the model costs " + std::to_string(checked_.cost) + ", but " + std::to_string(proven) +
                    " is proven");
    return checked_;
  }

 private:
  // A conflict at this node costs something.
  bool counts(std::int32_t node) const {
    return q_.editable[node] && q_.weight[node] > 0 && sides_[0].member(node) && sides_[1].member(node);
  }

  // support: only what a node that is true needs becomes true.
  void propagate_down(bool retain) {
    Side& side = sides_[retain];
    std::vector<std::uint8_t>& top = top_[retain];
    top.assign(static_cast<std::size_t>(n_), 0);
    top[0] = retain;
    top[n_ - 1] = 1;
    for (std::int32_t node = n_ - 1; node > 0; --node) {  // inputs have lower ids
      if (!top[node]) continue;
      bool any = false;
      side.sources(node, [&](std::int32_t source, bool all) {
        if (all)
          top[source] = 1;
        else
          any = true;
      });
      if (!any) continue;
      side.groups(node, [&](const Group& group) {
        if (!group.all && !group.satisfied && same(group.inputs)) top[group.inputs[0]] = 1;
        return true;
      });
    }
  }

  static bool same(std::span<const std::int32_t> inputs) {
    return std::all_of(inputs.begin(), inputs.end(), [&](std::int32_t input) { return input == inputs[0]; });
  }

  // authors: also upwards, where all inputs that a group asks for are true.
  void propagate(bool retain) {
    Side& side = sides_[retain];
    std::vector<std::uint8_t>& top = top_[retain];
    top.assign(static_cast<std::size_t>(n_), 0);
    top[0] = retain;
    top[n_ - 1] = 1;
    for (bool again = true; again;) {  // each round takes a pass up and one down, and changes something
      again = false;
      const auto raise = [&](std::int32_t node) {
        again = again || !top[node];
        top[node] = 1;
      };
      const auto visit = [&](std::int32_t node) {
        side.groups(node, [&](const Group& group) {
          const auto holds = [&](std::int32_t input) { return top[input] != 0; };
          if (group.satisfied) {
            if (retain) raise(node);
            return true;
          }
          if (group.all ? std::all_of(group.inputs.begin(), group.inputs.end(), holds)
                        : std::any_of(group.inputs.begin(), group.inputs.end(), holds))
            raise(node);
          if (top[node] && (group.all || same(group.inputs)))
            for (const std::int32_t input : group.inputs) raise(input);
          return true;
        });
      };
      for (std::int32_t node = 1; node < n_; ++node) visit(node);
      if (again)
        for (std::int32_t node = n_ - 1; node > 0; --node) visit(node);
      poll_();
    }
  }

  // Reads x of both sides, which must satisfy all groups, and counts what it costs.
  void check_model(std::string_view bits) {
    std::vector<std::uint8_t> values[2];
    for (const bool retain : {false, true}) {
      std::vector<std::uint8_t>& x = values[retain];
      x.resize(static_cast<std::size_t>(n_));
      for (std::size_t node = 0; node < x.size(); ++node)
        x[node] = static_cast<std::uint8_t>(bits[node / 4]) >> (2 * (node % 4) + !retain) & 1;
      Side& side = sides_[retain];
      for (std::int32_t node = 0; node < n_; ++node)
        if (side.member(node) && !holds(side, x, node, retain))
          throw Refuted("the model breaks a rule of the " + std::string(retain ? "retain" : "forget") +
                        " circuits at node " + std::to_string(node));
      poll_();
    }
    std::int64_t cost = 0;
    for (std::int32_t node = 0; node < n_; ++node)
      if (counts(node) && values[0][node] && values[1][node]) cost += q_.weight[node];
    if (cost != checked_.cost)
      throw Refuted("the model costs " + std::to_string(cost) + ", not " + std::to_string(checked_.cost));
  }

  // Whether x meets the rules at one node.
  bool holds(Side& side, const std::vector<std::uint8_t>& x, std::int32_t node, bool retain) const {
    if (node == 0) return (x[0] != 0) == retain;
    if (node == n_ - 1 && !x[node]) return false;
    const auto is_true = [&](std::int32_t input) { return x[input] != 0; };
    bool found = true, look = q_.semantics == Semantics::Authors;
    if (x[node])
      side.sources(node, [&](std::int32_t source, bool all) {
        if (all)
          found = found && x[source];
        else
          look = true;
      });
    if (look)
      side.groups(node, [&](const Group& group) {
        bool met = group.satisfied;
        if (!met)
          met = group.all ? std::all_of(group.inputs.begin(), group.inputs.end(), is_true)
                          : std::any_of(group.inputs.begin(), group.inputs.end(), is_true);
        if (x[node] && !met) found = false;
        if (q_.semantics == Semantics::Authors && !x[node] && met && (retain || !group.satisfied)) found = false;
        return found;
      });
    return found;
  }

  void read_axioms(Reader& in, Derivation& derivation) {
    derivation.begin();
    globals_.clear();
    std::int64_t node = 0;
    for (std::size_t left = in.count(), number = 1; left > 0; --left, ++number) {
      const auto refuse = [&](const char* what) {
        throw Refuted("section " + std::to_string(checked_.sections) + ", axiom " + std::to_string(number) + ": " +
                      what);
      };
      const std::int64_t step = in.signed_number();
      const std::uint64_t what = in.number();
      if (step < -node || step >= n_ - node || node + step == 0) refuse("there is no such node");
      node += step;
      const auto v = static_cast<std::int32_t>(node);
      clause_.clear();
      if (what == 0) {
        if (!counts(v) || top_[0][v] || top_[1][v]) refuse("there is no such conflict");
        add(derivation, 1, v, false);
        add(derivation, 0, v, false);
        clause_.push_back(local(derivation, 2 * static_cast<std::size_t>(n_) + v));
        derivation.axiom(clause_);
        continue;
      }
      const auto kind = static_cast<Axiom>((what - 1) % 4 + 1);
      const bool retain = (what - 1) / 4 % 2 == 1;
      const std::uint64_t which = (what - 1) / 8;
      Side& side = sides_[retain];
      const bool follows = kind == Axiom::FollowsInput || kind == Axiom::FollowsAll;
      if (follows && q_.semantics != Semantics::Authors) refuse("these semantics have no such clause");
      satisfied_ = false;
      add(derivation, retain, v, follows);
      if (kind == Axiom::NeedsInput || kind == Axiom::FollowsInput) {
        if (const std::int64_t receiver = 2 * node + retain; receiver != stamped_) {
          stamped_ = receiver;
          ++stamp_now_;
          side.sources(v, [&](std::int32_t source, bool all) { stamp_[all][source] = stamp_now_; });
        }
        if (which == 0 || which >= static_cast<std::uint64_t>(node)) refuse("there is no such edge");
        const auto u = static_cast<std::int32_t>(v - static_cast<std::int32_t>(which));
        if (stamp_[!follows][u] != stamp_now_) refuse("there is no such edge");
        add(derivation, retain, u, !follows);
      } else {
        const auto gate = static_cast<std::uint32_t>(which % 3);
        const auto inputs = side.inputs(v, which / 3, gate);
        if (side.all(gate) != follows || inputs.empty()) refuse("there is no such group");
        for (const std::int32_t u : inputs) add(derivation, retain, u, !follows);
      }
      if (satisfied_) refuse("it holds at the root");
      derivation.axiom(clause_);
      if (number % 4096 == 0) poll_();
    }
  }

  // Adds a literal to the clause, unless propagation has decided it.
  void add(Derivation& derivation, bool retain, std::int32_t node, bool positive) {
    if (node == 0 || top_[retain][node]) {
      satisfied_ = satisfied_ || (positive == (node != 0 || retain));
      return;
    }
    const int found = local(derivation, (retain ? static_cast<std::size_t>(n_) : 0) + static_cast<std::size_t>(node));
    clause_.push_back(positive ? found : -found);
  }

  // The variable of this section for a variable of the question: dead n, works n_ + n, conflict 2 n_ + n.
  int local(Derivation& derivation, std::size_t variable) {
    if (local_[variable] != 0) return local_[variable];
    const int found = local_[variable] = derivation.variable();
    globals_.push_back(variable);
    const std::size_t n = static_cast<std::size_t>(n_), side = variable / n;
    const auto node = static_cast<std::int32_t>(variable % n);
    if (!counts(node) || (side < 2 && !top_[1 - side][node])) return found;
    if (!seen_[variable]) derivation.cost(found, q_.weight[node]);
    seen_[variable] = 1;
    return found;
  }

  const Question& q_;
  const std::int32_t n_;
  const std::function<void()> poll_;
  Checked checked_;
  Side sides_[2];                     // forget, retain
  std::vector<std::uint8_t> top_[2];  // x is true at the root
  std::vector<std::uint8_t> seen_;    // by variable: a section had it and what it costs
  std::vector<int> local_;            // by variable: its number in this section, or 0
  std::vector<std::size_t> globals_;  // variables of this section
  // Sources of the edges into one receiver have the current stamp: [0] where any are asked for, [1] where all are.
  std::vector<std::uint64_t> stamp_[2];
  std::uint64_t stamp_now_ = 0;
  std::int64_t stamped_ = -1;
  std::vector<int> clause_;
  bool satisfied_ = false;
};

}  // namespace

Checked check(const Question& question, const Digest& digest, std::string_view certificate,
              const std::function<bool()>& interrupted) {
  require_valid(question);
  return Check(question, interrupted).run(digest, certificate);
}

}  // namespace clue::logic
