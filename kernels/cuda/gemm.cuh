// One product for every weight format: output[row, n] = sum over k of activations[row, k] * weight[n, k].
//
// The weights stay packed on their way to the registers; there a Format turns a lane's square of codes into exact
// numbers of the activations' type, and they enter the tensor cores as the left operand: outputs are its rows (m16),
// tokens its columns (n8). After each slab of 32 inputs (or half of it) the sums are scaled in f32. What is computed is
// therefore the product with the float32 dequantized weights, whatever the activations' type.
//
// A Format provides
//   WEIGHT_BYTES, PARAMETER_BYTES   of a tile, in shared memory
//   SPLIT_OCTETS                    a lane's octet is inputs 4t..4t+3 and 16+4t..16+4t+3 of the slab, not 8t..8t+7
//   RUNS                            how many runs of inputs with scales of their own a slab has: 1, or 2 of 16
//   MINIMUMS                        whether weights are scale * code - minimum
//   expert(args, e)                 lets the pointers of args point to expert e
//   Copier(args, place)             a thread's part in copying tiles: start(weights, parameters, tile)
//   Square, load(shared, place)     a lane's codes
//   Columns, refresh(...)           a lane's parameters: scale[RUNS][8], minimum[8], and what decode needs
//   decode(square, columns, j, u32 (&pairs)[4])   output 8g + j, inputs in pairs
#pragma once
#include "activation.cuh"
#include "tile.cuh"

// A lane's chunk of activations: inputs of its octet, in pairs.
template <bool SPLIT>
QC_DEVICE u32x4 load_activations(u32 shared, u32 row, const Place& at) {
  if (!SPLIT) return load_shared_u32x4(shared + activation_offset(row, at.slab * 4 + at.t));
  const u32 chunk = at.slab * 4 + at.t / 2, byte = (at.t & 1) * 8;
  const u32x2 low = load_shared_u32x2(shared + activation_offset(row, chunk) + byte);
  const u32x2 high = load_shared_u32x2(shared + activation_offset(row, chunk + 2) + byte);
  return u32x4{low.x, low.y, high.x, high.y};
}

template <template <class> class FormatOf, class Act, int ROW_OCTETS>
QC_DEVICE void gemm(GemmArgs args) {
  typedef FormatOf<Act> Format;
  typedef SharedLayout<Format, ROW_OCTETS> Layout;
  constexpr int ROWS = ROW_OCTETS * 8, COPIES = (ROWS * 8 + THREADS - 1) / THREADS;
  // Up to 32 rows the warps split a tile's inputs and add their sums at the end. For 64 rows that would take more
  // registers than there are: each warp goes through all inputs for half of the rows.
  constexpr int ROW_PARTS = ROW_OCTETS == 8 ? 2 : 1, OCTETS = ROW_OCTETS / ROW_PARTS;
  const u32 shared = shared_base();
  const u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  Place at = {thread, lane, lane >> 2, lane & 3, warp & 1, warp >> 1, (int)blockIdx.x * TILE_N};
  const int octet0 = ROW_PARTS == 2 ? (int)(warp >> 1) * OCTETS : 0;
  const bool grouped = args.tile_experts != 0;
  const int row0 = blockIdx.y * ROWS;
  if (grouped) {
    const int expert = load_global_i32(args.tile_experts + blockIdx.y);
    if (expert < 0) return;
    Format::expert(args, QC_PLANTED(WRONG_EXPERT) ? 0 : expert);
  }
  // This block's slice of k.
  const int tiles = (args.depth + TILE_K - 1) / TILE_K, per_slice = (tiles + gridDim.z - 1) / gridDim.z;
  const int first = blockIdx.z * per_slice, end = first + per_slice + QC_PLANTED(SLICES_OVERLAP);
  const int last = end < tiles ? end : tiles;

  // The activations that this thread copies: the same rows and chunk of every tile, counted in chunks of 16 bytes.
  constexpr u32 ABSENT = ~0u;
  u32 source[COPIES];
#pragma unroll
  for (int i = 0; i < COPIES; i++) {
    const int in_tile = (thread + i * THREADS) >> 3;
    int row = row0 + in_tile;
    if (grouped && in_tile < ROWS) row = load_global_i32(args.row_ids + row);
    const bool present = in_tile < ROWS && (row < args.rows || QC_PLANTED(ROWS_OVERRUN));
    source[i] = present ? (u32)(row / args.rows_per_input) * (args.depth / 8) + (thread & 7) : ABSENT;
  }
  const int chunks = QC_PLANTED(DEPTH_OVERRUN) ? 1 << 30 : args.depth / 8 - (int)(thread & 7);
  const typename Format::Copier copier(args, at);
  auto copy_tile = [&](int tile) {
    const u32 stage = shared + (u32)(tile % STAGES) * Layout::STAGE;
    const int chunk = tile * (TILE_K / 8);
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      const u32 index = thread + i * THREADS;
      const bool valid = source[i] != ABSENT && chunk < chunks;
      if (index < ROWS * 8)
        copy_async_16(stage + activation_offset(index >> 3, index & 7),
                      args.activations + (u64)(source[i] + chunk) * 16, valid);
    }
    copier.start(stage + Layout::WEIGHTS_AT, stage + Layout::PARAMETERS_AT, tile);
  };

  float sums[4][OCTETS][4];  // [pair of outputs][octet of rows]: the mma's accumulators
