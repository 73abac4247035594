// Connected components of a formula, the small ones packed together.
#pragma once

#include <cstdint>
#include <vector>

namespace clue::logic {

// Part of a formula that shares no variable with the rest of it.
struct Pack {
  std::vector<std::int32_t> members;  // variables, in ascending order
  std::vector<std::int32_t> clauses;  // places in the list of clauses, in ascending order
};

// Union-find over variables 0 .. n - 1.
class Components {
 public:
  explicit Components(std::int32_t n);
  void join(std::int32_t a, std::int32_t b);

  // Packs of whole components, of about 512 variables where components are smaller, since a solver costs more than a
  // small component. The smallest come first, so that a time limit leaves as few of them as possible undone.
  // `variables` are those to be packed, in ascending order, and `clause_variable` has one variable of each clause.
  std::vector<Pack> packs(std::vector<std::int32_t> variables, const std::vector<std::int32_t>& clause_variable);
  std::int64_t count() const { return count_; }  // components in the packs

 private:
  std::int32_t root(std::int32_t v);

  std::vector<std::int32_t> parent_;
  std::int64_t count_ = 0;
};

}  // namespace clue::logic
