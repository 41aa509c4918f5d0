// ggml's block types: what the numbers of a block are. Layouts are llama.cpp's file format.
#pragma once

#include <algorithm>

#include "weight.h"

namespace qconv {

inline float half_at(const uint8_t* at) {
  uint16_t value;
  std::memcpy(&value, at, sizeof value);
  return of_half(value);
}

struct Q8_0 {  // scale f16, 32 signed bytes
  static constexpr int kElements = 32, kBytes = 34;
  static void decode(const uint8_t* block, float* out) {
    const float scale = half_at(block);
    const auto* codes = reinterpret_cast<const int8_t*>(block + 2);
    for (int i = 0; i < 32; ++i) out[i] = float(codes[i]) * scale;
  }
};

struct Q4_0 {  // scale f16, 16 bytes: low nibbles are the first half
  static constexpr int kElements = 32, kBytes = 18;
  static void decode(const uint8_t* block, float* out) {
    const float scale = half_at(block);
    for (int i = 0; i < 16; ++i) {
      out[i] = float(int32_t(block[2 + i] & 15) - 8) * scale;
      out[16 + i] = float(int32_t(block[2 + i] >> 4) - 8) * scale;
    }
  }
};

// The 6-bit scale and minimum of sub-block j of Q4_K and Q5_K, from their 12 bytes.
inline void scale_and_minimum(const uint8_t* packed, int j, int* scale, int* minimum) {
  if (j < 4) {
    *scale = packed[j] & 63;
    *minimum = packed[j + 4] & 63;
  } else {
    *scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4);
    *minimum = (packed[j + 4] >> 4) | (packed[j] >> 6 << 4);
  }
}

struct Q4_K {  // scale, minimum f16, 12 bytes of 6-bit scales and minima, 128 bytes: of each 32 low then high nibbles
  static constexpr int kElements = 256, kBytes = 144;
  static void decode(const uint8_t* block, float* out) {
    const float d = half_at(block), least = half_at(block + 2);
    for (int j = 0; j < 8; ++j) {
      int scale, minimum;
      scale_and_minimum(block + 4, j, &scale, &minimum);
      const float step = d * float(scale), offset = least * float(minimum);
      const uint8_t* codes = block + 16 + 32 * (j / 2);
      for (int i = 0; i < 32; ++i) out[32 * j + i] = step * float(int32_t((codes[i] >> (4 * (j % 2))) & 15)) - offset;
    }
  }
};

struct Q5_K {  // as Q4_K with 32 bytes of fifth bits before the nibbles: bit j of byte i is element 32 j + i's
  static constexpr int kElements = 256, kBytes = 176;
  static void decode(const uint8_t* block, float* out) {
    const float d = half_at(block), least = half_at(block + 2);
    const uint8_t* fifth = block + 16;
    for (int j = 0; j < 8; ++j) {
      int scale, minimum;
      scale_and_minimum(block + 4, j, &scale, &minimum);
      const float step = d * float(scale), offset = least * float(minimum);
      const uint8_t* codes = block + 48 + 32 * (j / 2);
      for (int i = 0; i < 32; ++i) {
        const int32_t code = ((codes[i] >> (4 * (j % 2))) & 15) | (((fifth[i] >> j) & 1) << 4);
        out[32 * j + i] = step * float(code) - offset;
      }
    }
  }
};

struct Q6_K {  // 128 bytes of low nibbles, 64 of upper pairs of bits, 16 signed scales, scale f16
  static constexpr int kElements = 256, kBytes = 210;
  static void decode(const uint8_t* block, float* out) {
    const float d = half_at(block + 208);
    const auto* scales = reinterpret_cast<const int8_t*>(block + 192);
    for (int j = 0; j < 8; ++j) {  // 32 elements each
      const int half = j / 4, quarter = j % 4;
      const uint8_t* low = block + 64 * half + 32 * (quarter % 2);
      const uint8_t* high = block + 128 + 32 * half;
      for (int part = 0; part < 2; ++part) {
        const float scale = d * float(scales[2 * j + part]);
        for (int i = 16 * part; i < 16 * part + 16; ++i) {
          const int32_t code = ((low[i] >> (4 * (quarter / 2))) & 15) | (((high[i] >> (2 * quarter)) & 3) << 4);
          out[32 * j + i] = scale * float(code - 32);
        }
      }
    }
  }
};

template <class Use>
void with_block_type(Layout layout, const Use& use) {
  switch (layout) {
    case Layout::kQ8_0: return use(Q8_0());
    case Layout::kQ4_0: return use(Q4_0());
    case Layout::kQ4_K: return use(Q4_K());
    case Layout::kQ5_K: return use(Q5_K());
    case Layout::kQ6_K: return use(Q6_K());
    default: return;
  }
}

}  // namespace qconv
