// ggml's K types in planes: super-blocks of 256 inputs whose factors are float16, and smaller runs with integer scales.
#pragma once
#include "gemm.cuh"

// The `nibbles` of octet-major words: as in the int4 layout.
struct NibbleSquare {
  u32 words[8];

  static QC_DEVICE NibbleSquare load(u32 shared, const Place& at) {
    const u32 octet = at.slab * 4 + (QC_PLANTED(WRONG_LANE) ? at.g & 3 : at.t), chunk = at.half * 16 + at.g * 2;
    const u32x4 low = load_shared_u32x4(shared + octet_offset<4>(octet, chunk));
    const u32x4 high = load_shared_u32x4(shared + octet_offset<4>(octet, chunk + 1));
    return NibbleSquare{{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
  }
};

// Q4_K: weight = (d * scale) * code - (dmin * minimum) in runs of 32. Codes as in the int4 layout; scales [K/32][N]
// pairs of bytes (scale, minimum) of six bits each; offsets [K/256][N] pairs of float16 (d, dmin).
template <class Act>
struct Q4K {
  static constexpr int WEIGHT_BYTES = TILE_K * TILE_N / 2, RUNS = 1;
  static constexpr int FACTOR_ROW = TILE_N * 4, RUN_ROW = TILE_N * 2, RUNS_AT = FACTOR_ROW;
  static constexpr int PARAMETER_BYTES = FACTOR_ROW + 2 * RUN_ROW;
  static constexpr bool SPLIT_OCTETS = false, MINIMUMS = true;
  typedef NibbleSquare Square;
  struct Columns {
    float scale[1][8], minimum[8];
    int group;
  };

  static QC_DEVICE void expert(GemmArgs& args, size_t e) {
    args.weights += e * args.depth * args.columns / 2;
    args.scales += e * (args.depth / 32) * args.columns * 2;
    args.offsets += e * (args.depth / 256) * args.columns * 4;
  }

  struct Copier {
    OctetCopy<4> codes;
    ParameterCopy parameters;

    QC_DEVICE Copier(const GemmArgs& args, const Place& at) : codes(args, args.weights, at) {
      parameters.plane<32, 1, 0>(args, args.offsets, 8, args.depth / 256, 0, at);
      parameters.plane<16, 2, 32>(args, args.scales, 5, args.depth / 32, RUNS_AT, at);
    }

    QC_DEVICE void start(u32 weights_at, u32 parameters_at, int tile) const {
      codes.start(weights_at, tile);
      parameters.start(parameters_at, tile);
    }
  };

  static QC_DEVICE void refresh(const GemmArgs&, Columns& columns, u32 shared, int, const Place& at) {
    if (QC_PLANTED(STALE_SCALES) && columns.group >= 0) return;
    columns.group = 0;
    const u32 column = at.half * 64 + at.g * 8;
    const u32x4 low = load_shared_u32x4(shared + column * 4), high = load_shared_u32x4(shared + column * 4 + 16);
    const u32x4 runs = load_shared_u32x4(shared + RUNS_AT + at.slab * RUN_ROW + column * 2);
    const u32 factors[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const u32 pairs[4] = {runs.x, runs.y, runs.z, runs.w};
#pragma unroll
    for (int j = 0; j < 8; j++) {
      // 0x6400 | byte is the float16 number 1024 + byte.
      const u32 bits =
          j & 1 ? permute_bytes<0x4342>(pairs[j / 2], 0x64646464u) : permute_bytes<0x4140>(pairs[j / 2], 0x64646464u);
      const u32 integers = add_f16x2(bits, 0xE400E400u);
      columns.scale[0][j] = mul_f32(float_from_f16(factors[j] & 0xFFFF), float_from_f16(integers & 0xFFFF));
      columns.minimum[j] = mul_f32(float_from_f16(factors[j] >> 16), float_from_f16(integers >> 16));
    }
  }

  static QC_DEVICE Square load(u32 shared, const Place& at) { return NibbleSquare::load(shared, at); }

  static QC_DEVICE void decode(const Square& square, const Columns&, int j, u32 (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      pairs[i] = Act::int4_pair(square.words[j], QC_PLANTED(WRONG_NIBBLE) ? 3 - i : i, Act::int4_offset(0));
  }
};

// Q6_K: weight = (d * scale) * (code - 32) in runs of 16. A lane's octet is four inputs of each run of its slab, so
// that each mma stays within one run. Lower four bits of codes as in the int4 layout; upper two: 16 bits [K/8][N], byte
// 0 for the first inputs of the four pairs, byte 1 for the second ones, lowest bits first. Scales: int8 [K/16][N];
// offsets: float16 d [K/256][N].
template <class Act>
struct Q6K {
  static constexpr int LOW_BYTES = TILE_K * TILE_N / 2, WEIGHT_BYTES = LOW_BYTES + TILE_K * TILE_N / 4, RUNS = 2;
  static constexpr int FACTOR_ROW = TILE_N * 2, RUN_ROW = TILE_N, RUNS_AT = FACTOR_ROW;
  static constexpr int PARAMETER_BYTES = FACTOR_ROW + 4 * RUN_ROW;
  static constexpr bool SPLIT_OCTETS = true, MINIMUMS = false;
  struct Square {
    NibbleSquare low;
    u32 high[4];  // of two outputs each
  };
  struct Columns {
    float scale[2][8], minimum[8];
    int group;
  };

  static QC_DEVICE void expert(GemmArgs& args, size_t e) {
    args.weights += e * args.depth * args.columns / 2;
    args.weights_high += e * args.depth * args.columns / 4;
    args.scales += e * (args.depth / 16) * args.columns;
    args.offsets += e * (args.depth / 256) * args.columns * 2;
  }

  struct Copier {
    OctetCopy<4> low;
    OctetCopy<2> high;
    ParameterCopy parameters;

    QC_DEVICE Copier(const GemmArgs& args, const Place& at)
        : low(args, args.weights, at), high(args, args.weights_high, at) {
      parameters.plane<16, 1, 0>(args, args.offsets, 8, args.depth / 256, 0, at);
      parameters.plane<8, 4, 32>(args, args.scales, 4, args.depth / 16, RUNS_AT, at);
    }

    QC_DEVICE void start(u32 weights_at, u32 parameters_at, int tile) const {
      low.start(weights_at, tile);
      high.start(weights_at + LOW_BYTES, tile);
      parameters.start(parameters_at, tile);
    }
  };

  static QC_DEVICE void refresh(const GemmArgs&, Columns& columns, u32 shared, int, const Place& at) {
    if (QC_PLANTED(STALE_SCALES) && columns.group >= 0) return;
    columns.group = 0;
    const u32 column = at.half * 64 + at.g * 8;
    const u32x4 factors = load_shared_u32x4(shared + column * 2);
    const u32 pairs[4] = {factors.x, factors.y, factors.z, factors.w};
#pragma unroll
    for (int run = 0; run < 2; run++) {
      const u32 row = at.slab * 2 + (QC_PLANTED(RUNS_SWAPPED) ? 1 - run : run);
      const u32x2 bytes = load_shared_u32x2(shared + RUNS_AT + row * RUN_ROW + column);
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const u32 integers = F16::int8_pair(j < 4 ? bytes.x : bytes.y, j / 2 & 1);
        columns.scale[run][j] = mul_f32(float_from_f16(pairs[j / 2] & 0xFFFF), float_from_f16(integers & 0xFFFF));
        columns.scale[run][j + 1] = mul_f32(float_from_f16(pairs[j / 2] >> 16), float_from_f16(integers >> 16));
      }
    }
  }

  static QC_DEVICE Square load(u32 shared, const Place& at) {
    const u32 octet = at.slab * 4 + at.t;
    const u32x4 high = load_shared_u32x4(shared + LOW_BYTES + octet_offset<2>(octet, at.half * 8 + at.g));
    return Square{NibbleSquare::load(shared, at), {high.x, high.y, high.z, high.w}};
  }

  static QC_DEVICE void decode(const Square& square, const Columns&, int j, u32 (&pairs)[4]) {
    const u32 high =
        j & 1 ? permute_bytes<0x4342>(square.high[j / 2], 0) : permute_bytes<0x4140>(square.high[j / 2], 0);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 upper = QC_PLANTED(HIGH_BITS_LOST) ? 0 : i < 3 ? high << (4 - 2 * i) : high >> 2;
      pairs[i] = Act::int6_pair(and_or(upper, 0x00300030u, (square.low.words[j] >> (4 * i)) & 0x000F000Fu));
    }
  }
};
