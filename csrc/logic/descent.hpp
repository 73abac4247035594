// A better model by local search: quick where a proof is far away, and no part of any proof.
#pragma once

#include <cstdint>
#include <vector>

#include "minimize.hpp"

namespace clue::logic {

// Looks for a model of the formula that violates less weight of the level than `model` does ([n_variables + 1]), and
// replaces it. Returns whether it did. The work is bounded by a count of steps, so the outcome is the same on every
// machine unless a limit strikes.
bool descend(const Formula& formula, const Level& level, std::vector<std::uint8_t>& model, Limits& limits);

}  // namespace clue::logic
