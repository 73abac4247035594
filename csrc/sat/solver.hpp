// CaDiCaL for everyone: the state machine of its API checked before every call, so that a mistake is an exception that
// names it and the solver stays usable. No Python here.
#pragma once

#include <atomic>
#include <cadical.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "logic/solver.hpp"
#include "proof.hpp"

namespace clue::sat {

using logic::Verdict;

// A variable so large that its tables cannot fit into this machine.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string text) : text_(std::move(text)) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

// CaDiCaL holds tables over all variables 1..variable; throws OutOfMemory when this machine has no room for them.
void require_memory(int variable);

// When one call ends early; all of them may be left out.
struct SearchLimits {
  double seconds = 0;  // 0 is none
  int conflicts = -1, decisions = -1;
};

// Throws std::invalid_argument for a bad argument, std::logic_error for a call at the wrong time, OutOfMemory, and
// FileError when the proof cannot be written. Methods must not run at the same time, except terminate().
class Solver {
 public:
  Solver();
  ~Solver();
  Solver(const Solver&) = delete;
  Solver& operator=(const Solver&) = delete;

  // Before the first clause.
  void set_option(const std::string& name, std::int64_t value);
  int option(const std::string& name);
  void write_proof(const std::string& path, ProofFormat format, bool binary);

  void close_proof();    // the file takes its name now
  void discard_proof();  // nothing is left of it

  int variables() const { return variables_; }
  void reserve(int variables);                           // variables 1..variables exist from now on
  void add(std::span<const std::int32_t> clauses);       // each ended by 0; all or nothing
  void constrain(std::span<const std::int32_t> clause);  // one clause, without 0, for the next call only

  // `interrupted` is polled every 50 ms; was_interrupted() says whether it ended the call.
  Verdict solve(std::span<const std::int32_t> assumptions, const SearchLimits& limits,
                const std::function<bool()>& interrupted);
  Verdict simplify(int rounds, const SearchLimits& limits, const std::function<bool()>& interrupted);
  bool was_interrupted() const { return interrupted_; }
  void terminate() { stop_ = true; }       // from any thread; ends the running call soon
  void begin() { stop_ = false; }          // before a call: an earlier terminate() is over
  void forget() { state_ = State::Open; }  // the answer of the last call is not wanted
  bool writes_proof() const { return proof_ != nullptr; }
  std::int64_t size() const { return size_; }  // literals added

  // What follows from the formula and the assumptions by unit propagation; nothing on a conflict.
  std::optional<std::vector<std::int32_t>> propagate(std::span<const std::int32_t> assumptions);

  std::vector<std::int8_t> model();  // [variables + 1]; entry 0 unused
  bool value(std::int32_t literal);
  std::vector<std::int32_t> core();  // assumptions that cannot hold together
  bool constraint_failed();

  void phase(std::int32_t literal, bool forced);
  void freeze(std::int32_t literal, bool frozen);
  int fixed(std::int32_t literal);  // 1 implied, -1 refuted, 0 open
  std::vector<std::pair<const char*, std::int64_t>> statistics() const;

 private:
  std::unique_ptr<Proof> take_proof();
  enum class State { Open, Satisfiable, Unsatisfiable, Unknown };

  struct Stop : CaDiCaL::Terminator {
    explicit Stop(Solver& owner) : self(owner) {}
    bool terminate() override {
      return self.stop_ || (self.proof_ && self.proof_->failed()) || (self.limits_ && self.limits_->expired());
    }
    Solver& self;
  };

  void check_literal(std::int32_t literal, const char* name) const;
  void declare(int variable);
  void declare(std::span<const std::int32_t> literals, const char* name);  // checks them too
  void require_configuring(const char* what);
  template <typename Call>
  Verdict run(const SearchLimits& limits, const std::function<bool()>& interrupted, Call call);

  Stop stopper_{*this};
  CaDiCaL::Solver solver_;
  std::unique_ptr<Proof> proof_;
  State state_ = State::Open;
  int variables_ = 0;
  std::int64_t size_ = 0;
  std::vector<std::pair<int, int>> taken_;  // ranges of variables that the solver made for itself
  std::vector<std::int32_t> assumptions_;   // of the last solve
  logic::Limits* limits_ = nullptr;
  std::atomic<bool> stop_ = false;
  bool interrupted_ = false;
};

}  // namespace clue::sat
