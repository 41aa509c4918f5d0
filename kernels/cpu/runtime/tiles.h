// Tiles of bfloat16 numbers and their products, by the processor's matrix unit (AMX) or by AVX-512.
//
// A product takes a left tile, 16 rows of 32 inputs, and a right one, 16 pairs of inputs times 16 columns times the two
// inputs of a pair: that is the order in which both instructions want them. Either holds weights and the other
// activations: weights are made into whichever their layout is nearer to: see tile_rows.h and tile_columns.h.
#pragma once

#include "product_bf16.h"

#ifdef QCONV_BF16

#include <sys/syscall.h>
#include <unistd.h>

#include "buffers.h"

namespace qconv {

enum class Units : int32_t { kNone, kAvx512, kAmx };

constexpr int kTileRows = 16, kTileInputs = 32, kTileElements = kTileRows * kTileInputs;
constexpr int kSums = kTileRows * kTileRows;  // float32 sums of a product

// What this process may use; of AMX, Linux keeps the registers only for those who asked.
inline Units units() {
#if defined(__AMX_BF16__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  if (granted) return Units::kAmx;
#endif
  return Units::kAvx512;
}

// While it lives, the thread's tile registers are set up, where they are used.
class TileRegisters {
 public:
  explicit TileRegisters(Units units) : used_(units == Units::kAmx) {
#ifdef __AMX_BF16__
    if (!used_) return;
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    static_assert(sizeof configuration == 64);
    _tile_loadconfig(&configuration);
#endif
  }
  TileRegisters(const TileRegisters&) = delete;
  ~TileRegisters() {
#ifdef __AMX_BF16__
    if (used_) _tile_release();
#endif
  }

 private:
  bool used_;
};

// Two tiles of weights times one or two of activations, step by step along the inputs, onto `sums` or, where not
// `more`, in their place.
struct Step {
  const uint16_t* weights;  // by step two tiles
  const uint16_t* x[2];     // by step one tile each; the second null: there is none
  int64_t steps;
  float* sums[2];           // of each x, two tiles of sums
  bool more;
};

#ifdef __AMX_BF16__
template <bool kWeightsLeft>
void multiply_amx(const Step& s) {
  constexpr int kRow = 64;
  const bool both = s.x[1];
  if (s.more) {
    _tile_loadd(0, s.sums[0], kRow);
    _tile_loadd(1, s.sums[0] + kSums, kRow);
    if (both) {
      _tile_loadd(2, s.sums[1], kRow);
      _tile_loadd(3, s.sums[1] + kSums, kRow);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < s.steps; ++i) {
    _tile_loadd(4, s.weights + 2 * i * kTileElements, kRow);
    _tile_loadd(5, s.weights + (2 * i + 1) * kTileElements, kRow);
    _tile_loadd(6, s.x[0] + i * kTileElements, kRow);
    if constexpr (kWeightsLeft) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
    } else {
      _tile_dpbf16ps(0, 6, 4);
      _tile_dpbf16ps(1, 6, 5);
    }
    if (!both) continue;
    _tile_loadd(7, s.x[1] + i * kTileElements, kRow);
    if constexpr (kWeightsLeft) {
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_dpbf16ps(2, 7, 4);
      _tile_dpbf16ps(3, 7, 5);
    }
  }
  _tile_stored(0, s.sums[0], kRow);
  _tile_stored(1, s.sums[0] + kSums, kRow);
  if (both) {
    _tile_stored(2, s.sums[1], kRow);
    _tile_stored(3, s.sums[1] + kSums, kRow);
  }
}
#endif

// One tile's sums, in sixteen registers; strides are of elements from step to step.
inline void multiply_avx512(const uint16_t* left, int64_t left_stride, const uint16_t* right, int64_t right_stride,
                            int64_t steps, float* sums, bool more) {
  Sums row[kTileRows];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) row[i] = more ? _mm512_load_ps(sums + 16 * i) : _mm512_setzero_ps();
  for (int64_t s = 0; s < steps; ++s, left += left_stride, right += right_stride) {
    for (int pair = 0; pair < 16; ++pair) {
      const Ints columns = load(right + 32 * pair);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        int32_t two;
        std::memcpy(&two, left + 32 * i + 2 * pair, sizeof two);
        row[i] = add_products(row[i], _mm512_set1_epi32(two), columns);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) _mm512_store_ps(sums + 16 * i, row[i]);
}

template <bool kWeightsLeft>
void multiply(Units units, const Step& s) {
#ifdef __AMX_BF16__
  if (units == Units::kAmx) return multiply_amx<kWeightsLeft>(s);
#endif
  for (int j = 0; j < 2 && s.x[j]; ++j) {
    for (int t = 0; t < 2; ++t) {
      const uint16_t* weights = s.weights + t * kTileElements;
      float* sums = s.sums[j] + t * kSums;
      if constexpr (kWeightsLeft) {
        multiply_avx512(weights, 2 * kTileElements, s.x[j], kTileElements, s.steps, sums, s.more);
      } else {
        multiply_avx512(s.x[j], kTileElements, weights, 2 * kTileElements, s.steps, sums, s.more);
      }
    }
  }
}

// Sixteen rows of sixteen 32-bit elements; the rows become the columns.
inline void transpose(Ints (&rows)[16]) {
  Ints t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // now a quarter q of rows[i + j] holds column 4 q + j of rows i to i + 3
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const Ints first = _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0x44);
    const Ints second = _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0xee);
    const Ints third = _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0x44);
    const Ints fourth = _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0xee);
    t[j] = _mm512_shuffle_i32x4(first, third, 0x88);
    t[j + 4] = _mm512_shuffle_i32x4(first, third, 0xdd);
    t[j + 8] = _mm512_shuffle_i32x4(second, fourth, 0x88);
    t[j + 12] = _mm512_shuffle_i32x4(second, fourth, 0xdd);
  }
  for (int i = 0; i < 16; ++i) rows[i] = t[i];
}

// Two vectors rounded to bfloat16, behind each other.
inline Ints rounded(Sums first, Sums second) { return Ints(_mm512_cvtne2ps_pbh(second, first)); }

// Two vectors rounded to bfloat16, their elements in turns: a row of a right tile.
inline Ints paired(Sums even, Sums odd) {
  const Ints turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                      20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(turns, rounded(even, odd));
}

}  // namespace qconv

#endif
