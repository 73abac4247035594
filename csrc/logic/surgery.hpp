// The least edit that kills the forget outputs and leaves the retain outputs alive (python/clue/logic/surgery.py has
// the rules).
//
// Variables of node n: e_n, it is edited; d_n, it is dead for the forget circuits; r_n, the retain outputs rely on it;
// c_n, it is a conflict. d_n implies that n is edited or each of its forget groups is dead; r_n implies each of its
// retain groups; r_n and e_n imply c_n. The outputs' d and r are true. Each clause is needed in one direction only,
// since all gates are monotone.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "circuit.hpp"

namespace clue::logic {

struct Operation {
  // `weight` is that of a conflict and that of an edit, `risk` and `reach` are of edits; `forget_pin` is 1 for a node
  // that must not be edited and 0 for one that must. Of semantics, survey and retain_pin nothing is used.
  Question question;
  // Clauses, each ended by 0, that say how much may be edited, over e_n, which is n + 1, and further variables. An edit
  // set that they allow must stay allowed when a node is left out of it, or replaced by one of no more weight.
  std::span<const std::int32_t> limits;
  bool least = false;  // only the least weight of an edit set is asked for, whatever becomes of the retain outputs
};

struct Edits {
  std::vector<std::uint8_t> edited, conflict, forced;    // [n_nodes] forced: a conflict by unit propagation
  std::vector<std::uint8_t> forget_works, retain_works;  // [n_nodes] after the edit; 1 outside the circuits
  bool feasible = true;                                  // false: no edit set kills the forget outputs
  bool interrupted = false;                              // `interrupted` cut it short, not the time limit
  std::int64_t lower_bound = 0;                          // on the weight of conflicts, or of edits if `least`
  std::size_t levels_closed = 0;                         // conflicts, edits, risk, reach, preference; `least`: edits
  std::int64_t variables = 0, clauses = 0, components = 0, cores = 0, solves = 0;
};

// The answer is unique, unless it is cut short: then it is the best one so far, with a proven bound. Throws
// std::invalid_argument as assign() does, and Interrupted or TimeUp where it is cut short before any is known: without
// limits there always is one.
Edits operate(const Operation& operation, const std::function<bool()>& interrupted);

}  // namespace clue::logic
