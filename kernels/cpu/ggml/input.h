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
template <int N>
float largest_magnitude(const float* values) {
  uint32_t largest = 0;  // the bits of magnitudes are ordered as they are, infinity and then NaN above all
  for (int i = 0; i < N; ++i) largest = std::max(largest, bits_of(values[i]) & 0x7fffffff);
  return float_of(largest);
}

// Consecutive weights as float32.
template <int N>
void widen(const void* stored, Dtype dtype, int64_t first, float* values) {
  const auto widened = [=](auto from) {
    using From = decltype(from);
    const auto* at = static_cast<const typename From::Stored*>(stored) + first;
    for (int i = 0; i < N; ++i) values[i] = From::widened(at[i]);
  };
  switch (dtype) {
    case Dtype::kFloat32: return widened(Float32());
    case Dtype::kFloat16: return widened(Float16());
    case Dtype::kBfloat16: return widened(Bfloat16());
  }
}

// A matrix of weights, [rows, columns], rows one after the other.
struct Matrix {
  const void* stored;
  Dtype dtype;
  int64_t rows, columns;
};

// N consecutive weights of each of kLanes rows, one row a lane; rows beyond the last are zeros. Gives the largest
// magnitude, NaN if one of them is.
template <int N>
float read_lanes(const Matrix& matrix, int64_t row, int64_t column, Floats (&weights)[N]) {
  alignas(64) float values[kLanes][N];
  uint32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (row + lane < matrix.rows) {
      widen<N>(matrix.stored, matrix.dtype, (row + lane) * matrix.columns + column, values[lane]);
      largest = std::max(largest, bits_of(largest_magnitude<N>(values[lane])));
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