#pragma unroll
  for (int pair = 0; pair < 4; pair++)
#pragma unroll
    for (int octet = 0; octet < OCTETS; octet++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[pair][octet][i] = 0.f;

#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (first + i < last) copy_tile(first + i);
    copy_async_commit();
  }
  typename Format::Columns columns;
  columns.group = -1;
  for (int tile = first; tile < last; tile++) {
    if (QC_PLANTED(SHORT_WAIT))
      copy_async_wait<STAGES - 1>();
    else
      copy_async_wait<STAGES - 2>();
    if (QC_PLANTED(EARLY_COPY) && tile + STAGES - 1 < last) copy_tile(tile + STAGES - 1);
    if (!QC_PLANTED(NO_BARRIER_IN_LOOP)) sync_threads();
    if (tile + STAGES - 1 < last && !QC_PLANTED(EARLY_COPY)) copy_tile(tile + STAGES - 1);
    copy_async_commit();

    const u32 stage = shared + (u32)(tile % STAGES) * Layout::STAGE;
#pragma unroll 1
    for (int i = 0; i < ROW_PARTS; i++) {
      if (ROW_PARTS == 2) at.slab = i;
      Format::refresh(args, columns, stage + Layout::PARAMETERS_AT, tile * TILE_K, at);
      const typename Format::Square square = Format::load(stage + Layout::WEIGHTS_AT, at);
      u32 codes[4][2][4];  // [pair of outputs][half of the octet]: the mma's left operands
#pragma unroll
      for (int pair = 0; pair < 4; pair++) {
        u32 even[4], odd[4];
        Format::decode(square, columns, 2 * pair, even);
        Format::decode(square, columns, 2 * pair + 1, odd);
#pragma unroll
        for (int i = 0; i < 4; i++) codes[pair][i / 2][i % 2 * 2] = even[i], codes[pair][i / 2][i % 2 * 2 + 1] = odd[i];
      }
#pragma unroll
      for (int octet = 0; octet < OCTETS; octet++) {
        const u32x4 tokens = load_activations<Format::SPLIT_OCTETS>(stage, (octet0 + octet) * 8 + at.g, at);
        float totals[4] = {};  // with minimums: the sum of a token's inputs, by a product with ones
        if (Format::MINIMUMS) {
          const u32 ones[4] = {Act::ONES, Act::ONES, Act::ONES, Act::ONES};
          Act::mma_first(totals, ones, tokens.x, tokens.y);
          Act::mma(totals, ones, tokens.z, tokens.w);
        }
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {
          float product[Format::RUNS][4];
          Act::mma_first(product[0], codes[pair][0], tokens.x, tokens.y);
          if (Format::RUNS == 1)
            Act::mma(product[0], codes[pair][1], tokens.z, tokens.w);
          else
            Act::mma_first(product[Format::RUNS - 1], codes[pair][1], tokens.z, tokens.w);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int column = 2 * pair + i / 2;
            float& sum = sums[pair][octet][i];
#pragma unroll
            for (int run = 0; run < Format::RUNS; run++)
              sum = fma_f32(columns.scale[run][column], product[run][i], sum);
            if (Format::MINIMUMS && !QC_PLANTED(NO_MINIMUM)) sum = fma_f32(-columns.minimum[column], totals[i], sum);
          }
        }
      }
    }
  }
  if (ROW_PARTS == 1) {
    // Add the sums of the two slabs: the second one's warps hand theirs to the first's, in place of the tiles. All
    // copies have landed: the groups that may still be pending are empty.
    if (!QC_PLANTED(NO_BARRIER_BEFORE_EXCHANGE)) sync_threads();
    const u32 mine = shared + (at.half * 32 + lane) * 16;
    if (at.slab == 1)
#pragma unroll
      for (int pair = 0; pair < 4; pair++)
#pragma unroll
        for (int octet = 0; octet < OCTETS; octet++) {
          const float (&sum)[4] = sums[pair][octet];
          store_shared_f32x4(mine + (pair * OCTETS + octet) * 1024, f32x4{sum[0], sum[1], sum[2], sum[3]});
        }
    if (QC_PLANTED(DIVERGENT_BARRIER) && at.slab == 1) return;
    sync_threads();
    if (at.slab == 1) return;
#pragma unroll
    for (int pair = 0; pair < 4; pair++)
#pragma unroll
      for (int octet = 0; octet < OCTETS; octet++) {
        const f32x4 other = load_shared_f32x4(mine + (pair * OCTETS + octet) * 1024);
        float (&sum)[4] = sums[pair][octet];
        sum[0] += other.x, sum[1] += other.y, sum[2] += other.z, sum[3] += other.w;
      }
  }

  // A lane holds eight neighbouring outputs of rows 2t and 2t + 1 of every octet.
  const int column = at.n0 + at.half * 64 + at.g * 8;
  if (column >= args.columns && !QC_PLANTED(COLUMNS_OVERRUN)) return;
