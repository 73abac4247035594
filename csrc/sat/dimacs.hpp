// DIMACS files (SAT Competition) and weighted ones (MaxSAT Evaluation): text in, arrays out, and back.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "logic/limits.hpp"

namespace clue::sat {

// Clauses one after the other, each ended by 0.
using Clauses = std::vector<std::int32_t>;

struct Cnf {
  int n_variables = 0;  // as the header says; clauses may use fewer
  Clauses clauses;
};

struct Wcnf {
  int n_variables = 0;  // as the header says, or the largest one used where there is no header
  bool header = false;  // the format before 2022: "p wcnf VARIABLES CLAUSES [TOP]"
  Clauses hard, soft;
  std::vector<std::int64_t> weights;  // of the soft clauses
};

// Largest sum of soft weights: costs and bounds stay far from overflow.
inline constexpr std::int64_t kMostWeight = std::int64_t{1} << 60;

// A malformed file: "line N: what is wrong".
struct FormatError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A limit struck before the end of the text.
struct Stopped {};

// Memory grows with the text, never with what its header claims. Throw FormatError, and Stopped.
Cnf read_cnf(std::string_view text, logic::Limits& limits);
Wcnf read_wcnf(std::string_view text, logic::Limits& limits);

// `header` chooses the format before 2022. Throw std::invalid_argument as the checks below do.
std::string write_cnf(int n_variables, std::span<const std::int32_t> clauses);
std::string write_wcnf(int n_variables, std::span<const std::int32_t> hard, std::span<const std::int32_t> soft,
                       std::span<const std::int64_t> weights, bool header);

// Checks clauses given as an array and returns the largest variable. Throws std::invalid_argument with `name` when a
// literal is INT32_MIN or the last clause lacks its 0.
int largest_variable(std::span<const std::int32_t> clauses, const char* name);

// The same for soft clauses, and one weight >= 0 for each with a sum of at most kMostWeight.
int check_soft(std::span<const std::int32_t> soft, std::span<const std::int64_t> weights);

}  // namespace clue::sat
