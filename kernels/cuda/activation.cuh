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

  // A code is used where it lies in its half: from bit 0 on (low) it makes CODE the number 1024 + code, from bit 4 on
  // (high) it makes HIGH_CODE 1024 + 16 code.
  enum : u32 { CODE = 0x64006400u, HIGH_CODE = 0x64006400u };
  // What low_code and high_code must add for a code less its zero point: -(1024 + zero) and -(64 + zero).
  static QC_DEVICE u32 low_offset(u32 zero) { return 0xE400E400u + zero * 0x00010001u; }
  static QC_DEVICE u32 high_offset(u32 zero) { return 0xD400D400u + zero * 0x00100010u; }
  // The same of the zero point in byte BYTE of a word.
  template <u32 BYTE>
  static QC_DEVICE u32 low_offset_of(u32 zeros) {
    return permute_bytes<0x4040 + BYTE * 0x0101>(zeros, 0xE4E4E4E4u);
  }
  template <u32 BYTE>
  static QC_DEVICE u32 high_offset_of(u32 zeros) {
    return add_f16x2(low_offset_of<BYTE>(zeros), 0x63806380u);
  }
  static QC_DEVICE u32 low_code(u32 pattern, u32 offset) { return add_f16x2(pattern, offset); }
  static QC_DEVICE u32 high_code(u32 pattern, u32 offset) { return fma_f16x2(pattern, 0x2C002C00u, offset); }

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

  // Low codes as for F16, with 128 for 1024. Seven bits of mantissa leave no room for a code from bit 4 on: HIGH_CODE
  // is CODE rotated left by four bits, and high_code rotates back.
  enum : u32 { CODE = 0x43004300u, HIGH_CODE = 0x30043004u };
  static QC_DEVICE u32 low_offset(u32 zero) { return 0xC300C300u + zero * 0x00010001u; }
  static QC_DEVICE u32 high_offset(u32 zero) { return low_offset(zero); }
  template <u32 BYTE>
  static QC_DEVICE u32 low_offset_of(u32 zeros) {
    return permute_bytes<0x4040 + BYTE * 0x0101>(zeros, 0xC3C3C3C3u);
  }
  template <u32 BYTE>
  static QC_DEVICE u32 high_offset_of(u32 zeros) {
    return low_offset_of<BYTE>(zeros);
  }
  static QC_DEVICE u32 low_code(u32 pattern, u32 offset) { return fma_bf16x2(pattern, ONES, offset); }
  static QC_DEVICE u32 high_code(u32 pattern, u32 offset) {
    return low_code(QC_PLANTED(ROTATION_LOST) ? pattern : rotate_right<4>(pattern), offset);
  }

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
