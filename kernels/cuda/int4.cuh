// Four-bit integers with scales and zero points of groups: weight = (code - zero_point) * scale. Zero points lie as
// AutoAWQ's: words [groups, N/8], nibble i being that of output 0,2,4,6,1,3,5,7 [i] of eight.
#pragma once
#include "gemm.cuh"

// What AWQ's and the octet-major layout share: scales [groups, N] of 16 bits, zero points [groups, N/8] words of 8.
template <class Act>
struct Int4Parameters {
  static constexpr int SCALE_ROW = TILE_N * 2, ZERO_ROW = TILE_N / 2, ZEROS_AT = 2 * SCALE_ROW;
  static constexpr int PARAMETER_BYTES = 2 * (SCALE_ROW + ZERO_ROW), RUNS = 1, DECODE_BLOCKS = 8;
  static constexpr bool SPLIT_OCTETS = false, MINIMUMS = false;

  struct Columns {
    float scale[1][8], minimum[8];
    u32 offset[8];  // for Act::low_code and high_code
    int group;
  };

  static QC_DEVICE int groups(const GemmArgs& args) { return ((args.depth - 1) >> args.group_shift) + 1; }

  static QC_DEVICE void expert(GemmArgs& args, size_t e) {
    args.weights += e * args.depth * args.columns / 2;
    args.scales += e * groups(args) * args.columns * 2;
    args.offsets += e * groups(args) * args.columns / 2;
  }

  // The two slabs of a tile may be of two groups: two rows.
  static QC_DEVICE ParameterCopy copy_groups(const GemmArgs& args, const Place& at, const Slice& slice) {
    ParameterCopy copy;
    copy.plane<16, 2, 0>(args, args.scales, args.group_shift, groups(args), 0, at, slice);
    copy.plane<4, 2, 32>(args, args.offsets, args.group_shift, groups(args), ZEROS_AT, at, slice);
    return copy;
  }

  static QC_DEVICE void refresh(const GemmArgs& args, Columns& columns, u32 shared, int k0, const Place& at) {
    const int group = (k0 + (int)at.slab * SLAB) >> args.group_shift;
    if (group == columns.group || (QC_PLANTED(STALE_SCALES) && columns.group >= 0)) return;
    columns.group = group;
    const u32 row = group - (k0 >> args.group_shift), octet = at.half * 8 + at.g;
    const u32x4 scales = load_shared_u32x4(shared + row * SCALE_ROW + octet * 16);
    const u32 zeros = load_shared_u32(shared + ZEROS_AT + row * ZERO_ROW + octet * 4);
    const u32 pairs[4] = {scales.x, scales.y, scales.z, scales.w};
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const u32 bits = j & 1 ? pairs[j / 2] >> 16 : pairs[j / 2] & 0xFFFF;
      columns.scale[0][j] = args.scales_bf16 ? float_from_bits(bits << 16) : float_from_f16(bits);
    }
    // Bytes: the zero points of outputs 0, 4, 1, 5, and of 2, 6, 3, 7.
    const u32 common = QC_PLANTED(ZERO_OFFSET_LOST) ? 0 : (u32)args.zero_offset * 0x01010101u;
    const u32 low = (zeros >> (QC_PLANTED(ZERO_POINTS_SWAPPED) ? 4 : 0) & 0x0F0F0F0Fu) + common;
    const u32 high = (zeros >> (QC_PLANTED(ZERO_POINTS_SWAPPED) ? 0 : 4) & 0x0F0F0F0Fu) + common;
    columns.offset[0] = Act::template low_offset_of<0>(low);
    columns.offset[4] = Act::template low_offset_of<1>(low);
    columns.offset[1] = Act::template low_offset_of<2>(low);
    columns.offset[5] = Act::template low_offset_of<3>(low);
    columns.offset[2] = Act::template high_offset_of<0>(high);
    columns.offset[6] = Act::template high_offset_of<1>(high);
    columns.offset[3] = Act::template high_offset_of<2>(high);
    columns.offset[7] = Act::template high_offset_of<3>(high);
  }

  typedef NibbleSquare Square;

  static QC_DEVICE void decode(const Square& square, const Columns& columns, int pair, u32 (&first)[4],
                               u32 (&second)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 bits = square.bits(pair, i);
      first[i] = Act::low_code(and_or(bits, 0x000F000Fu, Act::CODE), columns.offset[first_of(pair)]);
      second[i] = Act::high_code(and_or(bits, 0x00F000F0u, Act::HIGH_CODE), columns.offset[second_of(pair)]);
    }
  }
};

