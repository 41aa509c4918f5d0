// Products with a few rows of activations, in float32 on every processor.
#pragma once

#include <vector>

#include "decode.h"

namespace qconv {

constexpr int64_t kTile = 128;  // outputs of a part; a multiple of what a packed word holds

// A sum in sixteen parts, which compilers turn into vector instructions without reordering anything.
inline float dot(const float* a, const float* b, int64_t count) {
  float parts[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int j = 0; j < 16; ++j) parts[j] += a[i + j] * b[i + j];
  }
  for (; i < count; ++i) parts[0] += a[i] * b[i];
  float sum = 0.0f;
  for (int j = 0; j < 16; ++j) sum += parts[j];
  return sum;
}

// y[m, n] for outputs [first, last); x is [rows, inputs], y is [rows, outputs].
inline void product_float(const Weight& w, const float* x, int64_t rows, float* y, int64_t first, int64_t last) {
  if (!inputs_outermost(w.layout)) {
    std::vector<float> row(w.inputs);
    for (int64_t n = first; n < last; ++n) {
      decode_row(w, n, row.data());
      for (int64_t m = 0; m < rows; ++m) y[m * w.outputs + n] = dot(row.data(), x + m * w.inputs, w.inputs);
    }
    return;
  }
  float scale[kTile], zero[kTile], weights[kTile];
  for (int64_t n = first; n < last; n += kTile) {
    const int64_t end = std::min(n + kTile, last);
    for (int64_t m = 0; m < rows; ++m) std::fill(y + m * w.outputs + n, y + m * w.outputs + end, 0.0f);
    int64_t group = -1;
    for (int64_t k = 0; k < w.inputs; ++k) {
      if (w.group_of(k) != group) read_group(w, group = w.group_of(k), n, end, scale, zero);
      decode_input(w, k, n, end, scale, zero, weights);
      for (int64_t m = 0; m < rows; ++m) {
        const float factor = x[m * w.inputs + k];
        float* sums = y + m * w.outputs + n;
        for (int64_t i = 0; i < end - n; ++i) sums[i] += factor * weights[i];
      }
    }
  }
}

}  // namespace qconv
