// Checks a certificate of the least cost of a weighted formula.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string_view>

#include "logic/certificate.hpp"

namespace clue::sat {

// Returns what was checked: the cost is that of a model and no model costs less, or the hard clauses have no model.
// Clauses and weights as for minimize(). Throws Unreadable, Refuted, std::invalid_argument, and Interrupted.
logic::Checked check(int n_variables, std::span<const std::int32_t> hard, std::span<const std::int32_t> soft,
                     std::span<const std::int64_t> weights, const logic::Digest& digest, std::string_view certificate,
                     const std::function<bool()>& interrupted);

}  // namespace clue::sat
