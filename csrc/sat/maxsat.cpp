// 1. A soft clause of one literal is a soft literal; a longer one gets a fresh variable that may pay for it.
// 2. Weights of the same literal add up, and of x and not x the smaller one is always paid: only the rest is searched.
// 3. The cost is counted on the given clauses, not taken from the search.
#include "maxsat.hpp"

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#include "dimacs.hpp"
#include "logic/record.hpp"
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
                 std::span<const std::int64_t> weights, logic::Limits& limits, const logic::OnBounds& on_bounds,
                 const logic::Digest* digest) {
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
  std::int64_t always = 0;          // paid by every model
  std::vector<std::int64_t> added;  // number of the soft clause of each clause after the hard ones
  const std::int32_t* at = soft.data();
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const std::int64_t weight = weights[i];
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
      added.push_back(static_cast<std::int64_t>(i));
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
  std::optional<logic::Recorder> recorder;
  if (digest) recorder.emplace();
  const logic::Optimum optimum =
      logic::minimize(formula, {level}, {}, {}, limits, on_bounds_of_all, recorder ? &*recorder : nullptr);
  Minimum minimum;
  minimum.satisfiable = optimum.satisfiable;
  minimum.lower_bound = optimum.lower_bound + always;
  minimum.cores = optimum.cores;
  minimum.solves = optimum.solves;
  const auto put_sections = [&] {
    std::string& out = minimum.certificate;
    const std::int64_t n_hard = std::count(hard.begin(), hard.end(), 0);
    std::int64_t clause_before = 0;
    const bool any = !minimum.satisfiable || optimum.lower_bound > 0;
    logic::put(out, any);
    if (!any) return;
    const auto put_name = [&](std::size_t place) {
      auto number = static_cast<std::int64_t>(place);
      if (number >= n_hard) number = n_hard + added[static_cast<std::size_t>(number - n_hard)];
      logic::put_signed(out, number - std::exchange(clause_before, number));
    };
    recorder->write(formula.clauses, optimum.lower_bound, put_name, out);
  };
  if (digest && !minimum.satisfiable) {
    logic::put_head(minimum.certificate, logic::kOfFormula, false, *digest);
    put_sections();
  }
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
  if (digest && minimum.optimal) {
    logic::put_head(minimum.certificate, logic::kOfFormula, true, *digest);
    logic::put(minimum.certificate, static_cast<std::uint64_t>(minimum.cost));
    std::string bits((static_cast<std::size_t>(n_variables) + 7) / 8, '\0');
    for (int v = 0; v < n_variables; ++v)
      if (minimum.model[static_cast<std::size_t>(v) + 1])
        bits[static_cast<std::size_t>(v / 8)] |= static_cast<char>(1 << v % 8);
    minimum.certificate += bits;
    put_sections();
  }
  return minimum;
}

}  // namespace clue::sat
