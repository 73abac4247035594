// Checks the sections of a certificate (certificate.hpp), whatever the question. Nothing of the solver is used here.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "certificate.hpp"

namespace clue::logic {

class Derivation {
 public:
  // `poll` is called now and then and may throw.
  Derivation(Reader& in, Checked& checked, const std::function<void()>& poll)
      : in_(in), checked_(checked), poll_(poll) {}

  // One section: first its axioms, in the variables 1.. that variable() has made, and what literals cost.
  void begin();
  int variable();
  void axiom(std::span<const int> literals);
  void cost(int literal, std::int64_t weight) { cost_[index(literal)] = weight; }

  // Then its steps. Throws Refuted unless they prove that `k` must be paid; with `no_model`, unless they prove that the
  // axioms have no model, whatever it pays.
  void steps(std::int64_t k, bool no_model);

 private:
  // A node of a totalizer over `size` literals; `first` is its first variable, or the literal of a leaf.
  struct Node {
    int first, size;
    std::size_t right;  // child; the left one is the next node
  };

  static std::size_t index(int literal) {
    return literal < 0 ? 2 * static_cast<std::size_t>(-literal) + 1 : 2 * static_cast<std::size_t>(literal);
  }
  int literal();
  void literals();
  void implied();
  void totalize(std::span<const int> inputs);
  const Node& owner(int variable) const;
  static int output(const Node& node, int count) { return node.size == 1 ? node.first : node.first + count - 1; }
  void assign(int literal);
  [[noreturn]] void refuse(const char* what) const;

  Reader& in_;
  Checked& checked_;
  const std::function<void()>& poll_;
  int n_variables_ = 0;
  std::vector<int> clauses_, clause_, core_;
  std::vector<std::size_t> ends_;
  std::vector<std::int64_t> cost_;  // by index
  std::vector<std::int8_t> value_;  // by index: 1 true, -1 false, 0 open
  std::vector<int> trail_;
  std::vector<Node> nodes_;
  std::vector<std::size_t> inner_;  // nodes with variables of their own, in order of these
  std::int64_t work_ = 0, step_ = 0;
  bool refuted_ = false;  // the empty clause is among the clauses
};

}  // namespace clue::logic
