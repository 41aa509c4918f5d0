// float16 and bfloat16 as bits, two to a word; every operation is rounded once, to nearest even.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint32_t u32;
typedef unsigned long long u64;

namespace emu {

inline u32 bits_of(float value) {
  u32 bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(u32 bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Rounds to float so that rounding once more, to 16 bits, gives what rounding directly would: an inexact result is
// truncated and its last bit set (round to odd).
inline float narrow(double value) {
  const float nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || std::isnan(nearest) || std::isinf(nearest)) return nearest;
  const u32 bits = bits_of(nearest) - (std::fabs(static_cast<double>(nearest)) > std::fabs(value));
  return float_of(bits | 1);
}

struct Half {
  static float load(u32 bits) { return _cvtsh_ss(static_cast<uint16_t>(bits)); }
  static u32 store(float value) { return _cvtss_sh(value, 0); }
};

struct Bfloat {
  static float load(u32 bits) { return float_of(bits << 16); }
  static u32 store(float value) {
    if (std::isnan(value)) return 0x7FFF;
    const u32 bits = bits_of(value);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  }
};

template <class Number>
u32 fma_pair(u32 a, u32 b, u32 c) {
  u32 result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const double product = static_cast<double>(Number::load(a >> shift & 0xFFFF)) * Number::load(b >> shift & 0xFFFF);
    result |= Number::store(narrow(product + Number::load(c >> shift & 0xFFFF))) << shift;
  }
  return result;
}

template <class Number>
u32 pack_pair(float low, float high) {
  return Number::store(low) | Number::store(high) << 16;
}

}  // namespace emu
