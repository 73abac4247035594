// Checks a certificate of an answer about circuits.
#pragma once

#include <functional>
#include <string_view>

#include "certificate.hpp"
#include "circuit.hpp"

namespace clue::logic {

// Returns what was checked: the cost is that of a model and no model costs less. Throws Unreadable, Refuted, what
// assign() throws for a question that makes no sense, and Interrupted.
Checked check(const Question& question, const Digest& digest, std::string_view certificate,
              const std::function<bool()>& interrupted);

}  // namespace clue::logic
