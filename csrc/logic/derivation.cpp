// A clause is checked in one pass over its hints, so that a section takes time in its size and in that of the clauses
// that its hints name.
#include "derivation.hpp"

#include <algorithm>
#include <limits>
#include <string>

namespace clue::logic {
namespace {

constexpr std::int64_t kPoll = 1 << 22;  // literals looked at between two polls
constexpr int kMostVariables = std::numeric_limits<int>::max() / 4;

}  // namespace

void Derivation::refuse(const char* what) const {
  throw Refuted("section " + std::to_string(checked_.sections) + ", step " + std::to_string(step_) + ": " + what);
}

void Derivation::begin() {
  ++checked_.sections;
  n_variables_ = 0;
  step_ = 0;
  refuted_ = false;
  clauses_.clear();
  ends_.clear();
  nodes_.clear();
  inner_.clear();
  cost_.assign(2, 0);
  value_.assign(2, 0);
}

int Derivation::variable() {
  if (n_variables_ == kMostVariables) refuse("it has too many variables");
  cost_.resize(cost_.size() + 2);
  value_.resize(value_.size() + 2);
  return ++n_variables_;
}

void Derivation::axiom(std::span<const int> literals) {
  ++checked_.axioms;
  refuted_ = refuted_ || literals.empty();
  clauses_.insert(clauses_.end(), literals.begin(), literals.end());
  ends_.push_back(clauses_.size());
}

int Derivation::literal() {
  const std::uint64_t code = in_.number();
  if (code < 2 || code > 2 * static_cast<std::uint64_t>(n_variables_) + 1) refuse("a literal has no such variable");
  const int found = static_cast<int>(code / 2);
  return code % 2 == 1 ? -found : found;
}

void Derivation::literals() {
  clause_.clear();
  const std::size_t size = in_.count();
  if (size > static_cast<std::size_t>(kMostVariables)) refuse("it has too many literals");
  for (std::size_t i = 0; i < size; ++i) clause_.push_back(literal());
}

void Derivation::assign(int literal) {
  value_[index(literal)] = 1;
  value_[index(-literal)] = -1;
  trail_.push_back(literal);
}

// Whether clause_ follows from the hints that come next.
void Derivation::implied() {
  bool done = false;
  for (const int literal : clause_) {
    if (value_[index(literal)] > 0) done = true;  // it has a literal and its negation
    if (value_[index(literal)] == 0) assign(-literal);
  }
  for (std::size_t left = in_.count(); left > 0; --left) {
    const std::uint64_t back = in_.number();
    if (back < 1 || back > ends_.size()) refuse("a hint names no clause before it");
    if (done) continue;
    const std::size_t clause = ends_.size() - static_cast<std::size_t>(back);
    int open = 0;
    const std::size_t first = clause == 0 ? 0 : ends_[clause - 1], last = ends_[clause];
    for (std::size_t i = first; i < last; ++i) {
      const int literal = clauses_[i];
      if (value_[index(literal)] < 0 || literal == open) continue;
      if (value_[index(literal)] > 0 || open != 0) refuse("a hint leaves more than one literal");
      open = literal;
    }
    work_ += static_cast<std::int64_t>(last - first) + 1;
    if (open == 0)
      done = true;
    else
      assign(open);
  }
  for (const int literal : trail_) value_[index(literal)] = value_[index(-literal)] = 0;
  trail_.clear();
  if (!done) refuse("the clause does not follow from its hints");
  if (work_ >= kPoll) {
    work_ = 0;
    poll_();
  }
}

// Makes the nodes from the root down, left before right.
void Derivation::totalize(std::span<const int> inputs) {
  const std::size_t node = nodes_.size();
  const int size = static_cast<int>(inputs.size());
  if (size == 1) {
    nodes_.push_back({inputs[0], 1, 0});
    return;
  }
  if (size > kMostVariables - n_variables_) refuse("it has too many variables");
  nodes_.push_back({n_variables_ + 1, size, 0});
  inner_.push_back(node);
  n_variables_ += size;
  totalize(inputs.first(inputs.size() / 2));
  nodes_[node].right = nodes_.size();
  totalize(inputs.subspan(inputs.size() / 2));
}

const Derivation::Node& Derivation::owner(int variable) const {
  const auto after = std::upper_bound(inner_.begin(), inner_.end(), variable,
                                      [&](int wanted, std::size_t node) { return wanted < nodes_[node].first; });
  if (after == inner_.begin()) refuse("the variable is of no totalizer");
  return nodes_[*(after - 1)];
}

void Derivation::steps(std::int64_t k, bool no_model) {
  std::int64_t paid = 0;
  for (;;) {
    const std::uint64_t kind = in_.number();
    if (kind == static_cast<std::uint64_t>(Step::End)) break;
    ++step_;
    clause_.clear();
    switch (kind) {
      case static_cast<std::uint64_t>(Step::Clause):
        literals();
        implied();
        refuted_ = refuted_ || clause_.empty();
        ++checked_.clauses;
        break;
      case static_cast<std::uint64_t>(Step::Core): {
        const std::int64_t weight = in_.amount();
        literals();
        implied();
        if (clause_.empty()) refuse("the core is empty");
        for (const int literal : clause_) {
          if (cost_[index(literal)] < weight) refuse("a literal of the core costs less than its weight");
          cost_[index(literal)] -= weight;
        }
        // Over all literals, costs and what is paid never add up to more than at first: nothing can overflow.
        paid += weight;
        ++checked_.cores;
        if (clause_.size() > 1) {
          const int first = n_variables_ + 1, size = static_cast<int>(clause_.size());
          core_ = clause_;
          totalize(core_);
          cost_.resize(2 * static_cast<std::size_t>(n_variables_) + 2);
          value_.resize(cost_.size());
          for (int count = 2; count <= size; ++count) cost_[index(first + count - 1)] = weight;
        }
        break;
      }
      case static_cast<std::uint64_t>(Step::Count): {
        const int variable = literal();
        const Node& node = owner(std::abs(variable));
        const int count = std::abs(variable) - node.first + 1;
        const Node &left = *(&node + 1), &right = nodes_[node.right];
        const std::int64_t of_left = in_.amount();
        if (variable < 0 || of_left > left.size || of_left > count || count - of_left > right.size)
          refuse("the totalizer has no such clause");
        const int i = static_cast<int>(of_left);
        if (i > 0) clause_.push_back(-output(left, i));
        if (count > i) clause_.push_back(-output(right, count - i));
        clause_.push_back(variable);
        break;
      }
      case static_cast<std::uint64_t>(Step::Order): {
        const int variable = literal();
        if (variable < 0 || variable == owner(variable).first) refuse("the totalizer has no such clause");
        clause_ = {-variable, variable - 1};
        break;
      }
      case static_cast<std::uint64_t>(Step::Hard): {
        const int costly = literal();
        if (no_model || paid + cost_[index(costly)] < k) refuse("the literal costs too little to be hard");
        clause_ = {-costly};
        break;
      }
      default:
        refuse("a step is of an unknown kind");
    }
    clauses_.insert(clauses_.end(), clause_.begin(), clause_.end());
    ends_.push_back(clauses_.size());
  }
  if (!refuted_ && (no_model || paid < k))
    throw Refuted("section " + std::to_string(checked_.sections) + ": " +
                  (no_model ? "the empty clause is not derived"
                            : "cores weigh " + std::to_string(paid) + " of " + std::to_string(k)));
}

}  // namespace clue::logic
