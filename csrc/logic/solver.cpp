// The wrapper around CaDiCaL: options, and the mapping of its return codes.
#include "solver.hpp"

#include <cstdlib>
#include <utility>

namespace clue::logic {
namespace {

// Decides the first literal of a list that has no value yet. CaDiCaL reports assignments level by level, and may report
// those at the root more than once.
class InOrder : public CaDiCaL::ExternalPropagator {
 public:
  InOrder(std::span<const int> literals, std::vector<std::uint8_t> assigned)
      : literals_(literals), assigned_(std::move(assigned)) {}

  void notify_assignment(const std::vector<int>& literals) override {
    for (const int literal : literals) {
      std::uint8_t& assigned = assigned_[static_cast<std::size_t>(std::abs(literal))];
      if (assigned) continue;
      assigned = 1;
      if (!levels_.empty()) trail_.push_back(std::abs(literal));  // the root is never undone
    }
  }
  void notify_new_decision_level() override { levels_.push_back({trail_.size(), next_}); }
  void notify_backtrack(std::size_t level) override {
    if (level >= levels_.size()) return;
    for (std::size_t i = levels_[level].trail; i < trail_.size(); ++i)
      assigned_[static_cast<std::size_t>(trail_[i])] = 0;
    trail_.resize(levels_[level].trail);
    next_ = levels_[level].next;
    levels_.resize(level);
  }
  bool cb_check_found_model(const std::vector<int>&) override { return true; }
  bool cb_has_external_clause(bool&) override { return false; }
  int cb_add_external_clause_lit() override { return 0; }
  int cb_decide() override {
    while (next_ < literals_.size() && assigned_[static_cast<std::size_t>(std::abs(literals_[next_]))]) ++next_;
    return next_ < literals_.size() ? literals_[next_] : 0;
  }

 private:
  struct Level {
    std::size_t trail, next;  // how far both were when the level began
  };

  std::span<const int> literals_;
  std::vector<std::uint8_t> assigned_;  // by variable
  std::vector<int> trail_;              // assigned above the root
  std::vector<Level> levels_;
  std::size_t next_ = 0;  // all literals before it are assigned
};

}  // namespace

Solver::Solver(Limits& limits) : limits_(limits) {
  // lucky costs a full pass per incremental call; factor invents variables that would clash with ours. Preprocessing
  // before the first search looks at no limit, for 20 s on three million clauses, and has not made a search shorter.
  solver_.set("quiet", 1);
  solver_.set("factor", 0);
  solver_.set("lucky", 0);
  solver_.set("preprocesslight", 0);
  solver_.connect_terminator(this);
}

Solver::~Solver() {
  stop_recording();
  solver_.disconnect_terminator();
}

void Solver::record(CaDiCaL::Tracer& tracer) {
  solver_.connect_proof_tracer(&tracer, true);
  tracer_ = &tracer;
}

void Solver::stop_recording() {
  if (tracer_ != nullptr) solver_.disconnect_proof_tracer(std::exchange(tracer_, nullptr));
}

void Solver::clause(std::span<const int> literals) { solver_.clause(literals.data(), literals.size()); }

void Solver::constrain(std::span<const int> literals) {
  for (const int literal : literals) solver_.constrain(literal);
  solver_.constrain(0);
}

Verdict Solver::solve(std::span<const int> assumptions, int decisions) {
  ++solves_;
  if (limits_.expired()) return Verdict::Unknown;
  for (const int literal : assumptions) solver_.assume(literal);
  if (decisions >= 0) solver_.limit("decisions", decisions);
  switch (solver_.solve()) {
    case CaDiCaL::SATISFIABLE:
      return Verdict::Satisfiable;
    case CaDiCaL::UNSATISFIABLE:
      if (tracer_ != nullptr) solver_.conclude();  // tells what follows of the assumptions
      return Verdict::Unsatisfiable;
    default:
      return Verdict::Unknown;
  }
}

Verdict Solver::solve_in_order(std::span<const int> literals, std::vector<std::uint8_t>& model) {
  std::vector<std::uint8_t> assigned(static_cast<std::size_t>(solver_.vars()) + 1);
  for (const int literal : literals)
    if (fixed(literal) != 0) assigned[static_cast<std::size_t>(std::abs(literal))] = 1;
  InOrder order(literals, std::move(assigned));
  solver_.connect_external_propagator(&order);
  for (const int literal : literals) solver_.add_observed_var(std::abs(literal));
  const Verdict verdict = solve({});
  if (verdict == Verdict::Satisfiable)
    for (std::size_t v = 1; v < model.size(); ++v) model[v] = value(static_cast<int>(v));
  solver_.disconnect_external_propagator();
  return verdict;
}

}  // namespace clue::logic
