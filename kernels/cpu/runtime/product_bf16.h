// Products with bfloat16 activations where the processor has AVX-512 BF16.
//
// A code is looked up as a bfloat16 number, which is exact for all codes; pairs of products are summed in float32, and
// scales follow per group. So only the order of the sums differs from the float32 product.
#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    defined(__AVX512VBMI__)
#define QCONV_BF16 1
#include <immintrin.h>

#include <vector>

#include "decode.h"
#include "product.h"

namespace qconv {

using Ints = __m512i;
using Sums = __m512;

inline Sums add_products(Sums sums, Ints weights, Ints x) {
  return _mm512_dpbf16_ps(sums, __m512bh(weights), __m512bh(x));
}

inline Ints load(const void* at) { return _mm512_loadu_si512(at); }

// 32 numbers as bfloat16, looked up by the low five bits of each 16-bit lane.
template <class Value>
Ints table(const Value& value) {
  uint16_t entries[32];
  for (int i = 0; i < 32; ++i) entries[i] = to_bfloat(value(i));
  return load(entries);
}

inline Ints look_up(Ints table, Ints codes) { return _mm512_permutexvar_epi16(codes, table); }

inline Sums read_floats(const void* at, Dtype dtype, int64_t index, __mmask16 there) {
  if (dtype == Dtype::kFloat32) return _mm512_maskz_loadu_ps(there, static_cast<const float*>(at) + index);
  const __m256i halves = _mm256_maskz_loadu_epi16(there, static_cast<const uint16_t*>(at) + index);
  if (dtype == Dtype::kFloat16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline __mmask16 mask_of(int64_t count) { return __mmask16((1u << std::clamp<int64_t>(count, 0, 16)) - 1); }

// Two inputs of one group, of GPTQ with act-order.
struct Pair {
  int64_t at[2];      // where each one's words begin
  int32_t rotate[2];  // what brings its code to a lane's first bits, and to its seventeenth
  uint16_t x[2];
};

// Activations as a layout's product wants them, made once for a row.
struct Activations {
  const uint16_t* x;
  std::vector<Pair> pairs;         // of each group in turn
  std::vector<int64_t> pairs_end;  // by group
  std::vector<uint16_t> arranged;
  std::vector<float> sums;  // of each group, for zero points
  std::vector<float> sums_of_32;

  Activations(const Weight& w, const uint16_t* row) : x(row) {
    if (w.group_index) {
      pair_up(w);
    } else if (w.layout == Layout::kRows || w.layout == Layout::kGptq) {
      arranged.resize(w.inputs);
      for (int64_t k = 0; k < w.inputs; ++k) {
        // Rows: of 128 inputs the first of each four, the second ...: a 16-bit lane holds four codes.
        // GPTQ: of eight inputs 0, 4, 1, 5, 2, 6, 3, 7: a word's halves hold four codes each.
        const int64_t to = w.layout == Layout::kRows ? k / 128 * 128 + k % 4 * 32 + k % 128 / 4
                                                     : k / 8 * 8 + k % 4 * 2 + k % 8 / 4;
        arranged[to] = row[k];
      }
    }
    sums.assign(w.groups(), 0.0f);
    for (int64_t k = 0; k < w.inputs; ++k) sums[w.group_of(k)] += of_bfloat(row[k]);
    if (w.layout == Layout::kQ4_K || w.layout == Layout::kQ5_K) {
      sums_of_32.assign(w.inputs / 32, 0.0f);
      for (int64_t k = 0; k < w.inputs; ++k) sums_of_32[k / 32] += of_bfloat(row[k]);
    }
  }

 private:
  void pair_up(const Weight& w) {
    std::vector<int32_t> next(w.groups() + 1), ordered(w.inputs);
    for (int64_t k = 0; k < w.inputs; ++k) ++next[w.group_index[k] + 1];
    for (int64_t g = 0; g < w.groups(); ++g) next[g + 1] += next[g];
    for (int64_t k = 0; k < w.inputs; ++k) ordered[next[w.group_index[k]]++] = int32_t(k);
    pairs.reserve(w.inputs / 2 + w.groups());
    for (int64_t g = 0, i = 0; g < w.groups(); ++g) {
      for (; i < next[g]; i += 2) {
        const bool both = i + 1 < next[g];
        const int64_t one = ordered[i], two = ordered[i + both];
        pairs.push_back({{one / 8 * w.outputs, two / 8 * w.outputs},
                         {int32_t(4 * (one % 8)), int32_t(4 * (two % 8) + 16) % 32},
                         {x[one], both ? x[two] : uint16_t(0)}});
      }
      i = next[g];
      pairs_end.push_back(int64_t(pairs.size()));
    }
  }
};

inline bool has_bf16_product(const Weight& w) {
  switch (w.layout) {
    case Layout::kAwq: return w.inputs % 2 == 0 && w.group % 2 == 0;
    case Layout::kGptq: return w.bits == 4 && (w.group_index || w.group % 8 == 0);
    case Layout::kRows: return w.bits == 4 && w.inputs % 128 == 0 && (w.group % 128 == 0 || 128 % w.group == 0) &&
                               w.group >= 32;
    case Layout::kE4m3: return w.inputs % 32 == 0 && w.group % 32 == 0;
    default: return true;
  }
}

// Words [inputs, outputs/8]. Two inputs' words make one of pairs, so that a lane pair holds one output's two codes.
inline void product_awq(const Weight& w, const Activations& a, float* y, int64_t first, int64_t last) {
  const Ints codes = table([](int i) { return float(i & 15); });
  const auto* words = static_cast<const uint32_t*>(w.codes);
  const int64_t row_words = w.outputs / 8;
  const Ints low_half = _mm512_set1_epi32(0xffff);
  // Where among sums by nibble and word those of sixteen outputs are.
  const Ints order = _mm512_setr_epi32(0, 64, 16, 80, 32, 96, 48, 112, 1, 65, 17, 81, 33, 97, 49, 113);
  for (int64_t n = first; n < last; n += 128) {
    const int64_t end = std::min(n + 128, last);
    const __mmask16 there = __mmask16((1u << ((end - n) / 8)) - 1);
    std::fill(y + n, y + end, 0.0f);
    for (int64_t g = 0; g < w.groups(); ++g) {
      Sums sums[8] = {};
      for (int64_t k = g * w.group; k < (g + 1) * w.group; k += 2) {
        const uint32_t* at = words + k * row_words + n / 8;
        _mm_prefetch(reinterpret_cast<const char*>(at + 16 * row_words), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(at + 17 * row_words), _MM_HINT_T0);
        const Ints one = _mm512_maskz_loadu_epi32(there, at), two = _mm512_maskz_loadu_epi32(there, at + row_words);
        const Ints low = _mm512_ternarylogic_epi32(low_half, one, _mm512_slli_epi32(two, 16), 0xca);
        const Ints high = _mm512_ternarylogic_epi32(low_half, _mm512_srli_epi32(one, 16), two, 0xca);
        int32_t pair;
        std::memcpy(&pair, a.x + k, sizeof pair);
        const Ints x = _mm512_set1_epi32(pair);
        sums[0] = add_products(sums[0], look_up(codes, low), x);
        sums[1] = add_products(sums[1], look_up(codes, _mm512_srli_epi16(low, 4)), x);
        sums[2] = add_products(sums[2], look_up(codes, _mm512_srli_epi16(low, 8)), x);
        sums[3] = add_products(sums[3], look_up(codes, _mm512_srli_epi16(low, 12)), x);
        sums[4] = add_products(sums[4], look_up(codes, high), x);
        sums[5] = add_products(sums[5], look_up(codes, _mm512_srli_epi16(high, 4)), x);
        sums[6] = add_products(sums[6], look_up(codes, _mm512_srli_epi16(high, 8)), x);
        sums[7] = add_products(sums[7], look_up(codes, _mm512_srli_epi16(high, 12)), x);
      }
      alignas(64) float by_nibble[8][16];
      const Sums total = _mm512_set1_ps(a.sums[g]);
      const Ints zeros = _mm512_maskz_loadu_epi32(there, w.zeros + g * row_words + n / 8);
      for (int i = 0; i < 8; ++i) {
        const Ints zero = _mm512_and_si512(_mm512_srlv_epi32(zeros, _mm512_set1_epi32(4 * i)), _mm512_set1_epi32(15));
        _mm512_store_ps(by_nibble[i], _mm512_fnmadd_ps(_mm512_cvtepi32_ps(zero), total, sums[i]));
      }
      for (int64_t c = n; c < end; c += 16) {
        const __mmask16 outputs = mask_of(end - c);
        const Sums its = _mm512_i32gather_ps(_mm512_add_epi32(order, _mm512_set1_epi32(int(c - n) / 8)), by_nibble, 4);
        const Sums scale = read_floats(w.scales, w.scale_dtype, g * w.outputs + c, outputs);
        const Sums before = _mm512_maskz_loadu_ps(outputs, y + c);
        _mm512_mask_storeu_ps(y + c, outputs, _mm512_fmadd_ps(scale, its, before));
      }
    }
  }
}

// Sums of one group for 64 outputs, word by word of eight inputs.
inline void add_words(const Weight& w, const Activations& a, int64_t g, int64_t n, const __mmask16 (&there)[4],
                      Ints codes, Sums (&sums)[4]) {
  const auto* words = static_cast<const uint32_t*>(w.codes);
  for (int64_t k = g * w.group; k < (g + 1) * w.group; k += 8) {
    int32_t pairs[4];
    std::memcpy(pairs, a.arranged.data() + k, sizeof pairs);
    for (int c = 0; c < 4; ++c) {
      const uint32_t* at = words + k / 8 * w.outputs + n + 16 * c;
      if (c % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(at + 8 * w.outputs), _MM_HINT_T0);
      const Ints word = _mm512_maskz_loadu_epi32(there[c], at);
      sums[c] = add_products(sums[c], look_up(codes, word), _mm512_set1_epi32(pairs[0]));
      sums[c] = add_products(sums[c], look_up(codes, _mm512_srli_epi16(word, 4)), _mm512_set1_epi32(pairs[1]));
      sums[c] = add_products(sums[c], look_up(codes, _mm512_srli_epi16(word, 8)), _mm512_set1_epi32(pairs[2]));
      sums[c] = add_products(sums[c], look_up(codes, _mm512_srli_epi16(word, 12)), _mm512_set1_epi32(pairs[3]));
    }
  }
}

// The same with act-order: the group's inputs are anywhere, two of them are brought together.
inline void add_pairs(const Weight& w, const Activations& a, int64_t g, int64_t n, const __mmask16 (&there)[4],
                      Ints codes, Sums (&sums)[4]) {
  const auto* words = static_cast<const uint32_t*>(w.codes) + n;
  const Ints low_half = _mm512_set1_epi32(0xffff);
  for (int64_t i = g > 0 ? a.pairs_end[g - 1] : 0; i < a.pairs_end[g]; ++i) {
    const Pair& pair = a.pairs[i];
    const Ints rotate[2] = {_mm512_set1_epi32(pair.rotate[0]), _mm512_set1_epi32(pair.rotate[1])};
    int32_t both;
    std::memcpy(&both, pair.x, sizeof both);
    const Ints x = _mm512_set1_epi32(both);
    for (int c = 0; c < 4; ++c) {
      const Ints one = _mm512_maskz_loadu_epi32(there[c], words + pair.at[0] + 16 * c);
      const Ints two = _mm512_maskz_loadu_epi32(there[c], words + pair.at[1] + 16 * c);
      const Ints code = _mm512_ternarylogic_epi32(low_half, _mm512_rorv_epi32(one, rotate[0]),
                                                  _mm512_rorv_epi32(two, rotate[1]), 0xca);
      sums[c] = add_products(sums[c], look_up(codes, code), x);
    }
  }
}

// Words [inputs/8, outputs]: sixteen outputs side by side, four vectors of them, so that a cache line is used whole.
inline void product_gptq(const Weight& w, const Activations& a, float* y, int64_t first, int64_t last) {
  const float middle = w.zeros ? 0.0f : w.middle();
  const Ints codes = table([=](int i) { return float(i & 15) - middle; });
  std::vector<float> scale(64), zero(64);
  for (int64_t n = first; n < last; n += 64) {
    const int64_t end = std::min(n + 64, last);
    __mmask16 there[4];
    for (int c = 0; c < 4; ++c) {
      const int64_t left = std::clamp<int64_t>(end - n - 16 * c, 0, 16);
      there[c] = __mmask16((1u << left) - 1);
    }
    Sums result[4] = {};
    for (int64_t g = 0; g < w.groups(); ++g) {
      Sums sums[4] = {};
      if (w.group_index) {
        add_pairs(w, a, g, n, there, codes, sums);
      } else {
        add_words(w, a, g, n, there, codes, sums);
      }
      if (w.zeros) read_group(w, g, n, end, scale.data(), zero.data());
      for (int c = 0; c < 4; ++c) {
        if (w.zeros) sums[c] = _mm512_fnmadd_ps(_mm512_loadu_ps(&zero[16 * c]), _mm512_set1_ps(a.sums[g]), sums[c]);
        const Sums its = read_floats(w.scales, w.scale_dtype, g * w.outputs + n + 16 * c, there[c]);
        result[c] = _mm512_fmadd_ps(its, sums[c], result[c]);
      }
    }
    for (int c = 0; c < 4; ++c) _mm512_mask_storeu_ps(y + n + 16 * c, there[c], result[c]);
  }
}

// Words [outputs, inputs/8]: 128 inputs a vector, of which every quarter of a 16-bit lane meets its own activations.
inline void product_rows(const Weight& w, const Activations& a, float* y, int64_t first, int64_t last) {
  const float middle = w.zeros ? 0.0f : w.middle();
  const Ints codes = table([=](int i) { return float(i & 15) - middle; });
  const int64_t groups = w.groups();
  const int in_vector = w.group >= 128 ? 1 : int(128 / w.group);
  for (int64_t n = first; n < last; ++n) {
    const auto* row = static_cast<const uint8_t*>(w.codes) + n * w.inputs / 2;
    Sums result = _mm512_setzero_ps();
    float correction = 0.0f;
    for (int64_t k = 0; k < w.inputs; k += 128) {
      const Ints word = load(row + k / 2);
      const uint16_t* x = a.arranged.data() + k;
      Sums sums = add_products(_mm512_setzero_ps(), look_up(codes, word), load(x));
      sums = add_products(sums, look_up(codes, _mm512_srli_epi16(word, 4)), load(x + 32));
      sums = add_products(sums, look_up(codes, _mm512_srli_epi16(word, 8)), load(x + 64));
      sums = add_products(sums, look_up(codes, _mm512_srli_epi16(word, 12)), load(x + 96));
      const int64_t g = n * groups + k / w.group;
      Sums scale = _mm512_set1_ps(read_float(w.scales, w.scale_dtype, g));
      for (int part = 1; part < in_vector; ++part) {
        const __mmask16 its = __mmask16(0xffffu << (16 / in_vector * part));
        scale = _mm512_mask_mov_ps(scale, its, _mm512_set1_ps(read_float(w.scales, w.scale_dtype, g + part)));
      }
      result = _mm512_fmadd_ps(scale, sums, result);
    }
    if (w.zeros) {
      for (int64_t g = 0; g < groups; ++g) {
        correction += read_float(w.scales, w.scale_dtype, n * groups + g) * row_zero(w, n, g) * a.sums[g];
      }
    }
    y[n] = _mm512_reduce_add_ps(result) - correction;
  }
}

// Bytes [outputs, inputs]. Exponent and fraction move to a bfloat16's; subnormal numbers are looked up.
inline void product_e4m3(const Weight& w, const Activations& a, float* y, int64_t first, int64_t last) {
  const Ints subnormal = table([](int i) { return float(i & 7) * 0x1p-9f; });
  const Ints magnitude = _mm512_set1_epi16(0x7f), bias = _mm512_set1_epi16(120 << 7), sign = _mm512_set1_epi16(-0x8000);
  const Ints exponent = _mm512_set1_epi16(0x78);
  for (int64_t n = first; n < last; ++n) {
    const auto* row = static_cast<const uint8_t*>(w.codes) + n * w.inputs;
    Sums result = _mm512_setzero_ps();
    for (int64_t g = 0; g < w.groups(); ++g) {
      Sums sums = _mm512_setzero_ps();
      const int64_t end = std::min(w.inputs, (g + 1) * w.group);
      for (int64_t k = g * w.group; k < end; k += 32) {
        const Ints code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + k)));
        Ints value = _mm512_add_epi16(_mm512_slli_epi16(_mm512_and_si512(code, magnitude), 4), bias);
        const __mmask32 small = _mm512_testn_epi16_mask(code, exponent);
        value = _mm512_mask_permutexvar_epi16(value, small, code, subnormal);
        value = _mm512_ternarylogic_epi32(value, _mm512_slli_epi16(code, 8), sign, 0xf8);  // value | (code & sign)
        sums = add_products(sums, value, load(a.x + k));
      }
      const float scale = read_float(w.scales, w.scale_dtype, n / w.block_rows * w.groups() + g);
      result = _mm512_fmadd_ps(_mm512_set1_ps(scale), sums, result);
    }
    y[n] = _mm512_reduce_add_ps(result);
  }
}

}  // namespace qconv

#endif
