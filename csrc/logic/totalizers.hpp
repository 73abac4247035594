// Totalizers: counters of true literals, made of clauses on demand.
//
// Source: Bailleux, Boufkhad (CP 2003); Martins, Joshi, Manquinho, Lynce (CP 2014) for making the outputs one by one.
#pragma once

#include <span>
#include <vector>

#include "limits.hpp"
#include "record.hpp"
#include "solver.hpp"

namespace clue::logic {

// A limit struck where half the work is of no use.
struct Expired {};

// Counts true literals: output(k) is implied by k of them being true. Built as a balanced tree, output by output.
// Throws Expired where a limit strikes.
class Totalizers {
 public:
  // `n_variables` is raised by one for every output made; `recorder` may be null, and may come later.
  Totalizers(Solver& solver, int& n_variables, Limits& limits, Recorder*& recorder)
      : solver_(solver), n_variables_(n_variables), limits_(limits), recorder_(recorder) {}

  // Returns the root of a new counter.
  int add(std::span<const int> inputs);

  int size(int id) const { return nodes_[id].size; }

  // The literal for "at least `count` inputs are true", 1 <= count <= size.
  int output(int id, int count);

 private:
  struct Node {
    int left, right, size;
    std::vector<int> outputs;
  };

  void extend(int id, int count);

  Solver& solver_;
  int& n_variables_;
  Limits& limits_;
  Recorder*& recorder_;
  std::vector<Node> nodes_;
  std::vector<int> clause_;
};

}  // namespace clue::logic
