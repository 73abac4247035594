// Circuits as arrays, and the question asked of them: which nodes work for the retain circuits and which die for the
// forget circuits, at the fewest conflicts. This header is all that callers need; encode.cpp implements assign().
//
// Every node n has two variables, r_n (it works for the retain circuits) and f_n (it works for the forget circuits).
// The two sides mirror each other: with x_n = r_n on the retain side and x_n = not f_n on the forget side, the output's
// x is true and every group of incoming edges (one per circuit and gate) asks for all or for any of its inputs:
//
//            retain (x = works)   forget (x = dead)
//   AND      all                  any
//   OR       any                  all
//   ADDER    all                  all
//
// support: x_n implies each of its groups. authors: x_n is equivalent to each of its groups. A conflict is r_n and not
// f_n on a node of both sides that has weights. The embedding always works: it satisfies retain groups that ask for any
// input and is left out of all others.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "certificate.hpp"
#include "limits.hpp"

namespace clue::logic {

enum class Gate : std::uint8_t { And = 0, Or = 1, Adder = 2 };
enum class Semantics : std::uint8_t { Support = 0, Authors = 1 };

// One circuit: parallel arrays over its edges. Node ids are topologically sorted, so src < dst.
struct Circuit {
  std::span<const std::int32_t> src, dst;
  std::span<const std::uint8_t> gate;
};

// Borrowed views; node 0 is the embedding and node n_nodes - 1 the output.
struct Question {
  std::int32_t n_nodes = 0;
  std::span<const std::uint8_t> editable;  // [n_nodes] 1 where the node has weights
  std::vector<Circuit> forget, retain;
  std::span<const std::int64_t> weight;  // [n_nodes] cost of a conflict
  std::span<const std::int64_t> risk;    // [n_nodes] cost of a retain node that is not kept working, or is edited
  std::span<const std::int64_t> reach;   // [n_nodes] gain of a forget node that is edited
  Semantics semantics = Semantics::Support;
  double time_limit = 0;  // seconds; 0 is none
  // [n_nodes] r_n and f_n as they must be: 1, 0, or -1 where the answer may choose; empty where nothing is pinned
  std::span<const std::int8_t> retain_pin, forget_pin;
  bool survey = false;  // find `backbone` too; then only the weights count, and the answer need not be unique
};

// r_n and f_n are -1 where the node is in no circuit of that side.
struct Answer {
  std::vector<std::int8_t> retain_works, forget_works;
  std::vector<std::uint8_t> conflict;  // r_n and not f_n, on editable nodes of both sides
  std::vector<std::uint8_t> forced;    // the conflicts that follow from the outputs by propagation alone
  std::int64_t cost = 0;               // sum of weights of the conflicts
  std::int64_t lower_bound = 0;        // no assignment costs less
  bool optimal = false;                // cost == lower_bound was proven
  bool feasible = true;                // false: the pins allow no assignment
  std::vector<std::uint8_t> backbone;  // survey: the node is a conflict in 0 no, 1 some, 2 every optimum
  bool unique = false;                 // every level of the order was decided, so the answer is the only best one
  bool interrupted = false;            // `interrupted` or `on_bounds` cut it short, not the time limit
  std::int64_t variables = 0, clauses = 0, components = 0, cores = 0, solves = 0;
  std::string certificate;  // empty unless it was asked for and the cost is proven
};

struct TimeUp : std::runtime_error {
  explicit TimeUp(const std::string& sought) : std::runtime_error("time_limit: no " + sought + " was found in time") {}
};

// Answers the question. The answer is unique and depends on nothing but the question, unless it is cut short: then it
// is the best one so far, a valid assignment with proven bounds. It minimises in this order: weight of conflicts; risk
// of retain nodes with r_n = 0, plus risk of editable retain nodes with f_n = 0; minus the reach of editable forget
// nodes with f_n = 0; then, from the lowest node id up, f_n = 1 is preferred, then r_n = 1.
//
// `interrupted` is polled about every 50 ms and must not throw; `on_bounds` may be null. Throws std::invalid_argument
// naming the argument when an array has the wrong length, an id is out of range, an edge runs backwards, or nothing
// reaches an output. Where there are pins and it is cut short before any assignment that obeys them is known, it throws
// TimeUp or Interrupted.
//
// With `digest`, that of the question, the answer has a certificate (certificate.hpp), if its cost is proven. There are
// none for questions with pins or a survey.
Answer assign(const Question& question, const std::function<bool()>& interrupted, const OnBounds& on_bounds,
              const Digest* digest = nullptr);

// Throws what assign() throws for a question that makes no sense.
void require_valid(const Question& question);

}  // namespace clue::logic
