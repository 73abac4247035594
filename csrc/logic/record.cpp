// Needed clauses are marked from the cores back, in one pass; numbers are given in another, in the order of derivation.
#include "record.hpp"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <utility>

#include "certificate.hpp"

namespace clue::logic {

void Recorder::keep(std::int64_t id, Kind kind, std::size_t at) {
  const auto place = static_cast<std::size_t>(id);
  if (clauses_.size() <= place) clauses_.resize(place + 1);
  clauses_[place] = static_cast<std::uint64_t>(at) << 3 | static_cast<std::uint64_t>(kind);
}

void Recorder::add_original_clause(std::int64_t id, bool, const std::vector<int>& clause, bool restored) {
  if (restored) return;
  if (clause.empty()) empty_ = id;
  const Origin origin = std::exchange(next_, {Kind::Formula, 0, 0});
  if (origin.kind == Kind::Formula) {
    keep(id, Kind::Formula, n_formula_++);
  } else if (origin.kind == Kind::Core) {
    keep(id, Kind::Core, cores_.size() - 1);
  } else {
    keep(id, origin.kind, pool_.size());
    pool_.insert(pool_.end(), {origin.a, origin.b});
  }
}

void Recorder::derived(std::int64_t id, const std::vector<int>& clause, const std::vector<std::int64_t>& antecedents) {
  keep(id, Kind::Derived, pool_.size());
  pool_.push_back(static_cast<int>(clause.size()));
  pool_.push_back(static_cast<int>(antecedents.size()));
  pool_.insert(pool_.end(), clause.begin(), clause.end());
  for (const std::int64_t antecedent : antecedents) pool_.push_back(static_cast<int>(id - antecedent));
}

void Recorder::add_derived_clause(std::int64_t id, bool, int, const std::vector<int>& clause,
                                  const std::vector<std::int64_t>& antecedents) {
  derived(id, clause, antecedents);
  if (clause.empty()) empty_ = id;
}

void Recorder::add_assumption_clause(std::int64_t id, const std::vector<int>& clause,
                                     const std::vector<std::int64_t>& antecedents) {
  derived(id, clause, antecedents);
  failed_ = id;
}

void Recorder::core(std::span<const int> clause, std::int64_t weight) {
  std::vector<int> told(pool_.begin() + static_cast<std::ptrdiff_t>(at(failed_)) + 2,
                        pool_.begin() + static_cast<std::ptrdiff_t>(at(failed_)) + 2 + pool_[at(failed_)]);
  std::vector<int> wanted(clause.begin(), clause.end());
  std::sort(told.begin(), told.end());
  std::sort(wanted.begin(), wanted.end());
  if (told != wanted) throw std::logic_error("the solver's core and its proof of it differ");
  cores_.push_back({failed_, weight, {clause.begin(), clause.end()}});
  if (clause.size() > 1) add_totalizer(clause.size());
}

// Numbers the variables as a reader of the certificate does (Derivation::totalize).
void Recorder::add_totalizer(std::size_t size) {
  bases_.push_back(n_outputs_);
  if (size == 1) return;
  n_outputs_ += static_cast<int>(size);
  add_totalizer(size / 2);
  add_totalizer(size - size / 2);
}

void Recorder::output(int made, int node, int count) {
  if (made_.empty()) first_made_ = made;
  made_.resize(static_cast<std::size_t>(made - first_made_) + 1);
  made_.back() = bases_[static_cast<std::size_t>(node)] + count;
}

void Recorder::write(const std::vector<int>& formula, std::int64_t k, const std::function<void(std::size_t)>& name,
                     std::string& out) {
  std::vector<std::uint8_t> needed(clauses_.size());
  if (k > 0)
    for (const Core& core : cores_) needed[static_cast<std::size_t>(core.id)] = 1;
  else
    needed[static_cast<std::size_t>(empty_)] = 1;
  const auto ids = static_cast<std::int64_t>(clauses_.size());
  for (std::int64_t id = ids - 1; id > 0; --id) {
    if (!needed[static_cast<std::size_t>(id)]) continue;
    if (kind(id) == Kind::Core) needed[static_cast<std::size_t>(cores_[at(id)].id)] = 1;
    if (kind(id) != Kind::Derived) continue;
    const int* const first = pool_.data() + at(id);
    for (const int* back = first + 2 + first[0]; back != first + 2 + first[0] + first[1]; ++back)
      needed[static_cast<std::size_t>(id - *back)] = 1;
  }

  // Axioms, and a number for each variable as they mention it.
  std::size_t axioms = 0;
  for (std::int64_t id = 1; id < ids; ++id) axioms += needed[static_cast<std::size_t>(id)] && kind(id) == Kind::Formula;
  put(out, static_cast<std::uint64_t>(k));
  put(out, axioms);
  std::vector<std::int64_t> numbers(clauses_.size());
  std::vector<int> variables;
  int n_variables = 0;
  std::int64_t number = 0;
  std::size_t clause = 0;
  auto literal = formula.begin();
  for (std::int64_t id = 1; id < ids; ++id) {
    if (!needed[static_cast<std::size_t>(id)] || kind(id) != Kind::Formula) continue;
    numbers[static_cast<std::size_t>(id)] = ++number;
    for (; clause < at(id); ++clause) literal = std::find(literal, formula.end(), 0) + 1;
    for (; *literal != 0; ++literal) {
      const auto variable = static_cast<std::size_t>(std::abs(*literal));
      if (variables.size() <= variable) variables.resize(std::max(variable + 1, 2 * variables.size()));
      if (variables[variable] == 0) variables[variable] = ++n_variables;
    }
    ++literal;
    ++clause;
    name(at(id));
  }

  const auto put_one = [&](int found) {
    const int variable = std::abs(found);
    int its = 0;
    if (!made_.empty() && variable >= first_made_)
      its = n_variables + made_[static_cast<std::size_t>(variable - first_made_)];
    else if (static_cast<std::size_t>(variable) < variables.size())
      its = variables[static_cast<std::size_t>(variable)];
    if (its == 0) throw std::logic_error("a step names a variable that no axiom has");
    put_literal(out, found < 0 ? -its : its);
  };
  const auto put_step = [&](Step step) { put(out, static_cast<std::uint64_t>(step)); };
  auto core = cores_.begin();
  for (std::int64_t id = 1; id < ids; ++id) {
    if (!needed[static_cast<std::size_t>(id)]) continue;
    std::int64_t& its = numbers[static_cast<std::size_t>(id)];
    switch (kind(id)) {
      case Kind::Formula:
        continue;
      case Kind::Core:
        its = numbers[static_cast<std::size_t>(cores_[at(id)].id)];
        continue;
      case Kind::Derived: {
        const int* const first = pool_.data() + at(id);
        std::span<const int> literals(first + 2, static_cast<std::size_t>(first[0]));
        const bool is_core = k > 0 && core != cores_.end() && core->id == id;
        put_step(is_core ? Step::Core : Step::Clause);
        if (is_core) {
          put(out, static_cast<std::uint64_t>(core->weight));
          literals = core->clause;
          ++core;
        }
        its = ++number;
        put(out, literals.size());
        for (const int found : literals) put_one(found);
        put(out, static_cast<std::uint64_t>(first[1]));
        for (int i = 0; i < first[1]; ++i)
          put(out, static_cast<std::uint64_t>(its - numbers[static_cast<std::size_t>(id - first[2 + first[0] + i])]));
        continue;
      }
      case Kind::Count:
        put_step(Step::Count);
        put_one(pool_[at(id)]);
        put(out, static_cast<std::uint64_t>(pool_[at(id) + 1]));
        break;
      case Kind::Order:
        put_step(Step::Order);
        put_one(pool_[at(id)]);
        break;
      case Kind::Hard:
        put_step(Step::Hard);
        put_one(-pool_[at(id)]);
        break;
      case Kind::Nothing:
        throw std::logic_error("a step follows from a clause that was not told");
    }
    its = ++number;
  }
  put_step(Step::End);
}

}  // namespace clue::logic
