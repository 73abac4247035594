// Lexicographic MaxSAT: the best model of a formula under several objectives, the earlier ones counting infinitely
// more.
#pragma once

#include <cstdint>
#include <vector>

#include "limits.hpp"
#include "solver.hpp"

namespace clue::logic {

class Recorder;

// A clause set over variables 1..n_variables; each clause ends with 0, as in DIMACS.
struct Formula {
  int n_variables = 0;
  std::vector<int> clauses;
  std::vector<std::vector<int>> guesses;  // soft literals of the first level that may be cores: each is tried first
};

// A literal that should be true; `weight` > 0 is paid where it is not. At most one per literal within a level.
struct Soft {
  int literal;
  std::int64_t weight;
};

using Level = std::vector<Soft>;

struct Optimum {
  std::vector<std::uint8_t> model;  // [n_variables + 1] value of each variable; entry 0 unused; empty if none is known
  bool satisfiable = true;          // false: the formula was proven to have no model
  std::int64_t lower_bound = 0;     // of the first level
  std::size_t levels_closed = 0;    // levels proven optimal, the final preference included as the last one
  std::int64_t cores = 0, solves = 0;
  std::vector<std::uint8_t> surveyed;  // of each literal asked about: true in 0 no, 1 some, 2 every optimum
};

// Minimises the levels in order, then prefers the literals of `preference` to be true, the earlier ones first. With
// every variable in `preference` the model is unique. `start` must be a model, which is returned, improved as far as it
// went, when the limits end the search; or empty, where none is known. `on_bounds` may be null and hears of the first
// level; `recorder` is told all that the first level's bound follows from. `asked` are literals of which to tell in how
// many optima of the first level they hold; `surveyed` is empty if the limits do not let them all be answered.
Optimum minimize(const Formula& formula, const std::vector<Level>& levels, const std::vector<int>& preference,
                 std::vector<std::uint8_t> start, Limits& limits, const OnBounds& on_bounds,
                 Recorder* recorder = nullptr, const std::vector<int>& asked = {});

}  // namespace clue::logic
