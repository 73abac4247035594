// The options of CaDiCaL by name, with their ranges.
#pragma once

#include <span>

namespace clue::sat {

struct Option {
  const char* name;
  int value;  // our default
  int low, high;
  const char* use;  // what it does, in CaDiCaL's words
};

std::span<const Option> options();  // sorted by name

// Null where there is none of that name.
const Option* find_option(const char* name);

}  // namespace clue::sat
