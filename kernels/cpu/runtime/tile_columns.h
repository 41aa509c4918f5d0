// Weights with inputs outermost (AWQ, GPTQ) as right tiles: pairs of inputs times sixteen outputs.
//
// Each number is what decode.h computes, rounded once: (code - zero) * scale in float32.
#pragma once

#include "tile_rows.h"

#ifdef QCONV_BF16

namespace qconv {

// AWQ's words hold an output's neighbours in places that a tile's columns cannot follow without a shuffle of every word,
// so columns are permuted and sums put in order when they are done: column j of tile t of 32 outputs is output
// 8 (j % 4) + 2 (j / 4) + t.
inline int awq_output(int tile, int column) { return 8 * (column % 4) + 2 * (column / 4) + tile; }

struct Halves {
  Sums low, high;
};

// 32 sums of outputs in a tile's order, in the weight's.
inline Halves in_order(Layout layout, Halves sums) {
  if (layout != Layout::kAwq) return sums;
  const Ints low = _mm512_setr_epi32(0, 16, 4, 20, 8, 24, 12, 28, 1, 17, 5, 21, 9, 25, 13, 29);
  const Ints high = _mm512_add_epi32(low, _mm512_set1_epi32(2));
  return {_mm512_permutex2var_ps(sums.low, low, sums.high), _mm512_permutex2var_ps(sums.low, high, sums.high)};
}

// Decodes a panel's blocks, for one thread.
class Columns {
 public:
  explicit Columns(const Weight& w) : w_(w), row_of_(w.inputs), table_(kPanel / kBlock * w.groups() * kRow) {
    for (int64_t k = 0; k < w.inputs;) {
      const int64_t end = w.group_index ? k + 1 : std::min(w.inputs, (k / w.group + 1) * w.group);
      const int64_t row = w.group_of(k) * kRow;
      for (; k < end; ++k) row_of_[k] = row;
    }
  }

  // Reads the scales and zero points of outputs [first, last), at most a panel.
  void open(int64_t first, int64_t last) {
    if (first == first_) return;
    first_ = first;
    for (int64_t n = first, at = 0; n < last; n += kBlock) {
      for (int64_t g = 0; g < w_.groups(); ++g, at += kRow) read(n, g, &table_[at]);
    }
  }

  // Of block number `block` in the panel, `steps` steps from input `k`.
  void decode(int64_t block, int64_t k, int64_t steps, uint16_t* out) const {
    const int64_t n = first_ + block * kBlock;
    const float* table = &table_[block * w_.groups() * kRow];
    if (w_.layout == Layout::kAwq) return decode_awq(n, table, k, steps, out);
    if (w_.bits == 4) return decode_gptq<4>(n, table, k, steps, out);
    if (w_.bits == 8) return decode_gptq<8>(n, table, k, steps, out);
    return decode_gptq<2>(n, table, k, steps, out);
  }

 private:
  static constexpr int64_t kRow = 64;          // 32 zero points, 32 scales
  static constexpr float kInteger = 0x1p23f;   // added to a small integer, puts it into a float's lowest bits

  static Sums small_integers(Ints codes, int bits) {
    // (codes & mask) | the bits of kInteger
    const Ints mask = _mm512_set1_epi32((1 << bits) - 1), exponent = _mm512_set1_epi32(int32_t(bits_of(kInteger)));
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(codes, mask, exponent, 0xea));
  }

  static Sums number(Sums code, const float* row) {
    return _mm512_mul_ps(_mm512_sub_ps(code, _mm512_loadu_ps(row)), _mm512_loadu_ps(row + 32));
  }

  static Ints awq_shifts(int tile) {
    int shifts[16];
    for (int j = 0; j < 16; ++j) shifts[j] = kAwqShift[awq_output(tile, j) % 8];
    return load(shifts);
  }

  Ints awq_words(int64_t n, const uint32_t* at) const {
    const __mmask8 there = __mmask8(mask_of((w_.outputs - n) / 8));
    return _mm512_broadcast_i32x4(_mm_maskz_loadu_epi32(there, at));
  }

