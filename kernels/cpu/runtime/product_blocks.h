// Products of ggml's blocks with bfloat16 activations; see product_bf16.h.
#pragma once

#include "product_bf16.h"

#ifdef QCONV_BF16

namespace qconv {

inline Ints bytes_as_lanes(const uint8_t* at) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

inline Sums scaled(Sums sums, float scale, Sums onto) { return _mm512_fmadd_ps(_mm512_set1_ps(scale), sums, onto); }

struct RowQ8_0 {
  // A byte less 128 is 16 h + l - 128 of its nibbles, once its sign bit is flipped.
  Ints low = table([](int i) { return float(i & 15); });
  Ints high = table([](int i) { return float(16 * (i & 15) - 128); });
  float operator()(const uint8_t* block, const Activations& a, int64_t inputs) const {
    Sums result = _mm512_setzero_ps();
    for (int64_t k = 0; k < inputs; k += 32, block += Q8_0::kBytes) {
      const Ints code = _mm512_xor_si512(bytes_as_lanes(block + 2), _mm512_set1_epi16(0x80)), x = load(a.x + k);
      Sums sums = add_products(_mm512_setzero_ps(), look_up(low, code), x);
      sums = add_products(sums, look_up(high, _mm512_srli_epi16(code, 4)), x);
      result = scaled(sums, half_at(block), result);
    }
    return _mm512_reduce_add_ps(result);
  }
};

struct RowQ4_0 {
  Ints codes = table([](int i) { return float(i & 15) - 8.0f; });
  float operator()(const uint8_t* block, const Activations& a, int64_t inputs) const {
    Sums result = _mm512_setzero_ps();
    for (int64_t k = 0; k < inputs; k += 32, block += Q4_0::kBytes) {
      const __m256i packed =
          _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 2)));
      const Ints code = _mm512_inserti64x4(_mm512_castsi256_si512(packed), _mm256_srli_epi16(packed, 4), 1);
      result = scaled(add_products(_mm512_setzero_ps(), look_up(codes, code), load(a.x + k)), half_at(block), result);
    }
    return _mm512_reduce_add_ps(result);
  }
};

template <class Type>
struct RowK {  // Q4_K, Q5_K
  Ints codes = table([](int i) { return float(Type::kBytes == Q4_K::kBytes ? i & 15 : i); });
  float operator()(const uint8_t* block, const Activations& a, int64_t inputs) const {
    constexpr bool kFifth = Type::kBytes == Q5_K::kBytes;
    Sums result = _mm512_setzero_ps();
    float correction = 0.0f;
    for (int64_t k = 0; k < inputs; k += 256, block += Type::kBytes) {
      const float d = half_at(block), least = half_at(block + 2);
      const Ints fifth = kFifth ? bytes_as_lanes(block + 16) : Ints();
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        int scale, minimum;
        scale_and_minimum(block + 4, j, &scale, &minimum);
        Ints code = bytes_as_lanes(block + (kFifth ? 48 : 16) + 32 * (j / 2));
        if (j % 2) code = _mm512_srli_epi16(code, 4);
        if (kFifth) {
          const Ints bit = _mm512_slli_epi16(_mm512_srl_epi16(fifth, _mm_cvtsi32_si128(j)), 4);
          code = _mm512_ternarylogic_epi32(_mm512_set1_epi16(16), bit, code, 0xca);
        }
        const Sums sums = add_products(_mm512_setzero_ps(), look_up(codes, code), load(a.x + k + 32 * j));
        result = scaled(sums, d * float(scale), result);
        correction += least * float(minimum) * a.sums_of_32[k / 32 + j];
      }
    }
    return _mm512_reduce_add_ps(result) - correction;
  }
};

struct RowQ6_K {
  Ints lower = table([](int i) { return float(i - 32); });
  Ints upper = table([](int i) { return float(i); });
  float operator()(const uint8_t* block, const Activations& a, int64_t inputs) const {
    Sums result = _mm512_setzero_ps();
    for (int64_t k = 0; k < inputs; k += 256, block += Q6_K::kBytes) {
      const float d = half_at(block + 208);
      const auto* scales = reinterpret_cast<const int8_t*>(block + 192);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const int half = j / 4, quarter = j % 4;
        Ints code = bytes_as_lanes(block + 64 * half + 32 * (quarter % 2));
        if (quarter / 2) code = _mm512_srli_epi16(code, 4);
        const Ints pairs = bytes_as_lanes(block + 128 + 32 * half);
        const Ints high = _mm512_slli_epi16(_mm512_srl_epi16(pairs, _mm_cvtsi32_si128(2 * quarter)), 4);
        code = _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), code, high, 0xca);
        // Six bits choose among two tables of 32.
        const Ints value = _mm512_permutex2var_epi16(lower, code, upper);
        const Sums sums = add_products(_mm512_setzero_ps(), value, load(a.x + k + 32 * j));
        const Sums scale = _mm512_mask_mov_ps(_mm512_set1_ps(d * float(scales[2 * j])), 0xff00,
                                              _mm512_set1_ps(d * float(scales[2 * j + 1])));
        result = _mm512_fmadd_ps(scale, sums, result);
      }
    }
    return _mm512_reduce_add_ps(result);
  }
};

template <class Type, class Row>
void product_blocks(const Weight& w, const Activations& a, float* y, int64_t first, int64_t last) {
  const Row row;
  const int64_t bytes = w.inputs / Type::kElements * Type::kBytes;
  for (int64_t n = first; n < last; ++n) y[n] = row(static_cast<const uint8_t*>(w.codes) + n * bytes, a, w.inputs);
}

inline void product_bf16(const Weight& w, const Activations& a, float* y, int64_t first, int64_t last) {
  switch (w.layout) {
    case Layout::kAwq: return product_awq(w, a, y, first, last);
    case Layout::kGptq: return product_gptq(w, a, y, first, last);
    case Layout::kRows: return product_rows(w, a, y, first, last);
    case Layout::kE4m3: return product_e4m3(w, a, y, first, last);
    case Layout::kQ8_0: return product_blocks<Q8_0, RowQ8_0>(w, a, y, first, last);
    case Layout::kQ4_0: return product_blocks<Q4_0, RowQ4_0>(w, a, y, first, last);
    case Layout::kQ4_K: return product_blocks<Q4_K, RowK<Q4_K>>(w, a, y, first, last);
    case Layout::kQ5_K: return product_blocks<Q5_K, RowK<Q5_K>>(w, a, y, first, last);
    case Layout::kQ6_K: return product_blocks<Q6_K, RowQ6_K>(w, a, y, first, last);
  }
}

}  // namespace qconv

#endif
