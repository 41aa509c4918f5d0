// Weights of any float type as float32.
#pragma once

#include <algorithm>

#include "lanes.h"

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

// The largest magnitude; NaN if one of them is.
inline float largest_magnitude(const float* values, int count) {
  uint32_t largest = 0;  // the bits of magnitudes are ordered as they are, infinity and then NaN above all
  for (int i = 0; i < count; ++i) largest = std::max(largest, bits_of(values[i]) & 0x7fffffff);
  return float_of(largest);
}

// Calls a function with one of the types above.
template <class Function>
auto with_dtype(Dtype dtype, Function function) {
  switch (dtype) {
    case Dtype::kFloat16: return function(Float16());
    case Dtype::kBfloat16: return function(Bfloat16());
    default: return function(Float32());
  }
}

// Consecutive weights as float32.
template <class From>
void widen(From, const void* stored, int64_t first, int count, float* values) {
  const auto* at = static_cast<const typename From::Stored*>(stored) + first;
  for (int i = 0; i < count; ++i) values[i] = From::widened(at[i]);
}

// A matrix of weights, [rows, columns], rows one after the other.
struct Matrix {
  const void* stored;
  Dtype dtype;
  int64_t rows, columns;
};

// N consecutive weights of each of kLanes rows, one row a lane; rows beyond the last are zeros. Gives the largest
// magnitude, NaN if one of them is.
template <int N, class From>
float read_lanes(From from, const Matrix& matrix, int64_t row, int64_t column, Floats (&weights)[N]) {
  alignas(64) float values[kLanes][N];
  uint32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (row + lane < matrix.rows) {
      widen(from, matrix.stored, (row + lane) * matrix.columns + column, N, values[lane]);
      largest = std::max(largest, bits_of(largest_magnitude(values[lane], N)));
    } else {
      std::fill_n(values[lane], N, 0.0f);
    }
  }
  for (int i = 0; i < N; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) weights[i][lane] = values[lane][i];
  }
  return float_of(largest);
}

}  // namespace qconv
