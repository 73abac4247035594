// Certificates: why the cost of an answer is the least, in bytes that a reader without a solver can check.
//
// A certificate holds a model and, section by section, a proof that some terms of the cost add up to at least k in
// every model. The terms of different sections are different ones, so the k of all sections add up too, together with
// what every model pays at the root. The claim is proven when this sum is the cost of the model.
//
// Within a section a model M that pays less than k is assumed, and cores show that there is none. A core of weight w is
// a clause of literals that cost something, each at least w: one of them is true in M. w is taken off all of them and
// paid. What the rest of them pay is counted by a totalizer: its variable "at least j are true", for j = 2 up to all,
// costs w. The sum of costs does not change by this, for these variables are new: M is extended by what they say.
//
// Layout. Numbers are unsigned LEB128 (7 bits a byte, low ones first) unless said otherwise; a signed number s is
// written as 2s, or -2s - 1 if negative; a literal of variable v >= 1 is 2v, or 2v + 1 where it is negated.
//
//   8 bytes  "CLUECERT"
//   4 bytes  version, little endian: 2
//   1 byte   kind of question: 1 circuits, 2 weighted formula (.wcnf)
//   1 byte   claim: 1 the cost is the least, 0 there is no model
//   32 bytes digest of the question, as clue.certificate.digest computes it
//   number   cost; then the model's bits, low ones first, padded to whole bytes with 0. Neither if there is no model.
//              circuits: 2 bits a node, works for retain (r_n) and dead for forget (not f_n), from node 0 on
//              formula: 1 bit a variable, from variable 1 on
//   number   sections, and each of them:
//     number k
//     number axioms: clauses of the question, by their names (below)
//     steps, each begun by a number, until 0:
//       1 clause     literals, hints
//       2 core       weight, literals, hints
//       3 count      variable, number i
//       4 order      variable
//       5 hard       literal
//   nothing more
//
// Clauses are numbered from 1 on: the axioms, then each step has one. Literals and hints are counted: their number
// comes first. A hint is the number of the step minus that of the clause meant. A clause follows from its hints: when
// all its literals are false, each hint in turn has one literal left that is not, which is then true, and the last has
// none.
//
// Variables are those of the axioms, from 1 on as they appear. What one of them costs belongs to the first section that
// has it. A core of two literals or more makes the variables of its totalizer: a balanced tree over the literals in
// their order, split at half the size (rounded down). From the root down, left before right, each inner node over s
// literals has s variables, "at least 1 is true" to "at least s are". A leaf's only variable is its literal. A step 3
// names a variable z_j of a node and 0 <= i <= j: when i of the left child and j - i of the right one are true, then
// z_j is. A step 4 says that z_j needs z_(j-1), j >= 2. A step 5 says that M falsifies a literal: it may where what is
// paid plus the literal's cost is k or more; its clause is the negated literal. The cores weigh k together, or the
// empty clause is derived. Where the claim is that there is no model, k is 0, there is no step 5, and each section
// derives the empty clause.
//
// Axioms of circuits, where x_n is as in circuit.hpp. Literals that unit propagation decides at the root are left out
// of the clauses. An axiom is the node, as a signed difference to the one before (the first: to 0), and a number:
//   0                                  not works, or not dead, or the new variable "conflict" of the node; where all
//                                      three are open and it costs something
//   1 + 8 (node - input) + 4 side      an edge of a group that asks for all inputs: x_node implies x_input
//   2 + 8 (node - input) + 4 side      authors, of a group that asks for any: x_input implies x_node
//   3 + 8 (3 circuit + gate) + 4 side  a group that asks for any: x_node implies one of its inputs, in order of ids
//   4 + 8 (3 circuit + gate) + 4 side  authors, a group that asks for all: together they imply x_node
// with side 1 for retain and 0 for forget; edges name no circuit, since it does not matter which one has them. A
// conflict's cost is on its variable where both sides are open, and on the open one of the two where the other is true;
// where both are true, it is paid at the root.
//
// Axioms of a formula: the number of the clause, hard ones first, from 0 on, as a signed difference to the one before.
// A soft clause has its literals in order of variables, without repeats. Of several literals, it has a new variable in
// addition, which costs its weight; one literal costs its weight where it is false. What x and not x both cost is paid
// at the root.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

namespace clue::logic {

inline constexpr std::uint8_t kOfCircuits = 1, kOfFormula = 2;

enum class Step : std::uint8_t { End = 0, Clause = 1, Core = 2, Count = 3, Order = 4, Hard = 5 };

// An axiom of circuits by what it says.
enum class Axiom : std::uint8_t { NeedsInput = 1, FollowsInput = 2, NeedsAny = 3, FollowsAll = 4 };

using Digest = std::array<std::uint8_t, 32>;

// The certificate does not prove its claim; the text says where and why.
struct Refuted : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The bytes are no certificate of a known version, or one of another question.
struct Unreadable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a check went through.
struct Checked {
  bool satisfiable = true;  // false: proven to have no model
  std::int64_t cost = 0;    // of the model, and the least there is
  std::int64_t root = 0;    // the part of it that is paid at the root
  std::int64_t sections = 0, axioms = 0, clauses = 0, cores = 0;
};

void put(std::string& out, std::uint64_t number);
void put_signed(std::string& out, std::int64_t number);
void put_literal(std::string& out, int literal);

// What precedes the cost.
void put_head(std::string& out, std::uint8_t kind, bool satisfiable, const Digest& question);

// Reads a certificate from front to back. Throws Refuted where it ends too soon or a number is too large.
class Reader {
 public:
  explicit Reader(std::string_view bytes) : at_(bytes.data()), end_(bytes.data() + bytes.size()) {}

  // Checks what precedes the cost and returns whether a model is claimed. Throws Unreadable.
  bool head(std::uint8_t kind, const Digest& question);

  std::uint64_t number() {
    if (at_ != end_ && static_cast<std::uint8_t>(*at_) < 0x80) return static_cast<std::uint8_t>(*at_++);
    return long_number();
  }
  std::int64_t signed_number() {
    const std::uint64_t value = number();
    return static_cast<std::int64_t>(value >> 1) ^ -static_cast<std::int64_t>(value & 1);
  }
  std::int64_t amount();  // a number below 2^62
  // A number of things that take a byte each at least, so that memory does not grow with what a file claims.
  std::size_t count();
  std::string_view bytes(std::size_t size);
  bool at_end() const { return at_ == end_; }

 private:
  std::uint64_t long_number();

  const char *at_, *end_;
};

}  // namespace clue::logic
