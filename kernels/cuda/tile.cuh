// What a block of threads works on: the argument block, the tile's sizes, and how its parts lie in shared memory.
//
// A tile is 64 inputs (k) by 128 outputs (n) of the weights. Warp w takes the 64 outputs of half w % 2, and of the two
// slabs of 32 inputs both, or for 16 and 32 rows slab w / 2. Within a slab, lane (g = lane / 4, t = lane % 4) owns the
// square of outputs 8g..8g+7 by the octet of inputs 8t..8t+7. Products do not care in which order k is summed, so any
// assignment of inputs to the tensor cores' k slots will do as long as weights and activations share it.
#pragma once
#include "intrinsics.cuh"

struct GemmArgs {
  const unsigned char* activations;   // [input rows, depth], float16 or bfloat16
  const unsigned char* weights;       // codes; with experts, one after the other, as all that follows
  const unsigned char* weights_high;  // Q6_K: the upper two bits
  const unsigned char* scales;        // the scales of runs of inputs
  const unsigned char* offsets;       // int4: zero points; Q4_K, Q6_K: factors of super-blocks
  unsigned char* output;  // [rows, columns] of the activations' type; gridDim.z > 1: float32 [gridDim.z, rows, columns]
  const int* row_ids;     // experts: rows sorted by expert, each expert's padded to whole row tiles by ids >= rows
  const int* tile_experts;  // experts: the expert of each row tile, -1 for none; null: a dense linear
  int rows;                 // rows of the output
  int columns;              // N, a multiple of 32
  int depth;                // K, a multiple of 32
  int rows_per_input;       // row r of the output is computed from row r / rows_per_input of the activations
  int group_shift;          // log2 of the inputs that share a scale, 5 to 31
  int zero_offset;          // int4: added to every stored zero point
  int scales_bf16;          // 16-bit scales are bfloat16, not float16
};

constexpr int TILE_N = 128;
constexpr int TILE_K = 64;
constexpr int SLAB = 32;
constexpr int STAGES = 4;

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// A block that computes 8 * ROW_OCTETS rows. Its shared memory: STAGES tiles of activations, weights and parameters, and
// in the same place, at the end, the sums that two warps exchange.
template <class Format, int ROW_OCTETS>
struct Block {
  static constexpr int THREADS = ROW_OCTETS == 1 ? 64 : 128;
  static constexpr int RESIDENT = ROW_OCTETS == 1 ? Format::DECODE_BLOCKS : 1;  // of an SM, at least
  static constexpr int WEIGHTS_AT = ROW_OCTETS * 8 * TILE_K * 2;
  static constexpr int PARAMETERS_AT = WEIGHTS_AT + Format::WEIGHT_BYTES;
  static constexpr int STAGE = round_up(PARAMETERS_AT + Format::PARAMETER_BYTES, 128);
  static constexpr int EXCHANGE = ROW_OCTETS * 4096;
  static constexpr int BYTES = STAGE * STAGES > EXCHANGE ? STAGE * STAGES : EXCHANGE;
};

// Where a thread stands in the tile.
struct Place {
  u32 thread, lane, g, t;
  u32 half;  // which 64 outputs
  u32 slab;  // which 32 inputs
  int n0;    // first output of the tile

  QC_DEVICE Place of_slab(u32 other) const { return {thread, lane, g, t, half, other, n0}; }
};

// The 16-byte chunks of a row of 64 activations are permuted so that the lanes of a quarter warp, which read the same
// chunks of neighbouring rows, touch all banks; rows 0..3 also spread over the four quarters of the line for 8-byte
// reads.
QC_DEVICE u32 activation_offset(u32 row, u32 chunk) {
  if (QC_PLANTED(ACTIVATIONS_UNSWIZZLED)) return row * 128 + chunk * 16;
  return row * 128 + ((chunk ^ ((row & 1) << 2 | (row & 2))) << 4);
}

// Octet-major weights: [K/8][N] units of UNIT bytes, each the codes of 8 inputs of one output. In shared memory the
// chunks of octet row t are permuted so that a quarter warp (t = 0..3, two values of g) touches all banks.
template <int UNIT>
QC_DEVICE u32 octet_offset(u32 row, u32 chunk) {
  const u32 t = row & 3;
  u32 flip = UNIT == 2 ? t << 1 : UNIT == 4 ? (t & 1) | (t & 2) << 1 : t;
  if (QC_PLANTED(WEIGHTS_UNSWIZZLED)) flip = 0;
  return row * (TILE_N * UNIT) + ((chunk ^ flip) << 4);
}

// What the copies of a block share: tiles from `last` on are not read; zeros take their place.
struct Slice {
  int first, last;
};

// A thread's part in copying tiles of octet-major weights: some chunks of one octet's row, equally far apart. What does
// not change from tile to tile is worked out once, so that the loop has few instructions besides the copies.
template <int UNIT, int THREADS>
struct OctetCopy {
  static constexpr int APART = THREADS / (TILE_K / 8), COPIES = TILE_N * UNIT / 16 / APART;
  const unsigned char* from;
  u32 to, tile_bytes;
  int limit[COPIES];  // the first tile that has no such chunk

