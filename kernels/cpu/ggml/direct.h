// The types whose formula leaves nothing to search: qconv/grids/ggml/direct.py, one block after the other.
//
// A type has kElements and kBytes of a block and a function that encodes finite weights.
#pragma once

#include <cmath>

#include "input.h"

namespace qconv {

// The nearest finite float16's bits.
inline uint16_t half_bits(float value) {
  const uint32_t bits = bits_of(value), size = bits & 0x7fffffff;
  const uint32_t normal = ((size + 0xfff + ((size >> 13) & 1)) >> 13) - (112 << 10);
  const uint32_t subnormal = bits_of(float_of(size) + 0.5f) & 0x7fff;  // whose last bit is worth 2^-24
  const uint32_t coded = float_of(size) < kHalfNormal ? subnormal : std::min(normal, 0x7bffu);
  return uint16_t(coded | ((bits >> 16) & 0x8000));
}

inline float reciprocal(float value) {
  const float inverse = 1.0f / value;
  return std::fabs(inverse) <= kFloatMax ? inverse : 0.0f;
}

inline void store_half(float value, uint8_t* out) {
  const uint16_t bits = half_bits(value);
  std::memcpy(out, &bits, 2);
}

// Elements i and i + 16 in one byte. In vectors of that size, since compilers go astray over bytes otherwise.
inline void store_nibbles(const uint8_t* codes, uint8_t* out) {
  typedef uint8_t Half __attribute__((vector_size(16)));
  Half low, high;
  std::memcpy(&low, codes, 16);
  std::memcpy(&high, codes + 16, 16);
  low = (low & 15) | (high << 4);
  std::memcpy(out, &low, 16);
}

// Bit 4 of each code as a little-endian word.
inline void store_fifth_bits(const uint8_t* codes, uint8_t* out) {
  for (int i = 0; i < 4; ++i) {
    uint64_t eight;
    std::memcpy(&eight, codes + 8 * i, 8);
    // The product moves the bit of byte i to bit 56 + i.
    out[i] = uint8_t(((eight >> 4 & 0x0101010101010101) * 0x0102040810204080) >> 56);
  }
}

struct Range {
  float low, high;
};

inline Range range_of(const float* x) {
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int i = 0; i < 32; ++i) {
    low = std::min(low, ordered(x[i]));
    high = std::max(high, ordered(x[i]));
  }
  return {unordered(low), unordered(high)};
}

// The element of the largest magnitude, with its sign, the first of equals; 0 is positive.
inline float signed_maximum(const float* x) {
  const Range range = range_of(x);
  if (range.high == -range.low) {
    const float largest = range.high;
    return *std::find_if(x, x + 32, [=](float value) { return std::fabs(value) == largest; }) + 0.0f;
  }
  return range.high > -range.low ? range.high : range.low;
}

// floor(log2(value)) of a positive number as the float32 function of a good library gives it: just below a power of two
// the logarithm is rounded up to it. Numbers that are not normal count as 2^-127.
inline int floor_log2(float value) {
  const uint32_t bits = bits_of(value), fraction = bits & 0x7fffff;
  if (fraction > 0x7fff00) return int(std::floor(float(std::log2(double(value)))));
  return int(bits >> 23) - 127;
}

struct Q8_0Block {
  static constexpr int kElements = 32, kBytes = 34;

  static void encode(const float* x, uint8_t* out) {
    const float scale = largest_magnitude(x, 32) / 127.0f, inverse = reciprocal(scale);
    store_half(scale, out);
    for (int i = 0; i < 32; ++i) {
      // Truncating after adding the number before a half rounds like C's roundf.
      const float code = x[i] * inverse;
      out[2 + i] = uint8_t(int32_t(code + std::copysign(0x1.fffffep-2f, code)));
    }
  }
};

