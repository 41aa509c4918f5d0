// The types whose encoder searches: what each can hold, and where its parts stand in a block (qconv/grids/ggml/searched.py).
//
// A type has kElements and kBytes of a block and a function that encodes one block of each lane.
#pragma once

#include "affine.h"
#include "packing.h"
#include "scaled.h"

namespace qconv {

template <int Subblocks, int Elements>
struct Codes {
  Bytes of[Subblocks][Elements];

  explicit Codes(const Floats (&values)[Subblocks][Elements]) { to_bytes(values, of); }
};

struct Q4_0 {
  static constexpr int kElements = 32, kBytes = 18;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    ScaledEncoded<1, 32> found;
    encode_scaled<Integers<-8, 7>, 32, Weighted>(weights, importance, starts, found);
    block.half(found.scales[0]);
    block.nibbles(Codes<1, 32>(found.codes).of);
  }
};

struct Q5_0 {
  static constexpr int kElements = 32, kBytes = 22;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    ScaledEncoded<1, 32> found;
    encode_scaled<Integers<-16, 15>, 32, Weighted>(weights, importance, starts, found);
    const Codes<1, 32> codes(found.codes);
    block.half(found.scales[0]);
    block.fifth_bits(codes.of);
    block.nibbles(codes.of);
  }
};

struct Q4_1 {
  static constexpr int kElements = 32, kBytes = 20;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    AffineEncoded<1, 32> found;
    encode_affine<32, Weighted>(weights, importance, 15.0f, starts, found);
    block.half(found.scales[0]);
    block.half(found.bases[0]);
    block.nibbles(Codes<1, 32>(found.codes).of);
  }
};

struct Q5_1 {
  static constexpr int kElements = 32, kBytes = 24;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    AffineEncoded<1, 32> found;
    encode_affine<32, Weighted>(weights, importance, 31.0f, starts, found);
    const Codes<1, 32> codes(found.codes);
    block.half(found.scales[0]);
    block.half(found.bases[0]);
    block.fifth_bits(codes.of);
    block.nibbles(codes.of);
  }
};

struct IQ4_NL {
  static constexpr int kElements = 32, kBytes = 18;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    ScaledEncoded<1, 32> found;
    encode_scaled<Codebook, 32, Weighted>(weights, importance, starts, found);
    block.half(found.scales[0]);
    block.nibbles(Codes<1, 32>(found.codes).of);
  }
};

struct IQ4_XS {
  static constexpr int kElements = 256, kBytes = 136;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    ScaledEncoded<8, 32> found;
    encode_scaled<Codebook, 8, 32, Weighted>(weights, importance, 32.0f, starts, found);
    Bytes scales[8][1];
    for (int s = 0; s < 8; ++s) scales[s][0] = bytes_of(found.scales[s] + 32.0f);
    block.half(found.d);
    block.fields<2, 1, 4>(scales);
    block.fields<4>(scales);
    block.nibbles(Codes<8, 32>(found.codes).of);
  }
};

struct Q2_K {
  static constexpr int kElements = 256, kBytes = 84;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    AffineEncoded<16, 16> found;
    encode_affine<16, 16, Weighted>(weights, importance, 3.0f, 15.0f, starts, found);
    for (int s = 0; s < 16; ++s) block.append(bytes_of(found.scales[s] + 16.0f * found.bases[s]));
    block.fields<2, 2>(Codes<16, 16>(found.codes).of);
    block.half(found.d);
    block.half(found.dmin);
  }
};

struct Q3_K {
  static constexpr int kElements = 256, kBytes = 110;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    ScaledEncoded<16, 16> found;
    encode_scaled<Integers<-4, 3>, 16, 16, Weighted>(weights, importance, 32.0f, starts, found);
    const Codes<16, 16> codes(found.codes);
    Bytes scales[16][1];
    for (int s = 0; s < 16; ++s) scales[s][0] = bytes_of(found.scales[s] + 32.0f);
    block.fields<1, 2, 2>(codes.of);
    block.fields<2, 2>(codes.of);
    block.fields<4, 8>(scales);
    block.fields<2, 4, 4>(scales);
    block.half(found.d);
  }
};

// The first 16 bytes of Q4_K and Q5_K.
template <int Size>
void affine_head(const AffineEncoded<8, 32>& found, Block<Size>& block) {
  Bytes scales[1][8], mins[1][8];
  for (int s = 0; s < 8; ++s) {
    scales[0][s] = bytes_of(found.scales[s]);
    mins[0][s] = bytes_of(found.bases[s]);
  }
  block.half(found.d);
  block.half(found.dmin);
  block.six_bit_pairs(scales, mins);
}

struct Q4_K {
  static constexpr int kElements = 256, kBytes = 144;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    AffineEncoded<8, 32> found;
    encode_affine<8, 32, Weighted>(weights, importance, 15.0f, 63.0f, starts, found);
    affine_head(found, block);
    block.fields<4>(Codes<8, 32>(found.codes).of);
  }
};

struct Q5_K {
  static constexpr int kElements = 256, kBytes = 176;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    AffineEncoded<8, 32> found;
    encode_affine<8, 32, Weighted>(weights, importance, 31.0f, 63.0f, starts, found);
    const Codes<8, 32> codes(found.codes);
    affine_head(found, block);
    block.fields<1, 1, 4>(codes.of);
    block.fields<4>(codes.of);
  }
};

struct Q6_K {
  static constexpr int kElements = 256, kBytes = 210;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    ScaledEncoded<16, 16> found;
    encode_scaled<Integers<-32, 31>, 16, 16, Weighted>(weights, importance, 128.0f, starts,
                                                        found);
    const Codes<16, 16> codes(found.codes);
    block.fields<4, 4>(codes.of);
    block.fields<2, 2, 4>(codes.of);
    for (int s = 0; s < 16; ++s) block.append(bytes_of(found.scales[s]));
    block.half(found.d);
  }
};

}  // namespace qconv
