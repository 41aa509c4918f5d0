// A packed weight as its file holds it, and numbers in the dtypes that files have.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "../numbers.h"

namespace qconv {

enum class Layout : int32_t {
  kAwq,    // words [inputs, outputs/8], nibbles in AWQ's order; scales, zeros by [group, output]
  kGptq,   // words [inputs*bits/32, outputs], packed along the inputs; scales, zeros by [group, output]
  kRows,   // words [outputs, inputs*bits/32], packed along the inputs; scales [output, group], zeros [output/8, group]
  kE4m3,   // bytes [outputs, inputs]; scales by [block down, block across]
  kQ8_0,   // ggml's blocks, [outputs, bytes of a row]
  kQ4_0,
  kQ4_K,
  kQ5_K,
  kQ6_K,
};

struct Weight {
  Layout layout;
  int32_t bits;         // of an integer code
  int64_t outputs;
  int64_t inputs;
  int64_t group;        // inputs that share a scale
  int64_t block_rows;   // outputs that share a scale; E4M3 only
  Dtype scale_dtype;
  int32_t zero_offset;  // what is added to a stored zero point
  const void* codes;
  const void* scales;
  const uint32_t* zeros;       // null: the zero point is 2^(bits-1)
  const int32_t* group_index;  // of each input; null: groups are runs of inputs

  int64_t groups() const { return (inputs + group - 1) / group; }
  int64_t group_of(int64_t input) const { return group_index ? group_index[input] : input / group; }
  float middle() const { return float(1 << (bits - 1)); }
};

inline float of_half(uint16_t v) {
#ifdef __F16C__
  return _cvtsh_ss(v);  // the other way meets subnormal floats, of which small scales are many: slow on most processors
#else
  return Float16::widened(v);
#endif
}

inline float of_bfloat(uint16_t v) { return Bfloat16::widened(v); }

// To nearest, ties to even; NaN does not occur in weights that were checked.
inline uint16_t to_bfloat(float value) {
  const uint32_t bits = bits_of(value);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// An E4M3 number: its exponent and fraction moved to a float's, whose exponent is biased by 120 more. A subnormal one
// is made from a normal number, since processors are slow where they meet subnormal floats.
inline float of_e4m3(uint8_t v) {
  const uint32_t size = uint32_t(v & 0x7f) << 20, sign = uint32_t(v & 0x80) << 24;
  const float normal = float_of(size + (120u << 23));
  const float subnormal = float_of(size + (121u << 23)) - 0x1p-6f;
  return float_of(bits_of(size < (1u << 23) ? subnormal : normal) | sign);
}

inline float read_float(const void* at, Dtype dtype, int64_t index) {
  switch (dtype) {
    case Dtype::kFloat16: return of_half(static_cast<const uint16_t*>(at)[index]);
    case Dtype::kBfloat16: return of_bfloat(static_cast<const uint16_t*>(at)[index]);
    default: return static_cast<const float*>(at)[index];
  }
}

}  // namespace qconv