  void read(int64_t n, int64_t g, float* row) const {
    const int64_t left = w_.outputs - n, at = g * w_.outputs + n;
    Halves scales = {read_floats(w_.scales, w_.scale_dtype, at, mask_of(left)),
                     read_floats(w_.scales, w_.scale_dtype, at + 16, mask_of(left - 16))};
    if (w_.layout == Layout::kAwq) {
      const Ints zeros = awq_words(n, w_.zeros + at / 8);
      for (int t = 0; t < 2; ++t) {
        const Ints order = _mm512_setr_epi32(0, 8, 16, 24, 2, 10, 18, 26, 4, 12, 20, 28, 6, 14, 22, 30);
        const Ints of_tile = _mm512_add_epi32(order, _mm512_set1_epi32(t));
        _mm512_storeu_ps(row + 16 * t, small_integers(_mm512_srlv_epi32(zeros, awq_shifts(t)), 4));
        _mm512_storeu_ps(row + 32 + 16 * t, _mm512_permutex2var_ps(scales.low, of_tile, scales.high));
      }
      return;
    }
    _mm512_storeu_ps(row + 32, scales.low);
    _mm512_storeu_ps(row + 48, scales.high);
    if (w_.zeros && w_.bits == 4 && left >= 32) {
      const Nibbles nibbles(kPlainShift);
      const Sums more = _mm512_set1_ps(kInteger + float(w_.zero_offset));
      _mm512_storeu_ps(row, _mm512_add_ps(nibbles(w_.zeros + at / 8), more));
      _mm512_storeu_ps(row + 16, _mm512_add_ps(nibbles(w_.zeros + at / 8 + 2), more));
    } else {
      float scale[32], zero[32] = {};
      read_group(w_, g, n, std::min(w_.outputs, n + kBlock), scale, zero);
      for (int i = 0; i < 32; ++i) row[i] = zero[i] + kInteger;
    }
  }

  void decode_awq(int64_t n, const float* table, int64_t first, int64_t steps, uint16_t* out) const {
    const Ints shifts[2] = {awq_shifts(0), awq_shifts(1)};
    const int64_t row_words = w_.outputs / 8, last = std::min(w_.inputs, first + steps * kTileInputs);
    const uint32_t* at = static_cast<const uint32_t*>(w_.codes) + first * row_words + n / 8;
    for (int64_t k = first; k < last; k += 2, at += 2 * row_words) {
      _mm_prefetch(reinterpret_cast<const char*>(at + 32 * row_words), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(at + 33 * row_words), _MM_HINT_T0);
      const Ints even = awq_words(n, at), odd = awq_words(n, at + row_words);
      const float *even_row = table + row_of_[k], *odd_row = table + row_of_[k + 1];
      for (int t = 0; t < 2; ++t) {
        const Sums one = number(small_integers(_mm512_srlv_epi32(even, shifts[t]), 4), even_row + 16 * t);
        const Sums two = number(small_integers(_mm512_srlv_epi32(odd, shifts[t]), 4), odd_row + 16 * t);
        _mm512_store_si512(place(out, k - first, t), paired(one, two));
      }
    }
    clear(out, last - first, steps);
  }

  template <int kBits>
  void decode_gptq(int64_t n, const float* table, int64_t first, int64_t steps, uint16_t* out) const {
    constexpr int kPerWord = 32 / kBits;
    const __mmask16 there[2] = {mask_of(w_.outputs - n), mask_of(w_.outputs - n - 16)};
    const int64_t last = std::min(w_.inputs, first + steps * kTileInputs);
    const uint32_t* at = static_cast<const uint32_t*>(w_.codes) + first / kPerWord * w_.outputs + n;
    for (int64_t k = first; k < last; k += kPerWord, at += w_.outputs) {
      _mm_prefetch(reinterpret_cast<const char*>(at + 8 * w_.outputs), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(at + 8 * w_.outputs + 16), _MM_HINT_T0);
      const Ints words[2] = {_mm512_maskz_loadu_epi32(there[0], at), _mm512_maskz_loadu_epi32(there[1], at + 16)};
#pragma GCC unroll 16
      for (int i = 0; i < kPerWord; i += 2) {
        const float *even_row = table + row_of_[k + i], *odd_row = table + row_of_[k + i + 1];
        for (int t = 0; t < 2; ++t) {
          const Sums one = number(small_integers(_mm512_srli_epi32(words[t], kBits * i), kBits), even_row + 16 * t);
          const Sums two = number(small_integers(_mm512_srli_epi32(words[t], kBits * i + kBits), kBits), odd_row + 16 * t);
          _mm512_store_si512(place(out, k + i - first, t), paired(one, two));
        }
      }
    }
    clear(out, last - first, steps);
  }

  // Where the pair of an input and its successor goes.
  static uint16_t* place(uint16_t* out, int64_t input, int tile) {
    return out + input / kTileInputs * kStepStride + tile * kTileElements + input % kTileInputs * kTileRows;
  }

  static void clear(uint16_t* out, int64_t input, int64_t steps) {
    for (; input < steps * kTileInputs; input += 2) {
      for (int t = 0; t < 2; ++t) _mm512_store_si512(place(out, input, t), _mm512_setzero_si512());
    }
  }

  Weight w_;
  int64_t first_ = -1;
  std::vector<int64_t> row_of_;  // of each input, where in a block's table its group's numbers are
  std::vector<float> table_;     // by block
};

}  // namespace qconv

#endif
