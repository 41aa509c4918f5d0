// Four-bit integers with scales and zero points of groups: weight = (code - zero_point) * scale.
#pragma once
#include "gemm.cuh"

// What AWQ's and the octet-major layout share: scales [groups, N] of 16 bits, zero points [groups, N/8] words of 8.
template <class Act>
struct Int4Parameters {
  static constexpr int SCALE_ROW = TILE_N * 2, ZERO_ROW = TILE_N / 2, ZEROS_AT = 2 * SCALE_ROW;
  static constexpr int PARAMETER_BYTES = 2 * (SCALE_ROW + ZERO_ROW), RUNS = 1;
  static constexpr bool SPLIT_OCTETS = false, MINIMUMS = false;

  struct Columns {
    float scale[1][8], minimum[8];
    u32 offset[8];  // for Act::int4_pair
    int group;
  };

  static QC_DEVICE int groups(const GemmArgs& args) { return ((args.depth - 1) >> args.group_shift) + 1; }

  static QC_DEVICE void expert(GemmArgs& args, size_t e) {
    args.weights += e * args.depth * args.columns / 2;
    args.scales += e * groups(args) * args.columns * 2;
    args.offsets += e * groups(args) * args.columns / 2;
  }

  // The two slabs of a tile may be of two groups: two rows.
  static QC_DEVICE ParameterCopy copy_groups(const GemmArgs& args, const Place& at) {
    ParameterCopy copy;
    copy.plane<16, 2, 0>(args, args.scales, args.group_shift, groups(args), 0, at);
    copy.plane<4, 2, 32>(args, args.offsets, args.group_shift, groups(args), ZEROS_AT, at);
    return copy;
  }

  // `nibble_of(j)`: where output 8g + j lies in a word of zero points.
  template <class NibbleOf>
  static QC_DEVICE void refresh_groups(const GemmArgs& args, Columns& columns, u32 shared, int k0, const Place& at,
                                       NibbleOf nibble_of) {
    const int group = (k0 + (int)at.slab * SLAB) >> args.group_shift;
    if (group == columns.group || (QC_PLANTED(STALE_SCALES) && columns.group >= 0)) return;
    columns.group = group;
    const u32 row = group - (k0 >> args.group_shift), octet = at.half * 8 + at.g;
    const u32x4 scales = load_shared_u32x4(shared + row * SCALE_ROW + octet * 16);
    const u32 zeros = load_shared_u32(shared + ZEROS_AT + row * ZERO_ROW + octet * 4);
    const u32 common = QC_PLANTED(ZERO_OFFSET_LOST) ? 0 : (u32)args.zero_offset * 0x00010001u;
    const u32 pairs[4] = {scales.x, scales.y, scales.z, scales.w};
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const u32 bits = j & 1 ? pairs[j / 2] >> 16 : pairs[j / 2] & 0xFFFF;
      columns.scale[0][j] = args.scales_bf16 ? float_from_bits(bits << 16) : float_from_f16(bits);
      columns.offset[j] = Act::int4_offset(zeros >> (4 * nibble_of(j)) & 15) + common;
    }
  }
};

// AutoAWQ's checkpoint layout as it is: words [K][N/8] of 8 outputs, nibble i holding output ORDER[i] of
// 0,2,4,6,1,3,5,7.
template <class Act>
struct Awq : Int4Parameters<Act> {
  typedef Int4Parameters<Act> Base;
  static constexpr int WEIGHT_BYTES = TILE_K * TILE_N / 2;
  struct Square {
    u32 even[4], odd[4];  // [pair of inputs]: nibble c of the lower and upper half is output 2c (odd: 2c + 1)
  };

  // Two rows of 64 bytes share a line. Lanes t = 0..3 read rows 8t + i, so t picks which quarter of the line is
  // swapped.
  static QC_DEVICE u32 word_offset(u32 row, u32 chunk) {
    const u32 flip = QC_PLANTED(WEIGHTS_UNSWIZZLED) ? 0 : (row >> 3 & 3) << 1;
    return (row >> 1) * 128 + ((((row & 1) * 4 + chunk) ^ flip) << 4);
  }

  struct Copier {
    static constexpr int CHUNKS = 4, ROWS_APART = THREADS / CHUNKS;
    const unsigned char* from;
    u32 to[2], stride;
    int rows;  // as in OctetCopy
    ParameterCopy parameters;

