// 1. A soft clause of one literal is a soft literal; a longer one gets a fresh variable that may pay for it.
// 2. Weights of the same literal add up, and of x and not x the smaller one is always paid: only the rest is searched.
// 3. The cost is counted on the given clauses, not taken from the search.
#include "maxsat.hpp"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#include "dimacs.hpp"
#include "solver.hpp"

namespace clue::sat {
namespace {

bool satisfied(const std::int32_t*& at, const std::vector<std::uint8_t>& model) {
  bool found = false;
  for (; *at != 0; ++at) found = found || model[static_cast<std::size_t>(std::abs(*at))] == (*at > 0);
  ++at;
  return found;
}

}  // namespace

Minimum minimize(int n_variables, std::span<const std::int32_t> hard, std::span<const std::int32_t> soft,
                 std::span<const std::int64_t> weights, logic::Limits& limits, const logic::OnBounds& on_bounds) {
  const int largest = std::max(largest_variable(hard, "hard"), check_soft(soft, weights));
  if (largest > n_variables)
    throw std::invalid_argument("n_variables: expected at least " + std::to_string(largest) + ", got " +
                                std::to_string(n_variables));
  const std::int64_t variables = std::int64_t{n_variables} + static_cast<std::int64_t>(weights.size());
  if (variables > (std::int64_t{1} << 30))
    throw OutOfMemory(std::to_string(variables) + " variables, soft clauses included, are more than 2^30");
  require_memory(static_cast<int>(variables));

  logic::Formula formula;
  formula.n_variables = n_variables;
  formula.clauses.assign(hard.begin(), hard.end());
  std::unordered_map<std::int32_t, std::int64_t> paid;  // weight by soft literal
  std::vector<std::int32_t> order, clause;
  const auto pay = [&](std::int32_t literal, std::int64_t weight) {
    if (paid.try_emplace(literal, 0).second) order.push_back(literal);
    paid[literal] += weight;
  };
  std::int64_t always = 0;  // paid by every model
  const std::int32_t* at = soft.data();
  for (const std::int64_t weight : weights) {
    if (limits.tick()) return {};
    clause.clear();
    for (; *at != 0; ++at) clause.push_back(*at);
    ++at;
    std::sort(clause.begin(), clause.end(),
              [](std::int32_t a, std::int32_t b) { return std::pair(std::abs(a), a) < std::pair(std::abs(b), b); });
    clause.erase(std::unique(clause.begin(), clause.end()), clause.end());
    const auto opposite = [](std::int32_t a, std::int32_t b) { return a == -b; };
    if (weight == 0 || std::adjacent_find(clause.begin(), clause.end(), opposite) != clause.end()) continue;
    if (clause.empty()) {
      always += weight;
    } else if (clause.size() == 1) {
      pay(clause[0], weight);
    } else {
      clause.push_back(++formula.n_variables);
      formula.clauses.insert(formula.clauses.end(), clause.begin(), clause.end());
      formula.clauses.push_back(0);
      pay(-clause.back(), weight);
    }
  }
  logic::Level level;
  for (const std::int32_t literal : order) {
    const auto other = paid.find(-literal);
    const std::int64_t against = other == paid.end() ? 0 : other->second;
    const std::int64_t weight = paid[literal];
    if (literal > 0 || other == paid.end()) always += std::min(weight, against);
    if (weight > against) level.push_back({literal, weight - against});
  }

  logic::OnBounds on_bounds_of_all;
  if (on_bounds)
    on_bounds_of_all = [&](std::int64_t lower, std::int64_t cost) { return on_bounds(lower + always, cost + always); };
  const logic::Optimum optimum = logic::minimize(formula, {level}, {}, {}, limits, on_bounds_of_all);
  Minimum minimum;
  minimum.satisfiable = optimum.satisfiable;
  minimum.lower_bound = optimum.lower_bound + always;
  minimum.cores = optimum.cores;
  minimum.solves = optimum.solves;
  if (optimum.model.empty()) return minimum;
  for (at = hard.data(); at != hard.data() + hard.size();)
    if (!satisfied(at, optimum.model)) throw std::logic_error("the search returned a model that violates a clause");
  at = soft.data();
  for (const std::int64_t weight : weights)
    if (!satisfied(at, optimum.model)) minimum.cost += weight;
  minimum.optimal = optimum.levels_closed > 0;
  if (minimum.optimal && minimum.cost != minimum.lower_bound)
    throw std::logic_error("the bounds of a closed search differ");
  minimum.model.assign(optimum.model.begin(), optimum.model.begin() + n_variables + 1);
  return minimum;
}

}  // namespace clue::sat
