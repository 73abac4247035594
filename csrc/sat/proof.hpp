// A proof of unsatisfiability on its way to a file: whole or not at all, and a disk that fills is told.
#pragma once

#include <cadical.hpp>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tracer.hpp>
#include <unordered_set>
#include <vector>

namespace clue::sat {

// A file that cannot be written: `code` is an errno.
struct FileError : std::runtime_error {
  FileError(int number, const std::string& name) : std::runtime_error(name), code(number), path(name) {}
  int code;
  std::string path;
};

// DRAT: every derived clause, and deletions. LRAT: with ids, and the ids of the clauses it follows from.
enum class ProofFormat { Drat, Lrat };

// Writes beside `path` under a hidden name; close() renames. The solver must not see an exception, so errors are kept
// and told when asked.
//
// A clause that the solver weakens (it may come back when clauses or assumptions are added) is not deleted in the file:
// a checker of one formula would miss it later. LRAT numbers the clauses of the formula 1..m in the order they were
// added; what is derived before m is known (seal) waits in memory, and derived clauses are numbered from m + 1.
class Proof : public CaDiCaL::Tracer {
 public:
  // Throws FileError when the file cannot be made.
  Proof(std::string path, ProofFormat format, bool binary);
  ~Proof() override;  // without close(), nothing is left
  Proof(const Proof&) = delete;
  Proof& operator=(const Proof&) = delete;

  bool needs_antecedents() const { return format_ == ProofFormat::Lrat; }
  bool takes_clauses() const { return !sealed_ || format_ == ProofFormat::Drat; }
  bool failed() const { return error_ != 0; }
  void seal();
  [[noreturn]] void raise() const;  // FileError with the kept error
  void close();                     // flushes to disk and renames; throws FileError

  void add_original_clause(std::int64_t id, bool, const std::vector<int>& clause, bool restored) override;
  void add_derived_clause(std::int64_t id, bool, int witness, const std::vector<int>& clause,
                          const std::vector<std::int64_t>& antecedents) override;
  void add_assumption_clause(std::int64_t id, const std::vector<int>& clause,
                             const std::vector<std::int64_t>& antecedents) override;
  void delete_clause(std::int64_t id, bool, const std::vector<int>& clause) override;
  void weaken_minus(std::int64_t id, const std::vector<int>&) override { weakened_.insert(id); }

 private:
  struct Run {
    std::int64_t first, ordinal, length;  // ids first.. are the formula's clauses number ordinal..
  };
  struct Step {
    std::int64_t id;
    bool deletes;
    std::vector<int> clause;
    std::vector<std::int64_t> antecedents;
  };

  std::int64_t number(std::int64_t id) const;
  void write_step(const Step& step);
  void write_deletions();
  void put(char c);
  void put_number(std::int64_t value);  // text, with a blank
  void put_unsigned(std::uint64_t value);
  void put_literal(int literal);
  void put_id(std::int64_t id);
  void put_end();
  void flush();

  const std::string path_;
  std::string temporary_;
  const ProofFormat format_;
  const bool binary_;
  int file_ = -1, error_ = 0;
  std::string buffer_;

  bool sealed_ = false;
  std::int64_t originals_ = 0, latest_ = 0;
  std::vector<Run> runs_;
  std::vector<Step> waiting_;
  std::vector<std::int64_t> deleted_;  // told together, before the next clause
  std::unordered_set<std::int64_t> weakened_;
};

}  // namespace clue::sat
