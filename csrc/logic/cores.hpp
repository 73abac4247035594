// First cores of a surgical question, found without search.
#pragma once

#include <cstdint>
#include <vector>

#include "cone.hpp"

namespace clue::logic {

// Sets of nodes of which each edit set has to have one: along what leads to a node that must die. Where several share a
// node, the sum of their least prices is no more than its own; nodes without a price are never in them.
std::vector<std::vector<std::int32_t>> first_cores(const Cone& cone, std::vector<std::int64_t> price, Limits& limits);

}  // namespace clue::logic
