// Weights with outputs outermost as rows of left tiles: an output's numbers in bfloat16, 32 inputs a step.
//
// Each is what decode.h computes, rounded once: (code - zero) * scale in float32, in this order. Where a scale serves at
// least 32 codes of four or five bits, the numbers that they can mean are computed and rounded, and codes look theirs up.
#pragma once

#include <cmath>

#include "tiles.h"

#ifdef QCONV_BF16

namespace qconv {

constexpr int64_t kChunk = 512;                     // inputs that are decoded before they are multiplied with
constexpr int64_t kBlock = 32;                      // outputs of two tiles
constexpr int64_t kPanel = 8 * kBlock;              // outputs of decoded blocks that meet the same activations
constexpr int64_t kStepStride = 2 * kTileElements;  // between a row's steps: tiles come in twos

inline int64_t blocks_of(int64_t outputs) { return (outputs + kBlock - 1) / kBlock; }

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

// The steps of a chunk of inputs, and where in the groups they begin.
struct Span {
  int64_t first, steps;
  int64_t groups;           // of a row
  int64_t group, in_group;  // the first step's group, and how many of its steps are left

  Span(const Weight& w, int64_t first, int64_t steps)
      : first(first), steps(steps), groups(w.groups()), group(first / w.group),
        in_group(((group + 1) * w.group - first) / kTileInputs) {}

  // Calls `use(group, step, end)` for the groups, with each one's steps.
  template <class Use>
  void by_group(const Weight& w, const Use& use) const {
    int64_t g = group;
    for (int64_t s = 0, end = in_group; s < steps; s = end, end += w.group / kTileInputs, ++g) {
      use(g, s, std::min(end, steps));
    }
  }
};

inline void row_of_nibbles(const Weight& w, int64_t n, const Span& span, uint16_t* out) {
  const Ints nibbles = _mm512_set1_epi64(0x0c0c080804040000);  // where in its word each of four begins
  const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + (n * w.inputs + span.first) / 2;
  span.by_group(w, [&](int64_t g, int64_t s, int64_t end) {
    const Sums scale = _mm512_set1_ps(read_float(w.scales, w.scale_dtype, n * span.groups + g));
    const Sums zero = _mm512_set1_ps(row_zero(w, n, g));
    const Ints values = table_of(_mm512_mul_ps(_mm512_sub_ps(counted(), zero), scale));
    for (; s < end; ++s) {
      const Ints words = _mm512_cvtepu16_epi64(load_16(codes + 16 * s));
      put(out, s, look_up(values, _mm512_multishift_epi64_epi8(nibbles, words)));
    }
  });
}

inline void row_of_bytes(const Weight& w, int64_t n, const Span& span, uint16_t* out) {
  const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + n * w.inputs + span.first;
  span.by_group(w, [&](int64_t g, int64_t s, int64_t end) {
    const Sums scale = _mm512_set1_ps(read_float(w.scales, w.scale_dtype, n * span.groups + g));
    const Sums zero = _mm512_set1_ps(row_zero(w, n, g));
    for (; s < end; ++s) {
      const Sums low = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_16(codes + 32 * s)));
      const Sums high = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_16(codes + 32 * s + 16)));
      const Sums first_half = _mm512_mul_ps(_mm512_sub_ps(low, zero), scale);
      put(out, s, rounded(first_half, _mm512_mul_ps(_mm512_sub_ps(high, zero), scale)));
    }
  });
}

// How a product of an E4M3 number and a scale is rounded depends on the fraction only, whatever the exponent: rounded
// products are looked up by fraction, and the exponent and the sign are added to their bits. Subnormal numbers have a
// table of their own. Nothing overflows as long as scales are of a usual size.
inline bool usual_size(float scale) { return std::abs(scale) > 0x1p-100f && std::abs(scale) < 0x1p100f; }

