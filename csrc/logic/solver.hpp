// CaDiCaL as the rest of this folder uses it: assumptions in, answer out, within limits.
#pragma once

#include <cadical.hpp>
#include <cstdint>
#include <span>
#include <tracer.hpp>
#include <vector>

#include "limits.hpp"

namespace clue::logic {

enum class Verdict { Satisfiable, Unsatisfiable, Unknown };

// An incremental SAT solver. Literals are CaDiCaL's: v or -v with v >= 1.
class Solver : CaDiCaL::Terminator {
 public:
  explicit Solver(Limits& limits);
  ~Solver() override;

  void record(CaDiCaL::Tracer& tracer);  // tell it every clause and what it follows from; before the first clause
  void stop_recording();

  void reserve(int variables) { solver_.resize(variables); }  // once is faster than one by one
  void clause(std::span<const int> literals);
  void constrain(std::span<const int> literals);       // a clause for the next solve only
  void phase(int literal) { solver_.phase(literal); }  // the polarity to try first
  void unphase(int literal) { solver_.unphase(literal); }
  void freeze(int literal) { solver_.freeze(literal); }            // not eliminated between calls
  void propagate() { solver_.simplify(0); }                        // units only, at the root
  int fixed(int literal) const { return solver_.fixed(literal); }  // 1 implied, -1 refuted, 0 open

  // Unknown only if a limit ended the search. `decisions` < 0 is no limit of its own.
  Verdict solve(std::span<const int> assumptions, int decisions = -1);

  // The model that is best in lexicographic order of these literals, an earlier one being true counting infinitely
  // more; `model` ([variables + 1]) is set to it. It takes one search, whose every decision is the first literal still
  // open: what such a search refutes, it refutes from earlier literals alone. The literals must have been frozen.
  Verdict solve_in_order(std::span<const int> literals, std::vector<std::uint8_t>& model);
  bool value(int literal) { return solver_.val(literal) == literal; }  // after Satisfiable
  bool failed(int literal) { return solver_.failed(literal); }  // after Unsatisfiable: the assumption is in the core

  std::int64_t solves() const { return solves_; }

 private:
  bool terminate() override { return limits_.expired(); }

  Limits& limits_;
  CaDiCaL::Tracer* tracer_ = nullptr;
  CaDiCaL::Solver solver_;
  std::int64_t solves_ = 0;
};

}  // namespace clue::logic
