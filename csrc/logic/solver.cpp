// The wrapper around CaDiCaL: options, limits, and the mapping of its return codes.
#include "solver.hpp"

#include <utility>

namespace clue::logic {

Limits::Limits(double time_limit, std::function<bool()> interrupted)
    : poll_(std::move(interrupted)), next_poll_(Clock::now()), deadline_(next_poll_), limited_(time_limit > 0) {
  if (limited_) deadline_ += std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(time_limit));
}

bool Limits::expired() {
  if (expired_) return true;
  const auto now = Clock::now();
  if (limited_ && now >= deadline_) return expired_ = true;
  if (now >= next_poll_) {
    next_poll_ = now + std::chrono::milliseconds(50);
    if (poll_()) expired_ = interrupted_ = true;
  }
  return expired_;
}

Solver::Solver(Limits& limits) : limits_(limits) {
  // lucky costs a full pass per incremental call; factor invents variables that would clash with ours.
  solver_.set("quiet", 1);
  solver_.set("factor", 0);
  solver_.set("lucky", 0);
  solver_.connect_terminator(this);
}

Solver::~Solver() { solver_.disconnect_terminator(); }

void Solver::clause(std::span<const int> literals) { solver_.clause(literals.data(), literals.size()); }

Verdict Solver::solve(std::span<const int> assumptions, int decisions) {
  ++solves_;
  if (limits_.expired()) return Verdict::Unknown;
  for (const int literal : assumptions) solver_.assume(literal);
  if (decisions >= 0) solver_.limit("decisions", decisions);
  switch (solver_.solve()) {
    case CaDiCaL::SATISFIABLE:
      return Verdict::Satisfiable;
    case CaDiCaL::UNSATISFIABLE:
      return Verdict::Unsatisfiable;
    default:
      return Verdict::Unknown;
  }
}

}  // namespace clue::logic
