// The inner loops of decode.h: packed codes to numbers, in vectors where the processor has AVX-512.
//
// Every form computes (code - zero) * scale in float32, in this order, so all give the same bits.
#pragma once

#include "weight.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define QCONV_AVX512 1
#include <immintrin.h>
#endif

namespace qconv {

constexpr int kAwqShift[8] = {0, 16, 4, 20, 8, 24, 12, 28};   // of each of a word's columns
constexpr int kPlainShift[8] = {0, 4, 8, 12, 16, 20, 24, 28};

#ifdef QCONV_AVX512

// Sixteen nibbles of two words, each shifted as its place in the word says.
class Nibbles {
 public:
  explicit Nibbles(const int (&shifts)[8]) {
    int both[16];
    for (int i = 0; i < 16; ++i) both[i] = shifts[i % 8];
    shifts_ = _mm512_loadu_si512(both);
  }
  __m512 operator()(const uint32_t* words) const {
    const __m256i first = _mm256_set1_epi32(int32_t(words[0])), second = _mm256_set1_epi32(int32_t(words[1]));
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srlv_epi32(both, shifts_), _mm512_set1_epi32(15)));
  }

 private:
  __m512i shifts_;
};

inline int64_t nibbles_in_vectors(const int (&shifts)[8], const uint32_t* words, int64_t count, const float* zero,
                                  const float* scale, float* out) {
  const Nibbles nibbles(shifts);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512 code = nibbles(words + i / 8);
    _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_sub_ps(code, _mm512_loadu_ps(zero + i)), _mm512_loadu_ps(scale + i)));
  }
  return i;
}

inline int64_t nibbles_in_vectors(const int (&shifts)[8], const uint32_t* words, int64_t count, float zero, float scale,
                                  float* out) {
  const Nibbles nibbles(shifts);
  const __m512 zeros = _mm512_set1_ps(zero), scales = _mm512_set1_ps(scale);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_sub_ps(nibbles(words + i / 8), zeros), scales));
  }
  return i;
}

#endif

// Nibbles with a zero point and a scale each; `count` is a multiple of 8.
inline void widen_nibbles(const int (&shifts)[8], const uint32_t* words, int64_t count, const float* zero,
                          const float* scale, float* out) {
  int64_t i = 0;
#ifdef QCONV_AVX512
  i = nibbles_in_vectors(shifts, words, count, zero, scale, out);
#endif
  for (; i < count; ++i) out[i] = (float(int32_t((words[i / 8] >> shifts[i % 8]) & 15)) - zero[i]) * scale[i];
}

// Nibbles that share both.
inline void widen_nibbles(const int (&shifts)[8], const uint32_t* words, int64_t count, float zero, float scale,
                          float* out) {
  int64_t i = 0;
#ifdef QCONV_AVX512
  i = nibbles_in_vectors(shifts, words, count, zero, scale, out);
#endif
  for (; i < count; ++i) out[i] = (float(int32_t((words[i / 8] >> shifts[i % 8]) & 15)) - zero) * scale;
}

// Numbers rounded to bfloat16, ties to even.
inline void round_to_bfloat(const float* values, int64_t count, uint16_t* out) {
  int64_t i = 0;
#if defined(QCONV_AVX512) && defined(__AVX512BF16__)
  for (; i + 16 <= count; i += 16) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(values + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), __m256i(rounded));
  }
#endif
  for (; i < count; ++i) out[i] = to_bfloat(values[i]);
}

}  // namespace qconv
