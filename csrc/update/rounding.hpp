// Stochastic rounding to bfloat16: up or down at random, so that a weight is right on average however small its
// updates. The random numbers are a function of a key and an element's place, not of any order: the same bits for every
// number of threads, instruction set and device. Static, since kernels.cpp may link nothing that another instruction
// set could own.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CLUE_ANYWHERE __host__ __device__
#else
#define CLUE_ANYWHERE
#endif

namespace clue {

// What the random numbers of one slice are drawn by.
struct RoundingKey {
  std::uint32_t first, second;
};

// One output of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): neighbouring slices share nothing.
CLUE_ANYWHERE static inline RoundingKey rounding_key(std::uint64_t key, std::int64_t slice) {
  std::uint64_t z = key + (static_cast<std::uint64_t>(slice) + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return {static_cast<std::uint32_t>(z), static_cast<std::uint32_t>(z >> 32)};
}

// 32 random bits of one element: two rounds of multiply and shift, which vectors of 32-bit integers have everywhere.
CLUE_ANYWHERE static inline std::uint32_t rounding_bits(RoundingKey key, std::uint32_t element) {
  std::uint32_t x = element * 0x9e3779b9u + key.first;
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15) ^ key.second) * 0x735a2d97u;
  return x ^ (x >> 15);
}

// The 16 bits of the bfloat16 below a float (towards zero), or of the one above with the chance of what is cut off. A
// float that is a bfloat16 stays; above the largest one lies infinity; NaN stays NaN.
CLUE_ANYWHERE static inline std::uint16_t rounded_at_random(std::uint32_t bits, std::uint32_t random) {
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<std::uint16_t>(nan ? 0x7fc0u : (bits + (random >> 16)) >> 16);
}

}  // namespace clue
