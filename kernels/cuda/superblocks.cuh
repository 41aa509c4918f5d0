// ggml's K types in planes: super-blocks of 256 inputs whose factors are float16, and smaller runs with integer scales.
#pragma once
#include "gemm.cuh"

// Byte BYTE of a word as the float 32768 + byte: its product with a factor of at most eleven bits is exact in one fma
// that takes 32768 times the factor away.
template <u32 BYTE>
QC_DEVICE float biased_float(u32 bytes) {
  return float_from_bits(permute_bytes<0x7404 + BYTE * 0x10>(bytes, 0x47000000u));
}

// Q4_K: weight = (d * scale) * code - (dmin * minimum) in runs of 32. Codes as in the int4 layout; scales [K/32][N]
// pairs of bytes (scale, minimum) of six bits each; offsets [K/256][N] pairs of float16 (d, dmin).
template <class Act>
struct Q4K {
  static constexpr int WEIGHT_BYTES = TILE_K * TILE_N / 2, RUNS = 1, DECODE_BLOCKS = 6;
  static constexpr int FACTOR_ROW = TILE_N * 4, RUN_ROW = TILE_N * 2, RUNS_AT = FACTOR_ROW;
  static constexpr int PARAMETER_BYTES = FACTOR_ROW + 2 * RUN_ROW;
  static constexpr bool SPLIT_OCTETS = false, MINIMUMS = true;
  typedef NibbleSquare Square;
  struct Columns {
    float scale[1][8], minimum[8];
    float d[8], d_bias[8], dmin[8], dmin_bias[8];  // of the super-block; what takes the bias of biased_float away
    int group;
  };

  static QC_DEVICE void expert(GemmArgs& args, size_t e) {
    args.weights += e * args.depth * args.columns / 2;
    args.scales += e * (args.depth / 32) * args.columns * 2;
    args.offsets += e * (args.depth / 256) * args.columns * 4;
  }

  template <int THREADS>
  struct Copier {
    OctetCopy<4, THREADS> codes;
    ParameterCopy parameters;

    QC_DEVICE Copier(const GemmArgs& args, const Place& at, const Slice& slice)
        : codes(args, args.weights, at, slice) {
      parameters.plane<32, 1, 0>(args, args.offsets, 8, args.depth / 256, 0, at, slice);
      parameters.plane<16, 2, 32>(args, args.scales, 5, args.depth / 32, RUNS_AT, at, slice);
    }

    QC_DEVICE void start(u32 weights_at, u32 parameters_at, int tile) const {
      codes.start(weights_at, tile);
      parameters.start(parameters_at, tile);
    }
  };

  static QC_DEVICE void refresh(const GemmArgs&, Columns& columns, u32 shared, int k0, const Place& at) {
    if (QC_PLANTED(STALE_SCALES) && columns.group >= 0) return;
    const u32 column = at.half * 64 + at.g * 8;
    if (columns.group != k0 >> 8 && !(QC_PLANTED(STALE_FACTORS) && columns.group >= 0)) {
      columns.group = k0 >> 8;
      const u32x4 low = load_shared_u32x4(shared + column * 4), high = load_shared_u32x4(shared + column * 4 + 16);
      const u32 factors[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int j = 0; j < 8; j++) {
        columns.d[j] = float_from_f16(factors[j] & 0xFFFF), columns.dmin[j] = float_from_f16(factors[j] >> 16);
        columns.d_bias[j] = mul_f32(columns.d[j], -32768.f), columns.dmin_bias[j] = mul_f32(columns.dmin[j], -32768.f);
      }
    }
    const u32x4 runs = load_shared_u32x4(shared + RUNS_AT + at.slab * RUN_ROW + column * 2);
    const u32 pairs[4] = {runs.x, runs.y, runs.z, runs.w};
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      float scale[2] = {columns.d_bias[j], columns.d_bias[j + 1]};
      float minimum[2] = {columns.dmin_bias[j], columns.dmin_bias[j + 1]};
      fma_f32x2(columns.d[j], columns.d[j + 1], biased_float<0>(pairs[j / 2]), biased_float<2>(pairs[j / 2]), scale[0],
                scale[1]);
      fma_f32x2(columns.dmin[j], columns.dmin[j + 1], biased_float<1>(pairs[j / 2]), biased_float<3>(pairs[j / 2]),
                minimum[0], minimum[1]);
      columns.scale[0][j] = scale[0], columns.scale[0][j + 1] = scale[1];
      columns.minimum[j] = minimum[0], columns.minimum[j + 1] = minimum[1];
    }
  }

  static QC_DEVICE Square load(u32 shared, const Place& at) { return NibbleSquare::load(shared, at); }

  static QC_DEVICE void decode(const Square& square, const Columns&, int pair, u32 (&first)[4], u32 (&second)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 bits = square.bits(pair, i);
      first[i] = Act::low_code(and_or(bits, 0x000F000Fu, Act::CODE), Act::low_offset(0));
      second[i] = Act::high_code(and_or(bits, 0x00F000F0u, Act::HIGH_CODE), Act::high_offset(0));
    }
  }
};