#pragma unroll
  for (int octet = 0; octet < OCTETS; octet++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int row = row0 + (octet0 + octet) * 8 + at.t * 2 + i;
      if (grouped) row = load_global_i32(args.row_ids + row);
      if (row >= args.rows && !QC_PLANTED(PADDING_WRITTEN)) continue;
      const float values[8] = {sums[0][octet][i], sums[0][octet][2 + i], sums[1][octet][i], sums[1][octet][2 + i],
                               sums[2][octet][i], sums[2][octet][2 + i], sums[3][octet][i], sums[3][octet][2 + i]};
      const u32 slice = QC_PLANTED(SLICES_COLLIDE) ? 0 : blockIdx.z;
      const size_t element = ((size_t)slice * args.rows + row) * args.columns + column;
      if (gridDim.z > 1) {
        store_global_f32x4(args.output + element * 4, f32x4{values[0], values[1], values[2], values[3]});
        store_global_f32x4(args.output + element * 4 + 16, f32x4{values[4], values[5], values[6], values[7]});
      } else {
        store_global_u32x4(args.output + element * 2,
                           u32x4{Act::pack(values[0], values[1]), Act::pack(values[2], values[3]),
                                 Act::pack(values[4], values[5]), Act::pack(values[6], values[7])});
      }
    }
}

// The entry points of a format: qconv_FORMAT_mROWS_ACTIVATIONS.
#define QC_GEMM(Format, format, octets, rows, Act, act)                                                           \
  QC_KERNEL(qconv_##format##_m##rows##_##act, THREADS, 1, (SharedLayout<Format<Act>, octets>::BYTES), GemmArgs) { \
    gemm<Format, Act, octets>(args);                                                                              \
  }
#define QC_GEMMS(Format, format)             \
  QC_GEMM(Format, format, 1, 8, F16, f16)    \
  QC_GEMM(Format, format, 2, 16, F16, f16)   \
  QC_GEMM(Format, format, 4, 32, F16, f16)   \
  QC_GEMM(Format, format, 8, 64, F16, f16)   \
  QC_GEMM(Format, format, 1, 8, BF16, bf16)  \
  QC_GEMM(Format, format, 2, 16, BF16, bf16) \
  QC_GEMM(Format, format, 4, 32, BF16, bf16) \
  QC_GEMM(Format, format, 8, 64, BF16, bf16)