// AutoAWQ's checkpoint layout as it is: words [K][N/8] of 8 outputs, nibble i holding output ORDER[i] of
// 0,2,4,6,1,3,5,7.
template <class Act>
struct Awq : Int4Parameters<Act> {
  typedef Int4Parameters<Act> Base;
  static constexpr int WEIGHT_BYTES = TILE_K * TILE_N / 2;

  // Two rows of 64 bytes share a line. Lanes t = 0..3 read rows 8t + i, so t picks which quarter of the line is
  // swapped.
  static QC_DEVICE u32 word_offset(u32 row, u32 chunk) {
    const u32 flip = QC_PLANTED(WEIGHTS_UNSWIZZLED) ? 0 : (row >> 3 & 3) << 1;
    return (row >> 1) * 128 + ((((row & 1) * 4 + chunk) ^ flip) << 4);
  }

  template <int THREADS>
  struct Copier {
    static constexpr int CHUNKS = 4, ROWS_APART = THREADS / CHUNKS, COPIES = TILE_K / ROWS_APART;
    const unsigned char* from[COPIES];
    u32 to[COPIES], tile_bytes;
    int limit[2];  // the first tile whose first or second slab there is not
    ParameterCopy parameters;

    QC_DEVICE Copier(const GemmArgs& args, const Place& at, const Slice& slice)
        : parameters(Base::copy_groups(args, at, slice)) {
      const u32 row = at.thread / CHUNKS, chunk = at.thread % CHUNKS, row_bytes = args.columns / 2;
      tile_bytes = row_bytes * TILE_K;
#pragma unroll
      for (int i = 0; i < COPIES; i++) {
        from[i] = args.weights + (size_t)(row + i * ROWS_APART) * row_bytes + (size_t)at.n0 / 2 + chunk * 16;
        to[i] = word_offset(row + i * ROWS_APART, chunk);
      }
#pragma unroll
      for (int slab = 0; slab < 2; slab++) {
        const int tiles = at.n0 + (int)chunk * 32 < args.columns ? (args.depth + (1 - slab) * SLAB) / TILE_K : 0;
        limit[slab] = tiles < slice.last && !QC_PLANTED(WEIGHTS_OVERRUN) ? tiles : slice.last;
      }
    }

    QC_DEVICE void start(u32 weights_at, u32 parameters_at, int tile) const {
#pragma unroll
      for (int i = 0; i < COPIES; i++)
        copy_async_16(weights_at + to[i], from[i] + (u64)(u32)tile * tile_bytes, tile < limit[i * ROWS_APART / SLAB]);
      parameters.start(parameters_at, tile);
    }
  };

  typedef NibbleSquare Square;

  static QC_DEVICE Square load(u32 shared, const Place& at) {
    const u32 octet = QC_PLANTED(WRONG_LANE) ? at.g & 3 : at.t, word = at.half * 8 + at.g;
    const u32 first = word_offset(octet * 8, word / 4) + word % 4 * 4;
    u32 words[8];
#pragma unroll
    for (int i = 0; i < 8; i++)  // word_offset(slab * SLAB + octet * 8 + i)
      words[i] = load_shared_u32(shared + (i & 1 ? first ^ 64 : first) + at.slab * (SLAB / 2 * 128) + i / 2 * 128);
    Square square;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      square.even[i] = permute_bytes<0x5410>(words[2 * i], words[2 * i + 1]);
      square.odd[i] = permute_bytes<0x7632>(words[2 * i], words[2 * i + 1]);
    }
    return square;
  }
};

// Octet-major: NibbleSquare's words [K/8][N/8][8]. GPTQ's and compressed-tensors' weights are brought into this form
// when they are loaded.
template <class Act>
struct Int4 : Int4Parameters<Act> {
  typedef Int4Parameters<Act> Base;
  static constexpr int WEIGHT_BYTES = TILE_K * TILE_N / 2;

  template <int THREADS>
  struct Copier {
    OctetCopy<4, THREADS> codes;
    ParameterCopy parameters;

    QC_DEVICE Copier(const GemmArgs& args, const Place& at, const Slice& slice)
        : codes(args, args.weights, at, slice), parameters(Base::copy_groups(args, at, slice)) {}

    QC_DEVICE void start(u32 weights_at, u32 parameters_at, int tile) const {
      codes.start(weights_at, tile);
      parameters.start(parameters_at, tile);
    }
  };

  static QC_DEVICE NibbleSquare load(u32 shared, const Place& at) { return NibbleSquare::load(shared, at); }
};
