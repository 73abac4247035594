// Formats: DRAT as drat-trim reads it (Wetzler, Heule, Hunt 2014) and LRAT (Cruz-Filipe et al. 2017), text or binary.
#include "proof.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <utility>

namespace clue::sat {
namespace {

constexpr std::size_t kBuffer = 1 << 20;

}  // namespace

Proof::Proof(std::string path, ProofFormat format, bool binary)
    : path_(std::move(path)), format_(format), binary_(binary) {
  const auto slash = path_.find_last_of('/') + 1;
  temporary_ = path_.substr(0, slash) + "." + path_.substr(slash) + "." + std::to_string(getpid()) + ".partial";
  file_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (file_ < 0) throw FileError(errno, path_);
  buffer_.reserve(kBuffer + 64);
}

Proof::~Proof() {
  if (file_ < 0) return;
  ::close(file_);
  unlink(temporary_.c_str());
}

void Proof::raise() const { throw FileError(error_, path_); }

void Proof::seal() {
  if (sealed_) return;
  sealed_ = true;
  latest_ = originals_;
  for (const Step& step : std::exchange(waiting_, {})) write_step(step);
}

void Proof::close() {
  seal();
  write_deletions();
  flush();
  if (error_ == 0 && fsync(file_) != 0 && errno != EINVAL) error_ = errno;  // EINVAL: not a file that can be synced
  if (::close(std::exchange(file_, -1)) != 0 && error_ == 0) error_ = errno;
  if (error_ == 0 && std::rename(temporary_.c_str(), path_.c_str()) != 0) error_ = errno;
  if (error_ == 0) return;
  unlink(temporary_.c_str());
  raise();
}

// --- what the solver tells -------------------------------------------------------------------------------------------

void Proof::add_original_clause(std::int64_t id, bool, const std::vector<int>&, bool restored) {
  if (restored) {
    weakened_.erase(id);
    return;
  }
  ++originals_;
  if (format_ == ProofFormat::Drat) return;
  if (!runs_.empty() && runs_.back().first + runs_.back().length == id)
    ++runs_.back().length;
  else
    runs_.push_back({id, originals_, 1});
}

void Proof::add_derived_clause(std::int64_t id, bool, int witness, const std::vector<int>& clause,
                               const std::vector<std::int64_t>& antecedents) {
  Step step{id, false, clause, antecedents};
  // A checker of DRAT takes the first literal as the witness.
  if (witness != 0) {
    const auto at = std::find(step.clause.begin(), step.clause.end(), witness);
    if (at != step.clause.end()) std::iter_swap(step.clause.begin(), at);
  }
  write_step(step);
}

void Proof::add_assumption_clause(std::int64_t id, const std::vector<int>& clause,
                                  const std::vector<std::int64_t>& antecedents) {
  write_step({id, false, clause, antecedents});
}

void Proof::delete_clause(std::int64_t id, bool, const std::vector<int>& clause) {
  if (!weakened_.contains(id)) write_step({id, true, clause, {}});
}

// --- lines -----------------------------------------------------------------------------------------------------------

std::int64_t Proof::number(std::int64_t id) const {
  auto run = std::upper_bound(runs_.begin(), runs_.end(), id,
                              [](std::int64_t value, const Run& other) { return value < other.first; });
  if (run != runs_.begin() && id < (--run)->first + run->length) return run->ordinal + (id - run->first);
  return originals_ + id;
}

void Proof::write_step(const Step& step) {
  if (failed()) return;
  if (format_ == ProofFormat::Drat) {
    if (binary_) put(step.deletes ? 'd' : 'a');
    if (!binary_ && step.deletes) buffer_ += "d ";
    for (const int literal : step.clause) put_literal(literal);
    put_end();
    if (!binary_) put('\n');
    return;
  }
  if (!sealed_) {
    waiting_.push_back(step);
    return;
  }
  const std::int64_t id = number(step.id);
  if (step.deletes) {
    deleted_.push_back(id);
    return;
  }
  write_deletions();
  latest_ = id;
  if (binary_) put('a');
  put_id(id);
  for (const int literal : step.clause) put_literal(literal);
  put_end();
  if (!binary_) put(' ');
  for (const std::int64_t antecedent : step.antecedents) put_id(number(antecedent));
  put_end();
  if (!binary_) put('\n');
}

void Proof::write_deletions() {
  if (deleted_.empty()) return;
  if (!binary_) put_number(latest_);
  put('d');
  if (!binary_) put(' ');
  for (const std::int64_t id : deleted_) put_id(id);
  put_end();
  if (!binary_) put('\n');
  deleted_.clear();
}

void Proof::put(char c) {
  buffer_ += c;
  if (buffer_.size() >= kBuffer) flush();
}

void Proof::put_number(std::int64_t value) {
  char digits[24];
  char* const end = std::to_chars(digits, digits + sizeof digits - 1, value).ptr;
  *end = ' ';
  buffer_.append(digits, static_cast<std::size_t>(end - digits) + 1);
  if (buffer_.size() >= kBuffer) flush();
}

void Proof::put_unsigned(std::uint64_t value) {
  for (; value > 0x7f; value >>= 7) put(static_cast<char>((value & 0x7f) | 0x80));
  put(static_cast<char>(value));
}

void Proof::put_literal(int literal) {
  if (binary_)
    put_unsigned(2 * static_cast<std::uint64_t>(std::abs(literal)) + (literal < 0));
  else
    put_number(literal);
}

void Proof::put_id(std::int64_t id) {
  if (binary_)
    put_unsigned(2 * static_cast<std::uint64_t>(id));
  else
    put_number(id);
}

void Proof::put_end() { put(binary_ ? '\0' : '0'); }

void Proof::flush() {
  const char* at = buffer_.data();
  for (std::size_t left = buffer_.size(); left > 0 && error_ == 0;) {
    const ssize_t written = write(file_, at, left);
    if (written < 0) {
      if (errno != EINTR) error_ = errno;
      continue;
    }
    at += written;
    left -= static_cast<std::size_t>(written);
  }
  buffer_.clear();
}

}  // namespace clue::sat
