// The bytes of certificates: numbers and what stands at the front.
#include "certificate.hpp"

#include <algorithm>
#include <cstdlib>

namespace clue::logic {
namespace {

constexpr std::string_view kMagic = "CLUECERT";
constexpr std::uint32_t kVersion = 2;

}  // namespace

void put(std::string& out, std::uint64_t number) {
  for (; number > 0x7f; number >>= 7) out += static_cast<char>((number & 0x7f) | 0x80);
  out += static_cast<char>(number);
}

void put_signed(std::string& out, std::int64_t number) {
  put(out, static_cast<std::uint64_t>(number) << 1 ^ static_cast<std::uint64_t>(number >> 63));
}

void put_literal(std::string& out, int literal) {
  put(out, 2 * static_cast<std::uint64_t>(std::abs(literal)) + (literal < 0));
}

void put_head(std::string& out, std::uint8_t kind, bool satisfiable, const Digest& question) {
  out += kMagic;
  for (int i = 0; i < 4; ++i) out += static_cast<char>(kVersion >> 8 * i & 0xff);
  out += static_cast<char>(kind);
  out += static_cast<char>(satisfiable);
  for (const std::uint8_t byte : question) out += static_cast<char>(byte);
}

bool Reader::head(std::uint8_t kind, const Digest& question) {
  const auto take = [&](std::size_t size) {
    if (size > static_cast<std::size_t>(end_ - at_)) throw Unreadable("it is cut short before its first number");
    return bytes(size);
  };
  if (static_cast<std::size_t>(end_ - at_) < kMagic.size() || take(kMagic.size()) != kMagic)
    throw Unreadable("it does not begin as a certificate does");
  std::uint32_t version = 0;
  for (int i = 0; const char byte : take(4)) version |= std::uint32_t{static_cast<std::uint8_t>(byte)} << 8 * i++;
  if (version != kVersion)
    throw Unreadable("its version is " + std::to_string(version) + ", not " + std::to_string(kVersion));
  const auto its_kind = static_cast<std::uint8_t>(take(1)[0]), claim = static_cast<std::uint8_t>(take(1)[0]);
  const std::string_view digest = take(question.size());
  if (its_kind != kind) throw Unreadable("it is of another kind of question");
  const auto same = [](char a, std::uint8_t b) { return static_cast<std::uint8_t>(a) == b; };
  if (!std::equal(digest.begin(), digest.end(), question.begin(), same)) throw Unreadable("it is of another question");
  if (claim > 1) throw Refuted("it claims something unknown");
  return claim == 1;
}

std::uint64_t Reader::long_number() {
  std::uint64_t value = 0;
  for (int shift = 0; shift < 64; shift += 7) {
    if (at_ == end_) throw Refuted("it is cut short");
    const std::uint64_t byte = static_cast<std::uint8_t>(*at_++);
    if (shift == 63 && byte > 1) break;
    value |= (byte & 0x7f) << shift;
    if (byte < 0x80) return value;
  }
  throw Refuted("a number is too large");
}

std::int64_t Reader::amount() {
  const std::uint64_t value = number();
  if (value >> 62 != 0) throw Refuted("a number is too large");
  return static_cast<std::int64_t>(value);
}

std::size_t Reader::count() {
  const std::uint64_t value = number();
  if (value > static_cast<std::uint64_t>(end_ - at_)) throw Refuted("it is cut short");
  return static_cast<std::size_t>(value);
}

std::string_view Reader::bytes(std::size_t size) {
  if (size > static_cast<std::size_t>(end_ - at_)) throw Refuted("it is cut short");
  const std::string_view found(at_, size);
  at_ += size;
  return found;
}

}  // namespace clue::logic
