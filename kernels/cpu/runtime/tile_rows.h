// Weights with outputs outermost as rows of left tiles: an output's numbers in bfloat16, 32 inputs a step.
//
// Each is what decode.h computes, rounded once: (code - zero) * scale in float32, in this order. Where a scale serves at
// least 32 codes of four or five bits, the numbers that they can mean are computed and rounded, and codes look theirs up.
#pragma once

#include "tiles.h"

#ifdef QCONV_BF16

namespace qconv {

constexpr int64_t kChunk = 512;                  // inputs that are decoded before they are multiplied with
constexpr int64_t kStepStride = 2 * kTileElements;  // between a row's steps: tiles come in twos

inline void put(uint16_t* out, int64_t step, Ints values) { _mm512_store_si512(out + step * kStepStride, values); }

inline Sums counted() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

// Sixteen numbers twice, so that a look-up minds only a lane's low four bits.
inline Ints table_of(Sums values) {
  const Ints once = _mm512_castsi256_si512(__m256i(_mm512_cvtneps_pbh(values)));
  return _mm512_shuffle_i64x2(once, once, 0x44);
}

inline Sums widened(__m128i signed_bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(signed_bytes)); }

inline __m128i load_16(const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }
inline __m256i load_32(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

inline void row_of_nibbles(const Weight& w, int64_t n, int64_t first, int64_t steps, uint16_t* out) {
  const Ints nibbles = _mm512_set1_epi64(0x0c0c080804040000);  // where in its word each of four begins
  const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + (n * w.inputs + first) / 2;
  Ints values = _mm512_setzero_si512();
  int64_t left = 0;
  for (int64_t s = 0; s < steps; ++s, left -= kTileInputs) {
    if (left == 0 || s == 0) {
      const int64_t k = first + s * kTileInputs, g = k / w.group;
      left = (g + 1) * w.group - k;
      const Sums scale = _mm512_set1_ps(read_float(w.scales, w.scale_dtype, n * w.groups() + g));
      values = table_of(_mm512_mul_ps(_mm512_sub_ps(counted(), _mm512_set1_ps(row_zero(w, n, g))), scale));
    }
    const Ints words = _mm512_cvtepu16_epi64(load_16(codes + 16 * s));
    put(out, s, look_up(values, _mm512_multishift_epi64_epi8(nibbles, words)));
  }
}

inline void row_of_bytes(const Weight& w, int64_t n, int64_t first, int64_t steps, uint16_t* out) {
  const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + n * w.inputs + first;
  for (int64_t s = 0; s < steps; ++s, codes += kTileInputs) {
    const int64_t g = (first + s * kTileInputs) / w.group;
    const Sums scale = _mm512_set1_ps(read_float(w.scales, w.scale_dtype, n * w.groups() + g));
    const Sums zero = _mm512_set1_ps(row_zero(w, n, g));
    const Sums low = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_16(codes)));
    const Sums high = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_16(codes + 16)));
    put(out, s, rounded(_mm512_mul_ps(_mm512_sub_ps(low, zero), scale), _mm512_mul_ps(_mm512_sub_ps(high, zero), scale)));
  }
}

// An E4M3 number's bits, moved, are a half's of 1/256 of its size, which is exact for subnormal ones too.
inline void row_of_e4m3(const Weight& w, int64_t n, int64_t first, int64_t steps, uint16_t* out) {
  const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + n * w.inputs + first;
  for (int64_t s = 0; s < steps; ++s, codes += kTileInputs) {
    const int64_t g = (first + s * kTileInputs) / w.group;
    const Sums scale = _mm512_set1_ps(256.0f * read_float(w.scales, w.scale_dtype, n / w.block_rows * w.groups() + g));
    const Ints signs_first = _mm512_slli_epi16(bytes_as_lanes(codes), 8);
    const Ints halves = _mm512_and_si512(_mm512_srai_epi16(signs_first, 1), _mm512_set1_epi16(int16_t(0xbfff)));
    const Sums low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    const Sums high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    put(out, s, rounded(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale)));
  }
}

inline void row_of_blocks(Q8_0, const uint8_t* block, int64_t steps, uint16_t* out) {
  for (int64_t s = 0; s < steps; ++s, block += Q8_0::kBytes) {
    const Sums scale = _mm512_set1_ps(half_at(block));
    const Sums low = widened(load_16(block + 2)), high = widened(load_16(block + 18));
    put(out, s, rounded(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale)));
  }
}

inline void row_of_blocks(Q4_0, const uint8_t* block, int64_t steps, uint16_t* out) {
  const Sums codes = _mm512_sub_ps(counted(), _mm512_set1_ps(8.0f));
  for (int64_t s = 0; s < steps; ++s, block += Q4_0::kBytes) {
    const Ints values = table_of(_mm512_mul_ps(codes, _mm512_set1_ps(half_at(block))));
    const __m128i low = load_16(block + 2);
    put(out, s, look_up(values, _mm512_cvtepu8_epi16(_mm256_set_m128i(_mm_srli_epi16(low, 4), low))));
  }
}

// The scales and minima of a Q4_K or Q5_K block's eight parts.
struct Parts {
  float step[8], offset[8];

  explicit Parts(const uint8_t* block) {
    uint32_t packed[3];
    std::memcpy(packed, block + 4, sizeof packed);
    const uint32_t scales[2] = {packed[0] & 0x3f3f3f3f, (packed[2] & 0x0f0f0f0f) | (packed[0] >> 2 & 0x30303030)};
    const uint32_t minima[2] = {packed[1] & 0x3f3f3f3f, (packed[2] >> 4 & 0x0f0f0f0f) | (packed[1] >> 2 & 0x30303030)};
    _mm256_storeu_ps(step, times(half_at(block), scales));
    _mm256_storeu_ps(offset, times(half_at(block + 2), minima));
  }