  QC_DEVICE OctetCopy(const GemmArgs& args, const unsigned char* weights, const Place& at, const Slice& slice) {
    static_assert(APART >= 8, "octet_offset permutes eight chunks at most: those of a thread stay equally far apart");
    const u32 row = at.thread / APART, chunk = at.thread % APART, row_bytes = args.columns * UNIT;
    from = weights + (size_t)row * row_bytes + (size_t)at.n0 * UNIT + chunk * 16;
    to = octet_offset<UNIT>(row, chunk);
    tile_bytes = row_bytes * (TILE_K / 8);
    const int tiles = (args.depth / 8 - (int)row + TILE_K / 8 - 1) / (TILE_K / 8);
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      const bool inside = at.n0 + (int)(chunk + i * APART) * (16 / UNIT) < args.columns;
      limit[i] = QC_PLANTED(WEIGHTS_OVERRUN) || (inside && slice.last < tiles) ? slice.last : inside ? tiles : 0;
    }
  }

  QC_DEVICE void start(u32 shared, int tile) const {
    const unsigned char* row = from + (u64)(u32)tile * tile_bytes;
#pragma unroll
    for (int i = 0; i < COPIES; i++)
      copy_async_16(shared + to + i * APART * 16, row + i * APART * 16, tile < limit[i]);
  }
};

// A thread's part in copying tiles' parameters: at most one chunk, of one of several planes [rows, N]. Each plane has
// threads of its own.
struct ParameterCopy {
  const unsigned char* from = 0;
  u32 to = 0, stride = 0;
  int shift = 0;   // log2 of the inputs of a row of the plane
  int limit = -1;  // the first tile that has no such row: 0 where the outputs have ended, -1 for idle threads

  // A plane of BITS for every output, of which a tile needs ROWS rows, the first being that of its first input. They
  // lie at `offset` in shared memory. Rows and outputs past the end become zeros.
  template <int BITS, int ROWS, int FIRST_THREAD>
  QC_DEVICE void plane(const GemmArgs& args, const unsigned char* plane, int row_shift, int plane_rows, u32 offset,
                       const Place& at, const Slice& slice) {
    constexpr int CHUNKS = TILE_N * BITS / 128, ALL = ROWS * CHUNKS;
    static_assert(FIRST_THREAD + ALL <= 64, "one chunk a thread");
    const u32 index = at.thread - FIRST_THREAD;
    if (index >= (QC_PLANTED(PARAMETERS_HALF_COPIED) ? ALL / 2 : ALL)) return;
    const u32 row = index / CHUNKS, chunk = index % CHUNKS;
    stride = (u32)args.columns * BITS / 8;
    from = plane + (size_t)row * stride + (size_t)at.n0 * BITS / 8 + chunk * 16;
    to = offset + index * 16;
    shift = row_shift;
    // Tile t needs row (t * TILE_K >> shift) + row of the plane.
    const int rows = at.n0 + (int)chunk * (128 / BITS) < args.columns ? plane_rows - (int)row : 0;
    const u64 tiles = rows > 0 ? (((u64)rows << shift) + TILE_K - 1) / TILE_K : 0;
    limit = tiles < (u64)slice.last ? (int)tiles : slice.last;
  }

  QC_DEVICE void start(u32 shared, int tile) const {
    const int row = (tile * TILE_K) >> shift;
    if (limit >= 0) copy_async_16(shared + to, from + (u64)(u32)row * stride, tile < limit);
  }
};

// The eight outputs of a lane are taken in pairs, one in row g of an mma, one in row g + 8: (0, 2), (1, 3), (4, 6),
// (5, 7), which are neighbours in the words below.
QC_DEVICE constexpr int first_of(int pair) { return (pair & 1) + (pair & 2) * 2; }
QC_DEVICE constexpr int second_of(int pair) { return first_of(pair) + 2; }

// The words of a lane's square of four-bit codes: word i of `even` holds inputs 2i (lower half) and 2i + 1 (upper half)
// of outputs 0, 2, 4, 6, lowest bits first, word i of `odd` those of outputs 1, 3, 5, 7.
struct NibbleSquare {
  u32 even[4], odd[4];

  // In octet-major weights these are eight words in a row.
  static QC_DEVICE NibbleSquare load(u32 shared, const Place& at) {
    const u32 octet = at.slab * 4 + (QC_PLANTED(WRONG_LANE) ? at.g & 3 : at.t), chunk = at.half * 16 + at.g * 2;
    const u32x4 even = load_shared_u32x4(shared + octet_offset<4>(octet, chunk));
    const u32x4 odd = load_shared_u32x4(shared + octet_offset<4>(octet, chunk + 1));
    return NibbleSquare{{even.x, even.y, even.z, even.w}, {odd.x, odd.y, odd.z, odd.w}};
  }

  // The codes of an output pair's inputs 2i and 2i + 1, from bit 0 on for the first output, from bit 4 on for the
  // second.
  QC_DEVICE u32 bits(int pair, int i) const {
    const u32 word = (pair ^ QC_PLANTED(WRONG_NIBBLE)) & 1 ? odd[i] : even[i];
    return pair & 2 ? word >> 8 : word;
  }
};
