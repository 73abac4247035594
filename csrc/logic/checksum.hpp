// A checksum of bytes at the speed of memory, to tell questions apart that were mixed up. No secret rests on it: a
// certificate is checked against the question that it is given with, whatever question it names.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace clue::logic {

// Four sums, each over every fourth 8-byte word (little endian, the last one filled up with zeros): of a sum s and a
// word w comes rotate(s + w p, 31) q, in 64 bits. The sums begin as 0 to 3. The length is for the caller to add.
inline std::array<std::uint64_t, 4> checksum(std::string_view bytes) {
  constexpr std::uint64_t p = 0x9e3779b97f4a7c15, q = 0xd6e8feb86659fd93;
  std::array<std::uint64_t, 4> sums{0, 1, 2, 3};
  std::array<std::uint64_t, 4> words;
  const auto add = [&] {
    for (std::size_t lane = 0; lane < 4; ++lane) {
      std::uint64_t word = words[lane];
      if constexpr (std::endian::native == std::endian::big) word = __builtin_bswap64(word);
      sums[lane] = std::rotl(sums[lane] + word * p, 31) * q;
    }
  };
  std::size_t at = 0;
  for (; at + sizeof words <= bytes.size(); at += sizeof words) {
    std::memcpy(words.data(), bytes.data() + at, sizeof words);
    add();
  }
  if (at < bytes.size()) {
    words = {};
    std::memcpy(words.data(), bytes.data() + at, bytes.size() - at);
    add();
  }
  return sums;
}

}  // namespace clue::logic
