// Keeps what a search derives, and writes the part of it that its bound rests on as one section of a certificate.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <tracer.hpp>
#include <vector>

namespace clue::logic {

// One search for the least cost (minimize.cpp), from the first clause to where its first level is closed. CaDiCaL tells
// each clause with those it follows from; where a clause comes from that is not derived, the search tells just before.
class Recorder : public CaDiCaL::Tracer {
 public:
  // The next clause is not one of the formula, but ...
  void next_counts(int output, int of_left) { next_ = {Kind::Count, output, of_left}; }  // a totalizer's
  void next_orders(int output) { next_ = {Kind::Order, output, 0}; }
  void next_is_hard(int literal) { next_ = {Kind::Hard, literal, 0}; }  // this literal, whose negation costs too much
  void next_is_core() { next_ = {Kind::Core, 0, 0}; }                   // that of the last core

  // The assumptions that failed last are a core of this weight: its clause in the order of the totalizer's inputs.
  void core(std::span<const int> clause, std::int64_t weight);
  // `made` is the variable for "at least `count`" of the node that the totalizers gave this number.
  void output(int made, int node, int count);

  // Appends a section: the bound k, the names of the axioms it needs, and the steps. `name` is called for each of
  // these axioms with its place in the formula. Without a bound, the section shows that there is no model.
  void write(const std::vector<int>& clauses, std::int64_t k, const std::function<void(std::size_t)>& name,
             std::string& out);

  void add_original_clause(std::int64_t id, bool, const std::vector<int>&, bool restored) override;
  void add_derived_clause(std::int64_t id, bool, int, const std::vector<int>& clause,
                          const std::vector<std::int64_t>& antecedents) override;
  void add_assumption_clause(std::int64_t id, const std::vector<int>& clause,
                             const std::vector<std::int64_t>& antecedents) override;

 private:
  enum class Kind : std::uint8_t { Nothing, Formula, Derived, Count, Order, Hard, Core };
  struct Origin {
    Kind kind;
    int a, b;
  };
  struct Core {
    std::int64_t id, weight;  // id of its clause
    std::vector<int> clause;
  };

  void keep(std::int64_t id, Kind kind, std::size_t at);
  void derived(std::int64_t id, const std::vector<int>& clause, const std::vector<std::int64_t>& antecedents);
  void add_totalizer(std::size_t size);
  Kind kind(std::int64_t id) const { return static_cast<Kind>(clauses_[static_cast<std::size_t>(id)] & 7); }
  std::size_t at(std::int64_t id) const {
    return static_cast<std::size_t>(clauses_[static_cast<std::size_t>(id)] >> 3);
  }

  Origin next_{Kind::Formula, 0, 0};
  std::size_t n_formula_ = 0;
  // By id, its kind in 3 bits, and where it is: place in the formula or among the cores, else in pool_. There Derived
  // has the numbers of literals and of antecedents, the literals, and each antecedent's distance from the id; the
  // others have their origin.
  std::vector<std::uint64_t> clauses_;
  std::vector<int> pool_;
  std::vector<Core> cores_;
  std::int64_t failed_ = 0, empty_ = 0;  // id of the last clause of failed assumptions, and of the empty clause
  std::vector<int> bases_;               // by node of the totalizers: the number before its first variable's
  int n_outputs_ = 0;                    // variables of totalizers
  int first_made_ = 0;
  std::vector<int> made_;  // by variable of the search, from first_made_ on: its number among these
};

}  // namespace clue::logic