// Q6_K: weight = (d * scale) * (code - 32) in runs of 16. A lane's octet is four inputs of each run of its slab, so
// that each mma stays within one run. Lower four bits of codes as in the int4 layout; upper two: words [K/8][N/8][4],
// word i being inputs 2i (lower half) and 2i + 1 (upper half) of the eight outputs, lowest bits first. Scales: uint8
// [K/16][N], 128 more than the signed ones; offsets: float16 d [K/256][N].
template <class Act>
struct Q6K {
  static constexpr int LOW_BYTES = TILE_K * TILE_N / 2, WEIGHT_BYTES = LOW_BYTES + TILE_K * TILE_N / 4, RUNS = 2;
  static constexpr int DECODE_BLOCKS = 8;
  static constexpr int FACTOR_ROW = TILE_N * 2, RUN_ROW = TILE_N, RUNS_AT = FACTOR_ROW;
  static constexpr int PARAMETER_BYTES = FACTOR_ROW + 4 * RUN_ROW;
  static constexpr bool SPLIT_OCTETS = true, MINIMUMS = false;
  struct Square {
    NibbleSquare low;
    u32 high[4];  // of a pair of inputs each
  };
  struct Columns {
    float scale[2][8], minimum[8];
    float d[8], d_bias[8];  // as in Q4K
    int group;
  };

  static QC_DEVICE void expert(GemmArgs& args, size_t e) {
    args.weights += e * args.depth * args.columns / 2;
    args.weights_high += e * args.depth * args.columns / 4;
    args.scales += e * (args.depth / 16) * args.columns;
    args.offsets += e * (args.depth / 256) * args.columns * 2;
  }

  template <int THREADS>
  struct Copier {
    OctetCopy<4, THREADS> low;
    OctetCopy<2, THREADS> high;
    ParameterCopy parameters;

    QC_DEVICE Copier(const GemmArgs& args, const Place& at, const Slice& slice)
        : low(args, args.weights, at, slice), high(args, args.weights_high, at, slice) {
      parameters.plane<16, 1, 0>(args, args.offsets, 8, args.depth / 256, 0, at, slice);
      parameters.plane<8, 4, 32>(args, args.scales, 4, args.depth / 16, RUNS_AT, at, slice);
    }

    QC_DEVICE void start(u32 weights_at, u32 parameters_at, int tile) const {
      low.start(weights_at, tile);
      high.start(weights_at + LOW_BYTES, tile);
      parameters.start(parameters_at, tile);
    }
  };

  static QC_DEVICE void refresh(const GemmArgs&, Columns& columns, u32 shared, int k0, const Place& at) {
    if (QC_PLANTED(STALE_SCALES) && columns.group >= 0) return;
    const u32 column = at.half * 64 + at.g * 8;
    if (columns.group != k0 >> 8 && !(QC_PLANTED(STALE_FACTORS) && columns.group >= 0)) {
      columns.group = k0 >> 8;
      const u32x4 factors = load_shared_u32x4(shared + column * 2);
      const u32 pairs[4] = {factors.x, factors.y, factors.z, factors.w};
#pragma unroll
      for (int j = 0; j < 8; j++) {
        columns.d[j] = float_from_f16(j & 1 ? pairs[j / 2] >> 16 : pairs[j / 2] & 0xFFFF);
        columns.d_bias[j] = mul_f32(columns.d[j], -(32768.f + 128.f));
      }
    }
#pragma unroll
    for (int run = 0; run < 2; run++) {
      const u32 row = at.slab * 2 + (QC_PLANTED(RUNS_SWAPPED) ? 1 - run : run);
      const u32x2 bytes = load_shared_u32x2(shared + RUNS_AT + row * RUN_ROW + column);
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const u32 scales = j ? bytes.y : bytes.x;
        const float biased[4] = {biased_float<0>(scales), biased_float<1>(scales), biased_float<2>(scales),
                                 biased_float<3>(scales)};
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          float (&scale)[8] = columns.scale[run];
          scale[j + i] = columns.d_bias[j + i], scale[j + i + 1] = columns.d_bias[j + i + 1];
          fma_f32x2(columns.d[j + i], columns.d[j + i + 1], biased[i], biased[i + 1], scale[j + i], scale[j + i + 1]);
        }
      }
    }
  }

  static QC_DEVICE Square load(u32 shared, const Place& at) {
    const u32 octet = at.slab * 4 + at.t;
    const u32x4 high = load_shared_u32x4(shared + LOW_BYTES + octet_offset<2>(octet, at.half * 8 + at.g));
    return Square{NibbleSquare::load(shared, at), {high.x, high.y, high.z, high.w}};
  }

  static QC_DEVICE void decode(const Square& square, const Columns&, int pair, u32 (&first)[4], u32 (&second)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // The upper bits of the first output from bit 4 on, of the second one from bit 8 on.
      const u32 high = square.high[i];
      const u32 upper = QC_PLANTED(HIGH_BITS_LOST) ? 0 : pair < 2 ? high << (4 - 2 * pair) : high >> (2 * pair);
      const u32 bits = square.low.bits(pair, i);
      first[i] = Act::low_code(and_or(upper, 0x00300030u, and_or(bits, 0x000F000Fu, Act::CODE)), Act::low_offset(32));
      second[i] =
          Act::high_code(and_or(upper, 0x03000300u, and_or(bits, 0x00F000F0u, Act::HIGH_CODE)), Act::high_offset(32));
    }
  }
};
