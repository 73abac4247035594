// The least weight of violated soft clauses: a weighted CNF brought into the form that logic/minimize.hpp solves.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "logic/certificate.hpp"
#include "logic/minimize.hpp"

namespace clue::sat {

struct Minimum {
  std::vector<std::int8_t> model;  // [n_variables + 1], entry 0 unused; empty where none was found
  bool satisfiable = true;         // false: the hard clauses were proven to have no model
  bool optimal = false;            // cost == lower_bound was proven
  std::int64_t cost = 0;           // sum of the weights of the soft clauses that the model violates
  std::int64_t lower_bound = 0;    // no model costs less
  std::int64_t cores = 0, solves = 0;
  std::string certificate;  // empty unless it was asked for and the search went to its end
};

// Clauses end with 0; one weight per soft clause, >= 0, their sum at most kMostWeight. Throws std::invalid_argument
// naming the argument, and OutOfMemory. `on_bounds` may be null. `digest` is that of the formula, where a certificate
// is wanted.
Minimum minimize(int n_variables, std::span<const std::int32_t> hard, std::span<const std::int32_t> soft,
                 std::span<const std::int64_t> weights, logic::Limits& limits, const logic::OnBounds& on_bounds,
                 const logic::Digest* digest = nullptr);

}  // namespace clue::sat
