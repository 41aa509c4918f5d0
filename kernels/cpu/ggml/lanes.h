// Vectors whose lanes are independent: lane i belongs to block i of as many blocks, and every operation works on all of
// them alike. Code over lanes reads like code for one block, and its results do not depend on how many lanes there are.
#pragma once

#include <cstdint>
#include <cstring>

namespace qconv {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

constexpr float kHalfMax = 65504.0f;         // the largest finite float16
constexpr float kHalfTiny = 0x1p-24f;        // the smallest positive float16
constexpr float kHalfNormal = 0x1p-14f;      // the smallest with all 11 bits
constexpr float kFloatMax = 0x1.fffffep127f;

inline Floats splat(float value) { return value - Floats{}; }

inline Ints bits_of(Floats v) { return (Ints)v; }
inline Floats floats_of(Ints bits) { return (Floats)bits; }

inline Floats magnitude(Floats v) { return floats_of(bits_of(v) & 0x7fffffff); }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats clamped(Floats v, float low, float high) { return smaller(larger(v, splat(low)), splat(high)); }

// The nearest integer, ties to even, of |v| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
inline Floats rounded(Floats v) { return (v + 0x1.8p23f) - 0x1.8p23f; }

// The nearest integer within bounds that are integers themselves; v may be of any size.
inline Floats rounded_within(Floats v, float low, float high) { return rounded(clamped(v, low, high)); }

// 1 / v, and 0 where that is not finite.
inline Floats reciprocal(Floats v) {
  const Floats inverse = 1.0f / v;
  return magnitude(inverse) <= kFloatMax ? inverse : Floats{};
}

// 1 / (product - subtrahend), and 0 where the difference is rounding noise of the product.
inline Floats inverse_determinant(Floats product, Floats subtrahend) {
  const Floats share = 1.0f - subtrahend * reciprocal(product);
  return reciprocal((share > 1e-5f ? share : splat(__builtin_inff())) * product);
}

// The nearest finite float16 numbers.
inline Floats as_half(Floats v) {
  const Ints sign = bits_of(v) & INT32_MIN;
  const Floats size = smaller(magnitude(v), splat(kHalfMax));
  const Ints bits = bits_of(size);
  const Floats normal = floats_of((bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fff);
  const Floats subnormal = (size + 0.75f) - 0.75f;  // whose last bit is worth 2^-24
  return floats_of(bits_of(size < kHalfNormal ? subnormal : normal) | sign);
}

// As float16, and not 0 unless it is: small integers can still use the smallest float16 there is.
inline Floats storable(Floats v) {
  const Floats half = as_half(v);
  const Floats tiny = floats_of(bits_of(splat(kHalfTiny)) | (bits_of(v) & INT32_MIN));
  return half == 0.0f ? (v == 0.0f ? Floats{} : tiny) : half;
}

// The 16 bits of numbers that are float16.
inline Ints half_bits(Floats v) {
  const Ints bits = bits_of(v), size = bits & 0x7fffffff;
  const Ints subnormal = __builtin_convertvector(magnitude(v) * 0x1p24f, Ints);
  const Ints coded = magnitude(v) < kHalfNormal ? subnormal : (size >> 13) - (112 << 10);
  return coded | ((bits >> 16) & 0x8000);
}

// Of integers from 0 to 255; negative ones are taken modulo 256.
inline Bytes bytes_of(Ints v) { return __builtin_convertvector(v & 255, Bytes); }
inline Bytes bytes_of(Floats v) { return bytes_of(__builtin_convertvector(v, Ints)); }

}  // namespace qconv