inline void row_of_e4m3(const Weight& w, int64_t n, const Span& span, uint16_t* out) {
  const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + n * w.inputs + span.first;
  const Sums least = _mm512_setr_ps(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  const int64_t scales = n / w.block_rows * span.groups;
  const Ints fraction = _mm512_set1_epi64(0x0003000200010000), four = _mm512_set1_epi16(4);
  const Ints eighths = _mm512_mask_add_epi16(fraction, 0xf0f0f0f0, fraction, four);  // 0 to 7, four times
  const Ints sign_and_exponent = _mm512_set1_epi16(int16_t(0x8780)), exponent = _mm512_set1_epi16(0x78);
  span.by_group(w, [&](int64_t g, int64_t s, int64_t end) {
    const Sums scale = _mm512_set1_ps(read_float(w.scales, w.scale_dtype, scales + g));
    const Ints both = table_of(_mm512_mul_ps(_mm512_mul_ps(least, _mm512_set1_ps(0x1p-9f)), scale));
    const Ints subnormal = look_up(both, _mm512_or_si512(eighths, _mm512_set1_epi16(8)));
    // The least normal numbers have exponent 1, which is added.
    const Ints normal = _mm512_sub_epi16(look_up(both, eighths), _mm512_set1_epi16(1 << 7));
    for (; s < end; ++s) {
      const Ints code = _mm512_cvtepi8_epi16(load_32(codes + 32 * s));
      const Ints added = _mm512_and_si512(_mm512_slli_epi16(code, 4), sign_and_exponent);
      const __mmask32 small = _mm512_testn_epi16_mask(code, exponent);
      put(out, s, _mm512_add_epi16(_mm512_mask_permutexvar_epi16(look_up(normal, code), small, code, subnormal), added));
    }
  });
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
  const __m256i nibble = _mm256_set1_epi8(15), six = _mm256_set1_epi8(63), middle = _mm256_set1_epi8(32);
  for (int64_t s = 0; s < steps; s += 8, block += Q6_K::kBytes) {
    alignas(64) float scales[16];
    _mm512_store_ps(scales, _mm512_mul_ps(_mm512_set1_ps(half_at(block + 208)), widened(load_16(block + 192))));
    // 32 codes: low bits in every byte's lower half, high ones in the two bits above.
    const auto put_codes = [&](int part, __m256i low, __m256i high) {
      const __m256i bits = _mm256_and_si256(_mm256_ternarylogic_epi32(nibble, low, high, 0xca), six);
      const __m256i codes = _mm256_sub_epi8(bits, middle);
      const Sums first = widened(_mm256_castsi256_si128(codes)), second = widened(_mm256_extracti128_si256(codes, 1));
      put(out, s + part, rounded(_mm512_mul_ps(first, _mm512_set1_ps(scales[2 * part])),
                                 _mm512_mul_ps(second, _mm512_set1_ps(scales[2 * part + 1]))));
    };
    for (int half = 0; half < 2; ++half) {
      const __m256i one = load_32(block + 64 * half), two = load_32(block + 64 * half + 32);
      const __m256i pairs = load_32(block + 128 + 32 * half);
      put_codes(4 * half, one, _mm256_slli_epi16(pairs, 4));
      put_codes(4 * half + 1, two, _mm256_slli_epi16(pairs, 2));
      put_codes(4 * half + 2, _mm256_srli_epi16(one, 4), pairs);
      put_codes(4 * half + 3, _mm256_srli_epi16(two, 4), _mm256_srli_epi16(pairs, 2));
    }
  }
}

// Any layout; where inputs end within the last step, zeros follow.
inline void row_of_any(const Weight& w, int64_t n, const Span& span, uint16_t* out) {
  float values[kChunk];
  const int64_t last = std::min(w.inputs, span.first + span.steps * kTileInputs);
  decode_row(w, n, span.first, last, values);
  std::fill(values + (last - span.first), values + span.steps * kTileInputs, 0.0f);
  for (int64_t s = 0; s < span.steps; ++s) {
    const float* at = values + s * kTileInputs;
    put(out, s, rounded(_mm512_loadu_ps(at), _mm512_loadu_ps(at + 16)));
  }
}

// Decodes parts of rows, for one thread.
class Rows {
 public:
  explicit Rows(const Weight& w)
      : w_(w), whole_steps_(w.inputs % kTileInputs == 0 && w.group % kTileInputs == 0), row_bytes_(bytes_of_row(w)) {
    if (w.layout != Layout::kE4m3 || !whole_steps_) return;
    const int64_t scales = (w.outputs + w.block_rows - 1) / w.block_rows * w.groups();
    for (int64_t i = 0; i < scales; ++i) whole_steps_ &= usual_size(read_float(w.scales, w.scale_dtype, i));
  }

  // What to decode: outputs [first, last), at most a panel.
  void open(int64_t first, int64_t last) { first_ = first, last_ = last; }

  // Of block number `block`, `steps` steps from input `k`, a multiple of kChunk; rows beyond the last are zeros.
  void decode(int64_t block, int64_t k, int64_t steps, uint16_t* out) const {
    const Span span(w_, k, steps);
    for (int64_t i = 0; i < kBlock; ++i) {
      uint16_t* row = out + i / kTileRows * kTileElements + i % kTileRows * kTileInputs;
      const int64_t n = first_ + block * kBlock + i;
      if (n < last_) {
        decode_row_of_tiles(n, span, row);
      } else {
        for (int64_t s = 0; s < steps; ++s) put(row, s, _mm512_setzero_si512());
      }
    }
  }

 private:
  static int64_t bytes_of_row(const Weight& w) {
    int64_t bytes = 0;
    with_block_type(w.layout, [&](auto type) { bytes = w.inputs / decltype(type)::kElements * decltype(type)::kBytes; });
    return bytes;
  }

  void decode_row_of_tiles(int64_t n, const Span& span, uint16_t* out) const {
    switch (w_.layout) {
      case Layout::kRows:
        if (!whole_steps_) return row_of_any(w_, n, span, out);
        return w_.bits == 4 ? row_of_nibbles(w_, n, span, out) : row_of_bytes(w_, n, span, out);
      case Layout::kE4m3: return whole_steps_ ? row_of_e4m3(w_, n, span, out) : row_of_any(w_, n, span, out);
      default:
        return with_block_type(w_.layout, [&](auto type) {
          const auto* row = static_cast<const uint8_t*>(w_.codes) + n * row_bytes_;
          row_of_blocks(type, row + span.first / type.kElements * type.kBytes, span.steps, out);
        });
    }
  }

  const Weight& w_;
  int64_t first_ = 0, last_ = 0;
  bool whole_steps_;
  int64_t row_bytes_;  // of ggml's blocks
};

}  // namespace qconv

#endif