    QC_DEVICE Copier(const GemmArgs& args, const Place& at) : parameters(Base::copy_groups(args, at)) {
      const u32 row = at.thread / CHUNKS, chunk = at.thread % CHUNKS;
      stride = args.columns / 2;
      from = args.weights + (size_t)row * stride + (size_t)at.n0 / 2 + chunk * 16;
      rows = at.n0 + (int)chunk * 32 < args.columns ? args.depth - (int)row : 0;
      if (QC_PLANTED(WEIGHTS_OVERRUN)) rows = 1 << 30;
#pragma unroll
      for (int i = 0; i < 2; i++) to[i] = word_offset(row + i * ROWS_APART, chunk);
    }

    QC_DEVICE void start(u32 weights_at, u32 parameters_at, int tile) const {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row = tile * TILE_K + i * ROWS_APART;
        copy_async_16(weights_at + to[i], from + (u64)(u32)row * stride, row < rows);
      }
      parameters.start(parameters_at, tile);
    }
  };

  static QC_DEVICE void refresh(const GemmArgs& args, typename Base::Columns& columns, u32 shared, int k0,
                                const Place& at) {
    Base::refresh_groups(args, columns, shared, k0, at, [](int j) { return (j & 1) * 4 + j / 2; });
  }

  static QC_DEVICE Square load(u32 shared, const Place& at) {
    const u32 octet = QC_PLANTED(WRONG_LANE) ? at.g & 3 : at.t, word = at.half * 8 + at.g;
    const u32 first = shared + word_offset(at.slab * SLAB + octet * 8, word / 4) + word % 4 * 4;
    u32 words[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
      words[i] = load_shared_u32((i & 1 ? first ^ 64 : first) + i / 2 * 128);  // word_offset(row + i)
    Square square;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      square.even[i] = permute_bytes<0x5410>(words[2 * i], words[2 * i + 1]);
      square.odd[i] = permute_bytes<0x7632>(words[2 * i], words[2 * i + 1]);
    }
    return square;
  }

  static QC_DEVICE void decode(const Square& square, const typename Base::Columns& columns, int j, u32 (&pairs)[4]) {
    const int nibble = QC_PLANTED(WRONG_NIBBLE) ? j & 3 : j / 2;
#pragma unroll
    for (int i = 0; i < 4; i++)
      pairs[i] = Act::int4_pair(j & 1 ? square.odd[i] : square.even[i], nibble, columns.offset[j]);
  }
};

// Octet-major: words [K/8][N], nibble i of a word holding input ORDER[i] of the octet, so that nibbles i and i + 4 are
// neighbours. GPTQ's and compressed-tensors' weights are brought into this form when they are loaded.
template <class Act>
struct Int4 : Int4Parameters<Act> {
  typedef Int4Parameters<Act> Base;
  static constexpr int WEIGHT_BYTES = TILE_K * TILE_N / 2;
  struct Square {
    u32 words[8];
  };

  struct Copier {
    OctetCopy<4> codes;
    ParameterCopy parameters;

    QC_DEVICE Copier(const GemmArgs& args, const Place& at)
        : codes(args, args.weights, at), parameters(Base::copy_groups(args, at)) {}

    QC_DEVICE void start(u32 weights_at, u32 parameters_at, int tile) const {
      codes.start(weights_at, tile);
      parameters.start(parameters_at, tile);
    }
  };

  static QC_DEVICE void refresh(const GemmArgs& args, typename Base::Columns& columns, u32 shared, int k0,
                                const Place& at) {
    Base::refresh_groups(args, columns, shared, k0, at, [](int j) { return j; });
  }

  static QC_DEVICE Square load(u32 shared, const Place& at) {
    const u32 octet = at.slab * 4 + (QC_PLANTED(WRONG_LANE) ? at.g & 3 : at.t), chunk = at.half * 16 + at.g * 2;
    const u32x4 low = load_shared_u32x4(shared + octet_offset<4>(octet, chunk));
    const u32x4 high = load_shared_u32x4(shared + octet_offset<4>(octet, chunk + 1));
    return Square{{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
  }

  static QC_DEVICE void decode(const Square& square, const typename Base::Columns& columns, int j, u32 (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      pairs[i] = Act::int4_pair(square.words[j], QC_PLANTED(WRONG_NIBBLE) ? 3 - i : i, columns.offset[j]);
  }
};
