// Numbers in the dtypes that files have, as float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace qconv {

enum class Dtype : int32_t { kFloat32, kFloat16, kBfloat16 };

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Integers in the order of floats, which compilers find the extremes of without being allowed to reorder sums.
inline int32_t ordered(float value) {
  const int32_t bits = int32_t(bits_of(value));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline float unordered(int32_t key) { return float_of(uint32_t(key ^ ((key >> 31) & 0x7fffffff))); }

struct Float32 {
  using Stored = float;
  static float widened(Stored v) { return v; }
};

struct Float16 {
  using Stored = uint16_t;
  static float widened(Stored v) {
    const uint32_t size = uint32_t(v & 0x7fff) << 13, sign = uint32_t(v & 0x8000) << 16;
    const uint32_t not_finite = (v & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    return float_of(bits_of(float_of(size) * 0x1p112f) | not_finite | sign);  // the product is right for subnormals too
  }
};

struct Bfloat16 {
  using Stored = uint16_t;
  static float widened(Stored v) { return float_of(uint32_t(v) << 16); }
};

// Calls a function with one of the types above.
template <class Function>
auto with_dtype(Dtype dtype, Function function) {
  switch (dtype) {
    case Dtype::kFloat16: return function(Float16());
    case Dtype::kBfloat16: return function(Bfloat16());
    default: return function(Float32());
  }
}

// Consecutive numbers as float32.
template <class From>
void widen(From, const void* stored, int64_t first, int64_t count, float* values) {
  const auto* at = static_cast<const typename From::Stored*>(stored) + first;
  for (int64_t i = 0; i < count; ++i) values[i] = From::widened(at[i]);
}

}  // namespace qconv
