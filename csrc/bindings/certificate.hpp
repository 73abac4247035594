// What the bindings of both kinds of certificates share.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <string_view>

#include "logic/certificate.hpp"

// The SHA-256 of a question, from Python.
inline clue::logic::Digest digest_of(const pybind11::bytes& bytes) {
  const std::string_view given = bytes;
  clue::logic::Digest found{};
  if (given.size() != found.size())
    throw pybind11::value_error("digest: expected 32 bytes, got " + std::to_string(given.size()));
  std::copy(given.begin(), given.end(), found.begin());
  return found;
}

// Runs a check. What it found is a dict; `refuted` or `unreadable` is the reason if the certificate is not good.
template <typename Check>
pybind11::dict what_was_checked(Check check) {
  using namespace pybind11::literals;
  try {
    const clue::logic::Checked checked = check();
    return pybind11::dict("satisfiable"_a = checked.satisfiable, "cost"_a = checked.cost, "root"_a = checked.root,
                          "sections"_a = checked.sections, "axioms"_a = checked.axioms, "clauses"_a = checked.clauses,
                          "cores"_a = checked.cores);
  } catch (const clue::logic::Refuted& refuted) {
    return pybind11::dict("refuted"_a = refuted.what());
  } catch (const clue::logic::Unreadable& unreadable) {
    return pybind11::dict("unreadable"_a = unreadable.what());
  }
}
