// Stands in for the CUDA toolkit's header of this name.
#pragma once

#include "emulation.hpp"

struct __nv_bfloat16 {
  std::uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x);
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const std::uint32_t bits = std::uint32_t{x.bits} << 16;
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

inline __nv_bfloat16 __ushort_as_bfloat16(std::uint16_t bits) {
  __nv_bfloat16 found;
  found.bits = bits;
  return found;
}

// To nearest, ties to even; the one NaN that the toolkit makes.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  const std::uint32_t half = 0x7fff + (bits >> 16 & 1);
  return __ushort_as_bfloat16(static_cast<std::uint16_t>(std::isnan(x) ? 0x7fff : (bits + half) >> 16));
}

inline __nv_bfloat16::__nv_bfloat16(float x) : __nv_bfloat16(__float2bfloat16_rn(x)) {}
