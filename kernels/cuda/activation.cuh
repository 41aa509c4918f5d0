// The two activation types: how codes become exact numbers of that type, two at a time, and the product on tensor
// cores.
//
// Codes are never scaled here: an integer or an E4M3 number fits both types exactly, so products are exact in f32 and
// the scales come in afterwards, in f32.
#pragma once
#include "intrinsics.cuh"

struct F16 {
  enum : u32 { ONES = 0x3C003C00u };
  enum : u32 { E4M3_SCALE_BITS = 0x43800000u };  // e4m3_pair gives 2^-8 of the number: 256.0f makes up for it

  static QC_DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    mma_f16(d, a, b0, b1, d[0], d[1], d[2], d[3]);
  }
  static QC_DEVICE void mma_first(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    mma_f16(d, a, b0, b1, 0.f, 0.f, 0.f, 0.f);
  }
  static QC_DEVICE u32 pack(float low, float high) { return pack_f16x2(low, high); }

  // What int4_pair must add for a zero point of 0..16: -(1024 + zero) twice.
  static QC_DEVICE u32 int4_offset(u32 zero) { return 0xE400E400u + zero * 0x00010001u; }

  // The codes in nibbles `i` and `i + 4` of a word, less the zero point. 0x6400 | code is 1024 + code, so a nibble is
  // used where it lies: one that lies 4 bits higher reads as 1024 + 16 code, which one fma puts right.
  static QC_DEVICE u32 int4_pair(u32 word, int i, u32 offset) {
    const u32 bits = i & 2 ? word >> 8 : word;
    if (i & 1) return fma_f16x2(and_or(bits, 0x00F000F0u, 0x64006400u), 0x2C002C00u, add_f16x2(offset, 0x63806380u));
    return add_f16x2(and_or(bits, 0x000F000Fu, 0x64006400u), offset);
  }

  // Codes of six bits in the low bits of both halves, less 32.
  static QC_DEVICE u32 int6_pair(u32 codes) { return add_f16x2(codes | 0x64006400u, 0xE420E420u); }

  // Signed bytes 2i and 2i + 1 of a word.
  static QC_DEVICE u32 int8_pair(u32 word, int i) {
    const u32 biased = word ^ 0x80808080u;
    const u32 bits = i ? permute_bytes<0x4342>(biased, 0x64646464u) : permute_bytes<0x4140>(biased, 0x64646464u);
    return add_f16x2(bits, 0xE480E480u);
  }

  // E4M3 bytes 2i and 2i + 1 of a word, times 2^-8. Subnormals come out right; the two NaN codes do not.
  static QC_DEVICE u32 e4m3_pair(u32 word, int i) {
    const u32 high = i ? permute_bytes<0x3424>(word, 0) : permute_bytes<0x1404>(word, 0);
    return and_or(high, 0x80008000u, (high & 0x7F007F00u) >> 1);
  }
};

struct BF16 {
  enum : u32 { ONES = 0x3F803F80u };
  enum : u32 { E4M3_SCALE_BITS = 0x3F800000u };

  static QC_DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    mma_bf16(d, a, b0, b1, d[0], d[1], d[2], d[3]);
  }
  static QC_DEVICE void mma_first(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    mma_bf16(d, a, b0, b1, 0.f, 0.f, 0.f, 0.f);
  }
  static QC_DEVICE u32 pack(float low, float high) { return pack_bf16x2(low, high); }

  // -(128 + zero) twice.
  static QC_DEVICE u32 int4_offset(u32 zero) { return 0xC300C300u + zero * 0x00010001u; }

  // 0x4300 | code is 128 + code; seven bits of mantissa leave no room for a nibble that lies higher.
  static QC_DEVICE u32 int4_pair(u32 word, int i, u32 offset) {
    return fma_bf16x2(and_or(word >> (4 * i), 0x000F000Fu, 0x43004300u), ONES, offset);
  }

  static QC_DEVICE u32 int6_pair(u32 codes) { return fma_bf16x2(codes | 0x43004300u, ONES, 0xC320C320u); }

  // 128 + the low seven bits, less 128 or, where the sign bit is set, less 256: -128.0 and -256.0 differ in bit 7 only.
  static QC_DEVICE u32 int8_pair(u32 word, int i) {
    const u32 bits = i ? permute_bytes<0x4342>(word, 0) : permute_bytes<0x4140>(word, 0);
    return fma_bf16x2(and_or(bits, 0x007F007Fu, 0x43004300u), ONES, and_or(bits, 0x00800080u, 0xC300C300u));
  }

  // As for F16, but times 2^-120, which the exact product with 2^120 takes away; -0.0 keeps the sign of a zero.
  static QC_DEVICE u32 e4m3_pair(u32 word, int i) {
    const u32 high = i ? permute_bytes<0x3424>(word, 0) : permute_bytes<0x1404>(word, 0);
    return fma_bf16x2(and_or(high, 0x80008000u, (high & 0x7F007F00u) >> 4), 0x7B807B80u, 0x80008000u);
  }
};
