// Every public method first checks its arguments and the state, then acts; what CaDiCaL would answer with a contract
// violation never reaches it.
#include "solver.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <unordered_set>

#include "dimacs.hpp"
#include "options.hpp"

namespace clue::sat {
namespace {

// Tables of CaDiCaL per variable, measured while they grow (old and new copies are there together).
constexpr std::int64_t kBytesPerVariable = 400;

const Option& known_option(const std::string& name) {
  const Option* const option = find_option(name.c_str());
  if (option == nullptr) throw std::invalid_argument("option '" + name + "' does not exist: see clue.sat.options()");
  return *option;
}

}  // namespace

void require_memory(int variable) {
  if (variable <= (1 << 20)) return;
  const std::int64_t machine = std::int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
  const std::int64_t needed = kBytesPerVariable * variable;
  if (machine > 0 && needed > machine)
    throw OutOfMemory("variable " + std::to_string(variable) + " needs tables of about " +
                      std::to_string(needed >> 30) + " GB: number the variables without gaps");
}

Solver::Solver() {
  for (const Option& option : options())
    if (solver_.get(option.name) != option.value) solver_.set(option.name, option.value);
  solver_.connect_terminator(&stopper_);
}

Solver::~Solver() {
  solver_.disconnect_terminator();
  if (proof_) solver_.disconnect_proof_tracer(proof_.get());
}

// --- before the first clause -----------------------------------------------------------------------------------------

void Solver::require_configuring(const char* what) {
  if (solver_.state() != CaDiCaL::CONFIGURING)
    throw std::logic_error(std::string(what) + " must be set before the first clause, variable or solve");
}

void Solver::set_option(const std::string& name, std::int64_t value) {
  const Option& option = known_option(name);
  if (value < option.low || value > option.high)
    throw std::invalid_argument("option '" + name + "': expected " + std::to_string(option.low) + ".." +
                                std::to_string(option.high) + ", got " + std::to_string(value));
  require_configuring("options");
  solver_.set(option.name, static_cast<int>(value));
}

int Solver::option(const std::string& name) { return solver_.get(known_option(name).name); }

void Solver::write_proof(const std::string& path, ProofFormat format, bool binary) {
  require_configuring("a proof");
  if (proof_) throw std::logic_error("a proof is being written already");
  if (format == ProofFormat::Lrat && solver_.get("factor") != 0)
    throw std::invalid_argument("format 'lrat' goes with option factor=0 only: extension variables are no LRAT");
  proof_ = std::make_unique<Proof>(path, format, binary);
  solver_.connect_proof_tracer(proof_.get(), proof_->needs_antecedents());
}

std::unique_ptr<Proof> Solver::take_proof() {
  if (!proof_) throw std::logic_error("no proof is being written");
  solver_.disconnect_proof_tracer(proof_.get());
  return std::move(proof_);
}

void Solver::close_proof() { take_proof()->close(); }

void Solver::discard_proof() { take_proof(); }

// --- variables and clauses -------------------------------------------------------------------------------------------

void Solver::check_literal(std::int32_t literal, const char* name) const {
  if (literal == 0) throw std::invalid_argument(std::string(name) + ": expected a literal, got 0");
  if (literal == std::numeric_limits<std::int32_t>::min())
    throw std::invalid_argument(std::string(name) + ": expected literals of at most 2147483647, got -2147483648");
  for (const auto& [first, last] : taken_)
    if (first <= std::abs(literal) && std::abs(literal) <= last)
      throw std::invalid_argument(std::string(name) + ": variable " + std::to_string(std::abs(literal)) +
                                  " belongs to the solver (option factor): reserve() variables before solve()");
}

void Solver::declare(int variable) {
  if (variable <= variables_) return;
  require_memory(variable);
  if (solver_.vars() > variables_) {
    taken_.emplace_back(variables_ + 1, solver_.vars());
    variables_ = solver_.vars();
  }
  state_ = State::Open;
  if (variable <= variables_) return;
  solver_.resize(variable);
  variables_ = variable;
}

// A literal may name a variable that exists only now and then belongs to the solver, hence the second look.
void Solver::declare(std::span<const std::int32_t> literals, const char* name) {
  int largest = 0;
  for (const std::int32_t literal : literals) {
    check_literal(literal, name);
    largest = std::max(largest, std::abs(literal));
  }
  declare(largest);
  for (const std::int32_t literal : literals) check_literal(literal, name);
}

void Solver::reserve(int variables) {
  if (variables < 0) throw std::invalid_argument("variables: expected at least 0, got " + std::to_string(variables));
  declare(variables);
}

void Solver::add(std::span<const std::int32_t> clauses) {
  const int largest = largest_variable(clauses, "clauses");
  if (clauses.empty()) return;
  if (proof_ && !proof_->takes_clauses())
    throw std::logic_error("an LRAT proof is of one formula: add all clauses before the first solve, or write DRAT");
  declare(largest);
  if (!taken_.empty())
    for (const std::int32_t literal : clauses)
      if (literal != 0) check_literal(literal, "clauses");
  state_ = State::Open;
  for (const std::int32_t literal : clauses) solver_.add(literal);
  size_ += static_cast<std::int64_t>(clauses.size());
}

void Solver::constrain(std::span<const std::int32_t> clause) {
  // The proof would not be one of the formula, and CaDiCaL 3.0.0 crashes on concluding one with an empty constraint.
  if (proof_) throw std::logic_error("a constraint cannot go with a proof: assume literals instead");
  declare(clause, "clause");
  state_ = State::Open;
  for (const std::int32_t literal : clause) solver_.constrain(literal);
  solver_.constrain(0);
}

// --- search ----------------------------------------------------------------------------------------------------------

template <typename Call>
Verdict Solver::run(const SearchLimits& limits, const std::function<bool()>& interrupted, Call call) {
  if (proof_) {
    proof_->seal();
    if (proof_->failed()) proof_->raise();
  }
  logic::Limits clock(limits.seconds, interrupted);
  limits_ = &clock;
  state_ = State::Open;
  const auto ended = [&] {
    limits_ = nullptr;
    interrupted_ = clock.interrupted();
  };
  int status = 0;
  try {
    if (limits.conflicts >= 0) solver_.limit("conflicts", limits.conflicts);
    if (limits.decisions >= 0) solver_.limit("decisions", limits.decisions);
    status = call();
    if (proof_ && status == CaDiCaL::UNSATISFIABLE) solver_.conclude();  // the negated core is the proof's last clause
  } catch (...) {
    ended();
    throw;
  }
  ended();
  if (proof_ && proof_->failed()) proof_->raise();
  switch (status) {
    case CaDiCaL::SATISFIABLE:
      state_ = State::Satisfiable;
      return Verdict::Satisfiable;
    case CaDiCaL::UNSATISFIABLE:
      state_ = State::Unsatisfiable;
      return Verdict::Unsatisfiable;
    default:
      state_ = State::Unknown;
      return Verdict::Unknown;
  }
}

Verdict Solver::solve(std::span<const std::int32_t> assumptions, const SearchLimits& limits,
                      const std::function<bool()>& interrupted) {
  declare(assumptions, "assumptions");
  assumptions_.assign(assumptions.begin(), assumptions.end());
  for (const std::int32_t literal : assumptions_) solver_.assume(literal);
  return run(limits, interrupted, [&] { return solver_.solve(); });
}

Verdict Solver::simplify(int rounds, const SearchLimits& limits, const std::function<bool()>& interrupted) {
  if (rounds < 0) throw std::invalid_argument("rounds: expected at least 0, got " + std::to_string(rounds));
  assumptions_.clear();
  return run(limits, interrupted, [&] { return solver_.simplify(rounds); });
}

std::optional<std::vector<std::int32_t>> Solver::propagate(std::span<const std::int32_t> assumptions) {
  declare(assumptions, "assumptions");
  if (proof_) proof_->seal();
  state_ = State::Open;
  for (const std::int32_t literal : assumptions) solver_.assume(literal);
  const int status = solver_.propagate();
  if (proof_ && proof_->failed()) proof_->raise();
  if (status == CaDiCaL::UNSATISFIABLE) return std::nullopt;
  std::vector<std::int32_t> found;
  solver_.implied(found);
  std::sort(found.begin(), found.end(), [](int a, int b) { return std::abs(a) < std::abs(b); });
  return found;
}

// --- answers ---------------------------------------------------------------------------------------------------------

std::vector<std::int8_t> Solver::model() {
  if (state_ != State::Satisfiable)
    throw std::logic_error("there is no model: the last solve() must have returned True, and nothing been added since");
  std::vector<std::int8_t> values(static_cast<std::size_t>(variables_) + 1);
  auto taken = taken_.begin();
  for (int variable = 1; variable <= variables_; ++variable) {
    if (taken != taken_.end() && variable == taken->first) {
      variable = taken++->second;
      continue;
    }
    values[static_cast<std::size_t>(variable)] = solver_.val(variable) > 0;
  }
  return values;
}

bool Solver::value(std::int32_t literal) {
  check_literal(literal, "literal");
  if (state_ != State::Satisfiable)
    throw std::logic_error("there is no model: the last solve() must have returned True, and nothing been added since");
  if (std::abs(literal) > variables_)
    throw std::invalid_argument("literal: expected a variable of the formula, 1.." + std::to_string(variables_) +
                                ", got " + std::to_string(literal));
  return solver_.val(literal) == literal;
}

std::vector<std::int32_t> Solver::core() {
  if (state_ != State::Unsatisfiable)
    throw std::logic_error("there is no core: the last solve() must have returned False, and nothing been added since");
  std::vector<std::int32_t> found;
  std::unordered_set<std::int32_t> seen;
  for (const std::int32_t literal : assumptions_)
    if (solver_.failed(literal) && seen.insert(literal).second) found.push_back(literal);
  return found;
}

bool Solver::constraint_failed() {
  if (state_ != State::Unsatisfiable)
    throw std::logic_error("there is no core: the last solve() must have returned False, and nothing been added since");
  return solver_.constraint_failed();
}

void Solver::phase(std::int32_t literal, bool forced) {
  declare({&literal, 1}, "literal");
  if (forced)
    solver_.phase(literal);
  else
    solver_.unphase(literal);
}

void Solver::freeze(std::int32_t literal, bool frozen) {
  declare({&literal, 1}, "literal");
  if (frozen) {
    solver_.freeze(literal);
  } else {
    if (!solver_.frozen(literal))
      throw std::logic_error("variable " + std::to_string(std::abs(literal)) + " is not frozen");
    solver_.melt(literal);
  }
}

int Solver::fixed(std::int32_t literal) {
  check_literal(literal, "literal");
  return std::abs(literal) > variables_ ? 0 : solver_.fixed(literal);
}

std::vector<std::pair<const char*, std::int64_t>> Solver::statistics() const {
  std::vector<std::pair<const char*, std::int64_t>> found;
  for (const char* const name : {"conflicts", "decisions", "propagations", "ticks", "clauses", "irredundant",
                                 "redundant", "fixed", "eliminated"})
    found.emplace_back(name, solver_.get_statistic_value(name));
  found.emplace_back("substituted", solver_.get_statistic_value("subsitutued"));  // so spelt in CaDiCaL 3.0
  return found;
}

}  // namespace clue::sat
