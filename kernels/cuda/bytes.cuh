// Codes of eight bits, octet-major: units of eight bytes [K/8][N], byte i being input i of the octet.
#pragma once
#include "gemm.cuh"

struct ByteWeights {
  static constexpr int WEIGHT_BYTES = TILE_K * TILE_N, RUNS = 1, DECODE_BLOCKS = 8;
  static constexpr bool SPLIT_OCTETS = false, MINIMUMS = false;
  struct Columns {
    float scale[1][8], minimum[8];
    int group;
  };
  struct Square {
    u32 words[16];  // two for each output

    QC_DEVICE u32 word(int output, int i) const {
      return words[2 * output + i] & (QC_PLANTED(SIGN_LOST) ? 0x7F7F7F7Fu : ~0u);
    }
  };

  template <int THREADS>
  struct Copier {
    OctetCopy<8, THREADS> codes;
    ParameterCopy parameters;

    QC_DEVICE Copier(const GemmArgs& args, const Place& at, const Slice& slice)
        : codes(args, args.weights, at, slice) {}

    QC_DEVICE void start(u32 weights_at, u32 parameters_at, int tile) const {
      codes.start(weights_at, tile);
      parameters.start(parameters_at, tile);
    }
  };

  static QC_DEVICE Square load(u32 shared, const Place& at) {
    Square square;
    const u32 octet = at.slab * 4 + (QC_PLANTED(WRONG_LANE) ? at.g & 3 : at.t);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32x4 v = load_shared_u32x4(shared + octet_offset<8>(octet, at.half * 32 + at.g * 4 + i));
      square.words[4 * i] = v.x, square.words[4 * i + 1] = v.y, square.words[4 * i + 2] = v.z,
                       square.words[4 * i + 3] = v.w;
    }
    return square;
  }
};

// E4M3 numbers with float32 scales [groups][N]: blocks, whose rows repeat their scale, whole rows, or whole weights.
template <class Act>
struct Fp8 : ByteWeights {
  static constexpr int SCALE_ROW = TILE_N * 4, PARAMETER_BYTES = 2 * SCALE_ROW;

  static QC_DEVICE int groups(const GemmArgs& args) { return ((args.depth - 1) >> args.group_shift) + 1; }

  static QC_DEVICE void expert(GemmArgs& args, size_t e) {
    args.weights += e * args.depth * args.columns;
    args.scales += e * groups(args) * args.columns * 4;
  }

  template <int THREADS>
  struct Copier : ByteWeights::Copier<THREADS> {
    QC_DEVICE Copier(const GemmArgs& args, const Place& at, const Slice& slice)
        : ByteWeights::Copier<THREADS>(args, at, slice) {
      this->parameters.template plane<32, 2, 0>(args, args.scales, args.group_shift, groups(args), 0, at, slice);
    }
  };

  static QC_DEVICE void refresh(const GemmArgs& args, Columns& columns, u32 shared, int k0, const Place& at) {
    const int group = (k0 + (int)at.slab * SLAB) >> args.group_shift;
    if (group == columns.group || (QC_PLANTED(STALE_SCALES) && columns.group >= 0)) return;
    columns.group = group;
    const u32 row = shared + (group - (k0 >> args.group_shift)) * SCALE_ROW + (at.half * 64 + at.g * 8) * 4;
    const f32x4 low = load_shared_f32x4(row), high = load_shared_f32x4(row + 16);
    const float scales[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int j = 0; j < 8; j++) columns.scale[0][j] = mul_f32(scales[j], float_from_bits(Act::E4M3_SCALE_BITS));
  }

  static QC_DEVICE void decode(const Square& square, const Columns&, int pair, u32 (&first)[4], u32 (&second)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      first[i] = Act::e4m3_pair(square.word(first_of(pair), i / 2), i & 1);
      second[i] = Act::e4m3_pair(square.word(second_of(pair), i / 2), i & 1);
    }
  }
};

// ggml's Q8_0: signed bytes with float16 scales [K/32][N].
template <class Act>
struct Q8_0 : ByteWeights {
  static constexpr int SCALE_ROW = TILE_N * 2, PARAMETER_BYTES = 2 * SCALE_ROW;

  static QC_DEVICE void expert(GemmArgs& args, size_t e) {
    args.weights += e * args.depth * args.columns;
    args.scales += e * (args.depth / 32) * args.columns * 2;
  }

  template <int THREADS>
  struct Copier : ByteWeights::Copier<THREADS> {
    QC_DEVICE Copier(const GemmArgs& args, const Place& at, const Slice& slice)
        : ByteWeights::Copier<THREADS>(args, at, slice) {
      this->parameters.template plane<16, 2, 0>(args, args.scales, 5, args.depth / 32, 0, at, slice);
    }
  };

  static QC_DEVICE void refresh(const GemmArgs&, Columns& columns, u32 shared, int, const Place& at) {
    if (QC_PLANTED(STALE_SCALES) && columns.group >= 0) return;
    columns.group = 0;
    const u32x4 scales = load_shared_u32x4(shared + at.slab * SCALE_ROW + (at.half * 64 + at.g * 8) * 2);
    const u32 pairs[4] = {scales.x, scales.y, scales.z, scales.w};
#pragma unroll
    for (int j = 0; j < 8; j++)
      columns.scale[0][j] = float_from_f16(j & 1 ? pairs[j / 2] >> 16 : pairs[j / 2] & 0xFFFF);
  }

  static QC_DEVICE void decode(const Square& square, const Columns&, int pair, u32 (&first)[4], u32 (&second)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      first[i] = Act::int8_pair(square.word(first_of(pair), i / 2), i & 1);
      second[i] = Act::int8_pair(square.word(second_of(pair), i / 2), i & 1);
    }
  }
};
