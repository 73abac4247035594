// Stands in for the CUDA toolkit's header of this name.
#pragma once

#include "emulation.hpp"

struct __half {
  std::uint16_t bits;
  __half() = default;
  explicit __half(float x);
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa ? NAN : INFINITY;
  } else {
    magnitude =
        exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(static_cast<float>(mantissa), -24);
  }
  return std::copysign(magnitude, x.bits & 0x8000 ? -1.0f : 1.0f);
}

// To nearest, ties to even; the one NaN that the toolkit makes.
inline __half __float2half_rn(float x) {
  const double magnitude = std::fabs(static_cast<double>(x));
  unsigned bits;
  if (std::isnan(x)) {
    bits = 0x7fff;
  } else if (magnitude >= 65520) {
    bits = 0x7c00;
  } else {
    const int exponent = magnitude < std::ldexp(1.0, -14) ? -14 : std::ilogb(magnitude);
    const unsigned spacings = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    bits = static_cast<unsigned>(exponent + 14) * 1024 + spacings;  // the carry of a full mantissa is the exponent's
  }
  __half found;
  found.bits = static_cast<std::uint16_t>(bits | (std::signbit(x) ? 0x8000 : 0));
  return found;
}

inline __half::__half(float x) : __half(__float2half_rn(x)) {}
