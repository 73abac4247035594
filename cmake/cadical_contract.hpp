// Forced into every C++ file of CaDiCaL: a violation of its API contract becomes an exception, where upstream calls
// abort() and would take the Python process with it. The solver checks before it acts, so it stays usable.
#pragma once

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include "contract.hpp"

#undef CONTRACT_VIOLATED
#define CONTRACT_VIOLATED(...)                                                             \
  do {                                                                                     \
    char clue_text[256];                                                                   \
    std::snprintf(clue_text, sizeof clue_text, __VA_ARGS__);                               \
    throw std::logic_error(std::string("CaDiCaL: ") + clue_text + " (in " + __func__ + ")"); \
  } while (0)