  static __m256 times(float factor, const uint32_t (&bytes)[2]) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    return _mm256_mul_ps(_mm256_set1_ps(factor), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight)));
  }

  Sums of(int part, Sums codes) const {
    return _mm512_sub_ps(_mm512_mul_ps(_mm512_set1_ps(step[part]), codes), _mm512_set1_ps(offset[part]));
  }
};

inline void row_of_blocks(Q4_K, const uint8_t* block, int64_t steps, uint16_t* out) {
  for (int64_t s = 0; s < steps; s += 8, block += Q4_K::kBytes) {
    const Parts parts(block);
    for (int j = 0; j < 8; j += 2) {
      const Ints codes = bytes_as_lanes(block + 16 + 16 * j);
      put(out, s + j, look_up(table_of(parts.of(j, counted())), codes));
      put(out, s + j + 1, look_up(table_of(parts.of(j + 1, counted())), _mm512_srli_epi16(codes, 4)));
    }
  }
}

inline void row_of_blocks(Q5_K, const uint8_t* block, int64_t steps, uint16_t* out) {
  const Sums upper = _mm512_add_ps(counted(), _mm512_set1_ps(16.0f));
  const Ints fifth_place = _mm512_set1_epi16(16);
  for (int64_t s = 0; s < steps; s += 8, block += Q5_K::kBytes) {
    const Parts parts(block);
    const Ints fifth = bytes_as_lanes(block + 16);
    for (int j = 0; j < 8; ++j) {
      Ints codes = bytes_as_lanes(block + 48 + 32 * (j / 2));
      if (j % 2) codes = _mm512_srli_epi16(codes, 4);
      const Ints bit = _mm512_slli_epi16(_mm512_srl_epi16(fifth, _mm_cvtsi32_si128(j)), 4);
      codes = _mm512_ternarylogic_epi32(fifth_place, bit, codes, 0xca);
      put(out, s + j, look_up(rounded(parts.of(j, counted()), parts.of(j, upper)), codes));
    }
  }
}

inline void row_of_blocks(Q6_K, const uint8_t* block, int64_t steps, uint16_t* out) {
  const __m256i low_bits = _mm256_set1_epi8(15), high_bits = _mm256_set1_epi8(48), middle = _mm256_set1_epi8(32);
  for (int64_t s = 0; s < steps; s += 8, block += Q6_K::kBytes) {
    const Sums d = _mm512_set1_ps(half_at(block + 208));
    alignas(64) float scales[16];
    _mm512_store_ps(scales, _mm512_mul_ps(d, widened(load_16(block + 192))));
    for (int j = 0; j < 8; ++j) {
      const int half = j / 4, quarter = j % 4;
      const __m256i low = _mm256_srl_epi16(load_32(block + 64 * half + 32 * (quarter % 2)),
                                           _mm_cvtsi32_si128(4 * (quarter / 2)));
      const __m256i pairs = load_32(block + 128 + 32 * half);
      const __m256i high = quarter < 2 ? _mm256_sll_epi16(pairs, _mm_cvtsi32_si128(4 - 2 * quarter))
                                       : _mm256_srl_epi16(pairs, _mm_cvtsi32_si128(2 * quarter - 4));
      const __m256i six = _mm256_or_si256(_mm256_and_si256(low, low_bits), _mm256_and_si256(high, high_bits));
      const __m256i codes = _mm256_sub_epi8(six, middle);
      const Sums first = widened(_mm256_castsi256_si128(codes)), second = widened(_mm256_extracti128_si256(codes, 1));
      put(out, s + j, rounded(_mm512_mul_ps(first, _mm512_set1_ps(scales[2 * j])),
                              _mm512_mul_ps(second, _mm512_set1_ps(scales[2 * j + 1]))));
    }
  }
}

// Any layout; where inputs end within the last step, zeros follow.
inline void row_of_any(const Weight& w, int64_t n, int64_t first, int64_t steps, uint16_t* out) {
  float values[kChunk];
  const int64_t last = std::min(w.inputs, first + steps * kTileInputs);
  decode_row(w, n, first, last, values);
  std::fill(values + (last - first), values + steps * kTileInputs, 0.0f);
  for (int64_t s = 0; s < steps; ++s) {
    const float* at = values + s * kTileInputs;
    put(out, s, rounded(_mm512_loadu_ps(at), _mm512_loadu_ps(at + 16)));
  }
}

// Output n's numbers for `steps` steps from input `first`, a multiple of kChunk.
inline void row_of_tiles(const Weight& w, int64_t n, int64_t first, int64_t steps, uint16_t* out) {
  const bool whole_steps = w.inputs % kTileInputs == 0 && w.group % kTileInputs == 0;
  switch (w.layout) {
    case Layout::kRows:
      if (!whole_steps) break;
      return w.bits == 4 ? row_of_nibbles(w, n, first, steps, out) : row_of_bytes(w, n, first, steps, out);
    case Layout::kE4m3:
      if (!whole_steps) break;
      return row_of_e4m3(w, n, first, steps, out);
    default:
      return with_block_type(w.layout, [&](auto type) {
        using Type = decltype(type);
        const int64_t block = (n * w.inputs + first) / Type::kElements;
        row_of_blocks(type, static_cast<const uint8_t*>(w.codes) + block * Type::kBytes, steps, out);
      });
  }
  row_of_any(w, n, first, steps, out);
}

}  // namespace qconv

#endif
