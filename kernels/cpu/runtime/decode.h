// Any weight as numbers: for every processor, and the definition of what the faster code in product.h computes.
//
// A run is a stretch of numbers that lie behind each other in the layout: of an output's row, or, where the layout has
// inputs outermost (AWQ, GPTQ), of an input's column of outputs.
#pragma once

#include "blocks.h"
#include "weight.h"
#include "widen.h"

namespace qconv {

inline bool inputs_outermost(Layout layout) { return layout == Layout::kAwq || layout == Layout::kGptq; }

// Scales and zero points of one group for a range of outputs; AWQ and GPTQ.
inline void read_group(const Weight& w, int64_t group, int64_t first, int64_t last, float* scale, float* zero) {
  for (int64_t n = first; n < last; ++n) scale[n - first] = read_float(w.scales, w.scale_dtype, group * w.outputs + n);
  for (int64_t n = first; n < last; ++n) {
    if (!w.zeros) {
      zero[n - first] = w.middle();
    } else if (w.layout == Layout::kAwq) {
      zero[n - first] = float((w.zeros[(group * w.outputs + n) / 8] >> kAwqShift[n % 8]) & 15);
    } else {
      const int64_t bit = n * w.bits;
      const uint32_t stored = w.zeros[(group * w.outputs * w.bits + bit) / 32] >> (bit % 32);
      zero[n - first] = float((stored & ((1u << w.bits) - 1)) + w.zero_offset);
    }
  }
}

// The weights of one input for outputs [first, last); AWQ and GPTQ. `first` is a multiple of 8.
inline void decode_input(const Weight& w, int64_t k, int64_t first, int64_t last, const float* scale, const float* zero,
                         float* out) {
  if (w.layout == Layout::kAwq) {
    const uint32_t* words = static_cast<const uint32_t*>(w.codes) + (k * w.outputs + first) / 8;
    return widen_nibbles(kAwqShift, words, last - first, zero, scale, out);
  }
  const int per_word = 32 / w.bits, shift = int(k % per_word) * w.bits;
  const uint32_t* words = static_cast<const uint32_t*>(w.codes) + k / per_word * w.outputs + first;
  const uint32_t mask = (1u << w.bits) - 1;
  for (int64_t n = 0; n < last - first; ++n) {
    out[n] = (float(int32_t((words[n] >> shift) & mask)) - zero[n]) * scale[n];
  }
}

inline float row_zero(const Weight& w, int64_t n, int64_t group) {
  if (!w.zeros) return w.middle();
  const int64_t bit = n * w.bits;
  return float((w.zeros[bit / 32 * w.groups() + group] >> (bit % 32)) & ((1u << w.bits) - 1));
}

// One output's weights for inputs [first, last); layouts with outputs outermost. Both are multiples of 256, or `last` is
// all inputs.
inline void decode_row(const Weight& w, int64_t n, int64_t first, int64_t last, float* out) {
  switch (w.layout) {
    case Layout::kRows: {
      const auto* words = static_cast<const uint32_t*>(w.codes) + n * w.inputs * w.bits / 32;
      const auto* bytes = reinterpret_cast<const uint8_t*>(words);
      for (int64_t k = first, end; k < last; k = end) {
        const int64_t g = k / w.group;
        end = std::min(last, (g + 1) * w.group);
        const float scale = read_float(w.scales, w.scale_dtype, n * w.groups() + g), zero = row_zero(w, n, g);
        if (w.bits == 4) {
          widen_nibbles(kPlainShift, words + k / 8, end - k, zero, scale, out + k - first);
        } else {
          for (int64_t i = k; i < end; ++i) out[i - first] = (float(int32_t(bytes[i])) - zero) * scale;
        }
      }
      return;
    }
    case Layout::kE4m3: {
      const auto* bytes = static_cast<const uint8_t*>(w.codes) + n * w.inputs;
      for (int64_t k = first, end; k < last; k = end) {
        const int64_t g = k / w.group;
        end = std::min(last, (g + 1) * w.group);
        const float scale = read_float(w.scales, w.scale_dtype, n / w.block_rows * w.groups() + g);
        for (int64_t i = k; i < end; ++i) out[i - first] = of_e4m3(bytes[i]) * scale;
      }
      return;
    }
    default: {
      with_block_type(w.layout, [&](auto type) {
        using Type = decltype(type);
        const auto* row = static_cast<const uint8_t*>(w.codes) + n * (w.inputs / Type::kElements) * Type::kBytes;
        const auto* at = row + first / Type::kElements * Type::kBytes;
        for (int64_t k = first; k < last; k += Type::kElements, at += Type::kBytes) Type::decode(at, out + k - first);
      });
    }
  }
}

inline void decode_row(const Weight& w, int64_t n, float* out) { decode_row(w, n, 0, w.inputs, out); }

}  // namespace qconv
