// TQ1_0 and TQ2_0 (qconv/grids/ggml/ternary.py): one magnitude a block, by formula and by search.
#pragma once

#include "direct.h"
#include "packing.h"
#include "scaled.h"

namespace qconv {

// ceil(256 n / 243) of five digits n in base three, which is n + ceil(13 n / 243).
template <class Number>
Number of_base_three(Number n) {
  return n + ((n * 13 + 242) * 4316 >> 20);
}

// Of 256 codes from 0 to 2: the bytes that hold five of them each, four in the last four, by a function that gives the
// code of an element and one that takes a number.
template <class Number, class Code, class Put>
void base_three(Code code, Put put) {
  const auto run = [&](int first, int stride, int digits) {
    for (int i = first; i < first + stride; ++i) {
      Number n = code(i);
      for (int digit = 1; digit < digits; ++digit) n = n * 3 + code(i + digit * stride);
      put(of_base_three<Number>(digits == 5 ? n : n * 3));
    }
  };
  run(0, 32, 5);
  run(160, 16, 5);
  run(240, 4, 4);
}

template <class Code, class Put>
void two_bits(Code code, Put put) {
  for (int first = 0; first < 256; first += 128) {
    for (int i = first; i < first + 32; ++i) {
      put(code(i) | code(i + 32) << 2 | code(i + 64) << 4 | code(i + 96) << 6);
    }
  }
}

// Codes round(x / d) + 1, d being the largest magnitude; halves are rounded away from zero.
inline void ternary_codes(const float* x, int32_t (&codes)[256], uint8_t* scale_out) {
  const float scale = largest_magnitude(x, 256), inverse = reciprocal(scale);
  store_half(scale, scale_out);
  for (int i = 0; i < 256; ++i) {
    const float code = x[i] * inverse;
    codes[i] = int32_t(code + std::copysign(0x1.fffffep-2f, code)) + 1;
  }
}

struct TQ1_0Block {
  static constexpr int kElements = 256, kBytes = 54;

  static void encode(const float* x, uint8_t* out) {
    int32_t codes[256];
    ternary_codes(x, codes, out + 52);
    uint8_t* to = out;
    base_three<int32_t>([&](int i) { return codes[i]; }, [&](int32_t byte) { *to++ = uint8_t(byte); });
  }
};

struct TQ2_0Block {
  static constexpr int kElements = 256, kBytes = 66;

  static void encode(const float* x, uint8_t* out) {
    int32_t codes[256];
    ternary_codes(x, codes, out + 64);
    uint8_t* to = out;
    two_bits([&](int i) { return codes[i]; }, [&](int32_t byte) { *to++ = uint8_t(byte); });
  }
};

// What the search finds, with no scale below zero: codes can be.
template <bool Weighted>
Floats found_ternary(const Floats* weights, const float* importance, const Starts& starts, Ints (&codes)[256]) {
  ScaledEncoded<1, 256> found;
  encode_scaled<Integers<-1, 1>, 256, Weighted>(weights, importance, starts, found);
  const Ints turned = found.scales[0] < 0.0f;
  for (int i = 0; i < 256; ++i) {
    const Ints code = __builtin_convertvector(found.codes[0][i], Ints);
    codes[i] = turned ? 2 - code : code;
  }
  return magnitude(found.scales[0]);
}

struct TQ1_0 {
  static constexpr int kElements = 256, kBytes = 54;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    Ints codes[256];
    const Floats scale = found_ternary<Weighted>(weights, importance, starts, codes);
    base_three<Ints>([&](int i) { return codes[i]; }, [&](Ints byte) { block.append(bytes_of(byte)); });
    block.half(scale);
  }
};

struct TQ2_0 {
  static constexpr int kElements = 256, kBytes = 66;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    Ints codes[256];
    const Floats scale = found_ternary<Weighted>(weights, importance, starts, codes);
    two_bits([&](int i) { return codes[i]; }, [&](Ints byte) { block.append(bytes_of(byte)); });
    block.half(scale);
  }
};

}  // namespace qconv
