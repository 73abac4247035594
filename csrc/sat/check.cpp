// Axioms are looked up in the formula as it was given; costs are brought into their normal form anew.
#include "check.hpp"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dimacs.hpp"
#include "logic/circuit.hpp"
#include "logic/derivation.hpp"

namespace clue::sat {
namespace {

using logic::Refuted;
using Literals = std::span<const std::int32_t>;

class Check {
 public:
  Check(int n_variables, Literals hard, Literals soft, std::span<const std::int64_t> weights,
        const std::function<bool()>& interrupted)
      : n_variables_(n_variables), weights_(weights), poll_([&interrupted] {
          if (interrupted()) throw logic::Interrupted();
        }) {
    split(hard);
    n_hard_ = clauses_.size();
    split(soft);
  }

  logic::Checked run(const logic::Digest& digest, std::string_view certificate) {
    logic::Reader in(certificate);
    checked_.satisfiable = in.head(logic::kOfFormula, digest);
    add_costs();
    if (checked_.satisfiable) {
      checked_.cost = in.amount();
      check_model(in.bytes((static_cast<std::size_t>(n_variables_) + 7) / 8));
    }
    logic::Derivation derivation(in, checked_, poll_);
    std::int64_t proven = checked_.root;
    for (std::size_t left = in.count(); left > 0; --left) {
      const std::int64_t k = in.amount();
      read_axioms(in, derivation);
      derivation.steps(k, !checked_.satisfiable);
      proven += k;  // what is proven never exceeds the cost of the model
    }
    if (!in.at_end()) throw Refuted("there is more after its end");
    if (!checked_.satisfiable) {
      if (checked_.sections == 0) throw Refuted("it claims that there is no model and proves nothing");
      checked_.cost = checked_.root = 0;
    } else if (proven != checked_.cost) {
      throw Refuted("the model costs " + std::to_string(checked_.cost) + ", but " + std::to_string(proven) +
                    " is proven");
    }
    return checked_;
  }

 private:
  void split(Literals literals) {
    for (auto first = literals.begin(); first != literals.end();) {
      const auto last = std::find(first, literals.end(), 0);
      clauses_.emplace_back(first, last);
      first = last + 1;
    }
  }

  // Gives each literal, and the variable of each soft clause of several, what it costs where it is true.
  void add_costs() {
    for (std::size_t i = 0; i < weights_.size(); ++i) {
      if (weights_[i] == 0 || !normal(n_hard_ + i)) continue;
      if (clause_.empty())
        checked_.root += weights_[i];
      else if (clause_.size() == 1)
        costs_[-clause_[0]] += weights_[i];
      else
        costs_[own_variable(i)] += weights_[i];
    }
    for (auto& [literal, cost] : costs_) {
      const auto other = costs_.find(-literal);
      if (literal < 0 || other == costs_.end()) continue;
      const std::int64_t both = std::min(cost, other->second);
      checked_.root += both;
      cost -= both;
      other->second -= both;
    }
  }

  std::int64_t own_variable(std::size_t soft) const {
    return std::int64_t{n_variables_} + 1 + static_cast<std::int64_t>(soft);
  }

  // Puts a soft clause into clause_, in order of variables and without repeats. False where it always holds.
  bool normal(std::size_t number) {
    clause_.assign(clauses_[number].begin(), clauses_[number].end());
    std::sort(clause_.begin(), clause_.end(),
              [](std::int64_t a, std::int64_t b) { return std::pair(std::abs(a), a) < std::pair(std::abs(b), b); });
    clause_.erase(std::unique(clause_.begin(), clause_.end()), clause_.end());
    return std::adjacent_find(clause_.begin(), clause_.end(), [](std::int64_t a, std::int64_t b) { return a == -b; }) ==
           clause_.end();
  }

  void check_model(std::string_view bits) {
    const auto holds = [&](Literals clause) {
      return std::any_of(clause.begin(), clause.end(), [&](std::int32_t literal) {
        const auto bit = static_cast<std::size_t>(std::abs(literal)) - 1;
        return (static_cast<std::uint8_t>(bits[bit / 8]) >> bit % 8 & 1) == (literal > 0);
      });
    };
    std::int64_t cost = 0;
    for (std::size_t i = 0; i < clauses_.size(); ++i) {
      if (holds(clauses_[i])) continue;
      if (i < n_hard_) throw Refuted("the model violates hard clause " + std::to_string(i + 1));
      cost += weights_[i - n_hard_];
    }
    if (cost != checked_.cost)
      throw Refuted("the model costs " + std::to_string(cost) + ", not " + std::to_string(checked_.cost));
    poll_();
  }

  void read_axioms(logic::Reader& in, logic::Derivation& derivation) {
    derivation.begin();
    locals_.clear();
    const auto n = static_cast<std::int64_t>(clauses_.size());
    std::int64_t number = 0;
    std::vector<int> literals;
    for (std::size_t left = in.count(); left > 0; --left) {
      const std::int64_t step = in.signed_number();
      if (step < -number || step >= n - number)
        throw Refuted("section " + std::to_string(checked_.sections) + ": an axiom names no clause");
      number += step;
      const auto place = static_cast<std::size_t>(number);
      if (place < n_hard_) {
        clause_.assign(clauses_[place].begin(), clauses_[place].end());
      } else {
        normal(place);
        if (clause_.size() < 2)
          throw Refuted("section " + std::to_string(checked_.sections) +
                        ": an axiom is a soft clause without a variable");
        clause_.push_back(own_variable(place - n_hard_));
      }
      literals.clear();
      for (const std::int64_t literal : clause_) {
        const int found = local(derivation, std::abs(literal));
        literals.push_back(literal < 0 ? -found : found);
      }
      derivation.axiom(literals);
    }
    poll_();
  }

  int local(logic::Derivation& derivation, std::int64_t variable) {
    int& found = locals_[variable];
    if (found != 0) return found;
    found = derivation.variable();
    for (const bool positive : {true, false})
      if (const auto cost = costs_.find(positive ? variable : -variable); cost != costs_.end()) {
        derivation.cost(positive ? found : -found, cost->second);
        costs_.erase(cost);
      }
    return found;
  }

  const int n_variables_;
  const std::span<const std::int64_t> weights_;
  const std::function<void()> poll_;
  logic::Checked checked_;
  std::vector<Literals> clauses_;
  std::size_t n_hard_ = 0;
  std::vector<std::int64_t> clause_;
  std::unordered_map<std::int64_t, std::int64_t> costs_;  // by literal, until a section has its variable
  std::unordered_map<std::int64_t, int> locals_;          // numbers of variables in this section
};

}  // namespace

logic::Checked check(int n_variables, Literals hard, Literals soft, std::span<const std::int64_t> weights,
                     const logic::Digest& digest, std::string_view certificate,
                     const std::function<bool()>& interrupted) {
  const int largest = std::max(largest_variable(hard, "hard"), check_soft(soft, weights));
  if (largest > n_variables)
    throw std::invalid_argument("n_variables: expected at least " + std::to_string(largest) + ", got " +
                                std::to_string(n_variables));
  return Check(n_variables, hard, soft, weights, interrupted).run(digest, certificate);
}

}  // namespace clue::sat