// Codes floor(x / d + middle + 0.5) with d = x_max / -middle.
template <int Middle>
void symmetric_codes(const float* x, uint8_t* scale_out, uint8_t* codes) {
  const float scale = signed_maximum(x) / -float(Middle), inverse = reciprocal(scale);
  store_half(scale, scale_out);
  for (int i = 0; i < 32; ++i) {
    codes[i] = uint8_t(int32_t(std::min(x[i] * inverse + (Middle + 0.5f), 2.0f * Middle - 1.0f)));
  }
}

// Codes floor((x - min) / d + 0.5) with d = (max - min) / levels; d and min are stored.
template <int Levels>
void affine_codes(const float* x, uint8_t* scales_out, uint8_t* codes) {
  auto [low, high] = range_of(x);
  if (low == 0.0f) low = *std::find(x, x + 32, 0.0f);  // its sign is stored: that of the first zero
  const float scale = (high - low) / float(Levels), inverse = reciprocal(scale);
  store_half(scale, scales_out);
  store_half(low, scales_out + 2);
  for (int i = 0; i < 32; ++i) {
    codes[i] = uint8_t(int32_t(std::min((x[i] - low) * inverse + 0.5f, float(Levels))));
  }
}

struct Q4_0Block {
  static constexpr int kElements = 32, kBytes = 18;

  static void encode(const float* x, uint8_t* out) {
    uint8_t codes[32];
    symmetric_codes<8>(x, out, codes);
    store_nibbles(codes, out + 2);
  }
};

struct Q5_0Block {
  static constexpr int kElements = 32, kBytes = 22;

  static void encode(const float* x, uint8_t* out) {
    uint8_t codes[32];
    symmetric_codes<16>(x, out, codes);
    store_fifth_bits(codes, out + 2);
    store_nibbles(codes, out + 6);
  }
};

struct Q4_1Block {
  static constexpr int kElements = 32, kBytes = 20;

  static void encode(const float* x, uint8_t* out) {
    uint8_t codes[32];
    affine_codes<15>(x, out, codes);
    store_nibbles(codes, out + 4);
  }
};

struct Q5_1Block {
  static constexpr int kElements = 32, kBytes = 24;

  static void encode(const float* x, uint8_t* out) {
    uint8_t codes[32];
    affine_codes<31>(x, out, codes);
    store_fifth_bits(codes, out + 4);
    store_nibbles(codes, out + 8);
  }
};

// A power of two for the block; of each weight its sign and the nearest of eight magnitudes (ties: the smaller).
struct Mxfp4Block {
  static constexpr int kElements = 32, kBytes = 17;

  static void encode(const float* x, uint8_t* out) {
    const int exponent = std::max(0, floor_log2(largest_magnitude(x, 32)) + 125);
    out[0] = uint8_t(exponent);
    const float inverse = float_of(uint32_t(129 + 127 - std::max(exponent, 2)) << 23);
    uint8_t codes[32];
    for (int i = 0; i < 32; ++i) {
      // The boundaries between doubled magnitudes (0, 1, 2, 3, 4, 6, 8, 12), in half steps.
      const float half_steps = std::fabs(x[i] * inverse);
      const int code = (half_steps > 1.0f) + (half_steps > 3.0f) + (half_steps > 5.0f) + (half_steps > 7.0f) +
                       (half_steps > 10.0f) + (half_steps > 14.0f) + (half_steps > 20.0f);
      codes[i] = uint8_t(code | (code > 0 && x[i] < 0.0f ? 8 : 0));
    }
    store_nibbles(codes, out + 1);
  }
};

// The types that are numbers: Stored is one, as the bits of `encoded`.
struct F32 {
  using Stored = uint32_t;
  static Stored encoded(float value) { return bits_of(value); }
};

struct F16 {
  using Stored = uint16_t;
  static Stored encoded(float value) { return half_bits(value); }
};

// The nearest, ties to even.
struct BF16 {
  using Stored = uint16_t;
  static Stored encoded(float value) {
    const uint32_t bits = bits_of(value);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

}  // namespace qconv
