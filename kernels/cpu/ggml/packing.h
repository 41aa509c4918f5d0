// From codes to the bytes of ggml's blocks: qconv/grids/ggml/packing.py over lanes. Every function appends to the block.
#pragma once

#include "lanes.h"

namespace qconv {

// The bytes of one block of each lane, in the order of a file.
template <int Size>
struct Block {
  Bytes bytes[Size];
  int filled = 0;

  void append(Bytes value) { bytes[filled++] = value; }

  // The low 16 bits, the lowest first.
  void word(Ints value) {
    append(bytes_of(value));
    append(bytes_of(value >> 8));
  }

  // A float16 number.
  void half(Floats value) { word(half_bits(value)); }

  // The low eight bits of each part.
  template <int Subblocks, int Parts>
  void low_bytes(const Ints (&parts)[Subblocks][Parts]) {
    for (const auto& of_subblock : parts) {
      for (const Ints part : of_subblock) append(bytes_of(part));
    }
  }

  // Joins Bits bits, from bit Shift upward, of the codes of sub-blocks Stride apart to whole bytes, the first in the
  // lowest bits. Each run of 8 / Bits * Stride sub-blocks becomes Stride.
  template <int Bits, int Stride = 1, int Shift = 0, int Subblocks, int Elements>
  void fields(const Bytes (&codes)[Subblocks][Elements]) {
    constexpr int kRun = 8 / Bits * Stride;
    static_assert(Subblocks % kRun == 0);
    for (int run = 0; run < Subblocks; run += kRun) {
      for (int s = run; s < run + Stride; ++s) {
        for (int i = 0; i < Elements; ++i) {
          Bytes joined{};
          for (int place = 0; place < 8 / Bits; ++place) {
            const Bytes field = (codes[s + place * Stride][i] >> Shift) & uint8_t((1 << Bits) - 1);
            joined |= field << (place * Bits);
          }
          append(joined);
        }
      }
    }
  }

  // Elements i and i + 16 of each sub-block of 32 in one byte.
  template <int Subblocks>
  void nibbles(const Bytes (&codes)[Subblocks][32]) {
    for (int s = 0; s < Subblocks; ++s) {
      for (int i = 0; i < 16; ++i) append((codes[s][i] & 15) | (codes[s][i + 16] << 4));
    }
  }

  // Bit 4 of each code as a little-endian word.
  void fifth_bits(const Bytes (&codes)[1][32]) {
    for (int i = 0; i < 32; i += 8) {
      Bytes joined{};
      for (int bit = 0; bit < 8; ++bit) joined |= ((codes[0][i + bit] >> 4) & 1) << bit;
      append(joined);
    }
  }

  // The 12 bytes of 8 scales and 8 mins of six bits: scales 0-3, mins 0-3, and the low four bits of both of 4-7, whose
  // upper two bits are the top bits of the first eight bytes.
  void six_bit_pairs(const Bytes (&scales)[1][8], const Bytes (&mins)[1][8]) {
    for (int i = 0; i < 4; ++i) append(scales[0][i] | ((scales[0][i + 4] >> 4) << 6));
    for (int i = 0; i < 4; ++i) append(mins[0][i] | ((mins[0][i + 4] >> 4) << 6));
    for (int i = 4; i < 8; ++i) append((scales[0][i] & 15) | (mins[0][i] << 4));
  }
};

// Numbers from 0 to 255 as bytes.
template <int Subblocks, int Elements>
void to_bytes(const Floats (&values)[Subblocks][Elements], Bytes (&bytes)[Subblocks][Elements]) {
  for (int s = 0; s < Subblocks; ++s) {
    for (int i = 0; i < Elements; ++i) bytes[s][i] = bytes_of(values[s][i]);
  }
}

}  // namespace qconv
