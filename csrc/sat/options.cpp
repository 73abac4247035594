// CaDiCaL's own table, with the defaults that incremental use through an API needs.
#include "options.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <string_view>

// CaDiCaL's own options.hpp has the name of ours and needs what this one includes.
#include <internal.hpp>

namespace clue::sat {
namespace {

// quiet: a library prints nothing. factor: it invents variables, which would clash with those a user adds later.
// lucky: a full pass over the formula on every incremental call.
constexpr int ours(const char* name, int value) {
  for (const char* const off : {"factor", "lucky"})
    if (std::string_view(off) == name) return 0;
  return std::string_view("quiet") == name ? 1 : value;
}

constexpr int reportdefault = 0;  // a default of the table that only CaDiCaL's own program changes

#define OPTION(N, V, L, H, O, P, R, D) {#N, ours(#N, static_cast<int>(V)), static_cast<int>(L), static_cast<int>(H), D},
constexpr Option kOptions[] = {OPTIONS};
#undef OPTION

}  // namespace

std::span<const Option> options() { return kOptions; }

const Option* find_option(const char* name) {
  const auto* const end = std::end(kOptions);
  const auto* const found =
      std::find_if(std::begin(kOptions), end, [&](const Option& option) { return !std::strcmp(option.name, name); });
  return found == end ? nullptr : found;
}

}  // namespace clue::sat
