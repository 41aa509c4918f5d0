// Matrices of weights of any float type.
#pragma once

#include <algorithm>

#include "../numbers.h"
#include "lanes.h"

namespace qconv {

// The largest magnitude; NaN if one of them is.
inline float largest_magnitude(const float* values, int count) {
  uint32_t largest = 0;  // the bits of magnitudes are ordered as they are, infinity and then NaN above all
  for (int i = 0; i < count; ++i) largest = std::max(largest, bits_of(values[i]) & 0x7fffffff);
  return float_of(largest);
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
