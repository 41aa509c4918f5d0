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
//   DECODE_BLOCKS                   of 8 rows an SM at least: 8 leave 128 registers a thread, 6 leave 168
//   MINIMUMS                        whether weights are scale * code - minimum
//   expert(args, e)                 lets the pointers of args point to expert e
//   Copier(args, place, slice)      a thread's part in copying tiles: start(weights, parameters, tile)
//   Square, load(shared, place)     a lane's codes
//   Columns, refresh(...)           a lane's parameters: scale[RUNS][8], minimum[8], and what decode needs
//   decode(square, columns, pair, u32 (&first)[4], u32 (&second)[4])   two outputs of a lane, inputs in pairs
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
  typedef ::Block<Format, ROW_OCTETS> Block;
  constexpr int THREADS = Block::THREADS, ROWS = ROW_OCTETS * 8, COPIES = ROWS * 8 / THREADS;
  // For 16 and 32 rows the warps split a tile's inputs and add their sums at the end. For 64 rows that would take more
  // registers than there are: each warp goes through all inputs for half of the rows. For 8 rows there are two warps,
  // so that what a tile costs besides its products is spent on twice as many of them.
  constexpr bool SPLIT_INPUTS = ROW_OCTETS == 2 || ROW_OCTETS == 4;
  constexpr int ROW_PARTS = ROW_OCTETS == 8 ? 2 : 1, OCTETS = ROW_OCTETS / ROW_PARTS;
  const u32 shared = shared_base();
  const u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const u32 slab0 = SPLIT_INPUTS ? warp >> 1 : 0;
  const Place at = {thread, lane, lane >> 2, lane & 3, warp & 1, slab0, (int)blockIdx.x * TILE_N};
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
  const int begin = blockIdx.z * per_slice, end = begin + per_slice + QC_PLANTED(SLICES_OVERLAP);
  const Slice slice = {begin, end < tiles ? end : tiles};

  // The activations that this thread copies: the same rows and chunk of every tile.
  const unsigned char* source[COPIES];
  int limit[COPIES];  // the first tile without them
#pragma unroll
  for (int i = 0; i < COPIES; i++) {
    int row = row0 + (int)((thread + i * THREADS) >> 3);
    if (grouped) row = load_global_i32(args.row_ids + row);
    const int present = (args.depth / 8 - (int)(thread & 7) + TILE_K / 8 - 1) / (TILE_K / 8);
    const bool whole = QC_PLANTED(DEPTH_OVERRUN) || slice.last < present;
    limit[i] = row >= args.rows && !QC_PLANTED(ROWS_OVERRUN) ? 0 : whole ? slice.last : present;
    source[i] = args.activations + ((size_t)(row / args.rows_per_input) * (args.depth / 8) + (thread & 7)) * 16;
  }
  const typename Format::template Copier<THREADS> copier(args, at, slice);
  auto copy_tile = [&](int tile, u32 stage) {
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      const u32 index = thread + i * THREADS;
      copy_async_16(stage + activation_offset(index >> 3, index & 7), source[i] + (u64)(u32)tile * (TILE_K * 2),
                    tile < limit[i]);
    }
    copier.start(stage + Block::WEIGHTS_AT, stage + Block::PARAMETERS_AT, tile);
  };

  float sums[4][OCTETS][4];  // [pair of outputs][octet of rows]: the mma's accumulators
#pragma unroll
  for (int pair = 0; pair < 4; pair++)
#pragma unroll
    for (int octet = 0; octet < OCTETS; octet++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[pair][octet][i] = 0.f;

  // Tiles past the slice's end are copied too, as zeros, so that no tile is a special case.
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    copy_tile(slice.first + i, shared + i * Block::STAGE);
    copy_async_commit();
  }
  typename Format::Columns columns;
  columns.group = -1;
  constexpr u32 RING = STAGES * Block::STAGE;
  u32 stage = shared, spare = shared + RING - Block::STAGE;  // of this tile, of the one that is copied meanwhile
  for (int tile = slice.first; tile < slice.last; tile++) {
    if (QC_PLANTED(SHORT_WAIT))
      copy_async_wait<STAGES - 1>();
    else
      copy_async_wait<STAGES - 2>();
    if (QC_PLANTED(EARLY_COPY)) copy_tile(tile + STAGES - 1, spare);
    if (!QC_PLANTED(NO_BARRIER_IN_LOOP)) sync_threads();
    if (!QC_PLANTED(EARLY_COPY)) copy_tile(tile + STAGES - 1, spare);
    copy_async_commit();

    auto multiply_slab = [&](const Place& place) {
      Format::refresh(args, columns, stage + Block::PARAMETERS_AT, tile * TILE_K, place);
      const typename Format::Square square = Format::load(stage + Block::WEIGHTS_AT, place);
      u32 codes[4][2][4];  // [pair of outputs][half of the octet]: the mma's left operands
#pragma unroll
      for (int pair = 0; pair < 4; pair++) {
        u32 first[4], second[4];
        Format::decode(square, columns, pair, first, second);
#pragma unroll
        for (int i = 0; i < 4; i++)
          codes[pair][i / 2][i % 2 * 2] = first[i], codes[pair][i / 2][i % 2 * 2 + 1] = second[i];
      }
#pragma unroll
      for (int octet = 0; octet < OCTETS; octet++) {
        const u32x4 tokens = load_activations<Format::SPLIT_OCTETS>(stage, (octet0 + octet) * 8 + place.g, place);
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
          for (int i = 0; i < 4; i += 2) {
            const int column = i == 0 ? first_of(pair) : second_of(pair);
            float (&sum)[4] = sums[pair][octet];
#pragma unroll
            for (int run = 0; run < Format::RUNS; run++) {
              const float scale = columns.scale[run][column];
              fma_f32x2(scale, scale, product[run][i], product[run][i + 1], sum[i], sum[i + 1]);
            }
            const float minimum = -columns.minimum[column];
            if (Format::MINIMUMS && !QC_PLANTED(NO_MINIMUM))
              fma_f32x2(minimum, minimum, totals[i], totals[i + 1], sum[i], sum[i + 1]);
          }
        }
      }
    };
    if (SPLIT_INPUTS) {
      multiply_slab(at);
    } else if (ROW_PARTS == 1) {
#pragma unroll
      for (u32 slab = 0; slab < 2; slab++) multiply_slab(at.of_slab(QC_PLANTED(SLAB_TWICE) ? 0 : slab));
    } else {
#pragma unroll 1
      for (u32 slab = 0; slab < 2; slab++) multiply_slab(at.of_slab(slab));
    }
    spare = stage;
    stage = stage + Block::STAGE == shared + RING && !QC_PLANTED(RING_UNWRAPPED) ? shared : stage + Block::STAGE;
  }
  if (!QC_PLANTED(COPIES_LEFT)) copy_async_wait<0>();
  if (SPLIT_INPUTS) {
    // Add the sums of the two slabs: the second one's warps hand theirs to the first's, in place of the tiles.
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
      float values[8];
#pragma unroll
      for (int pair = 0; pair < 4; pair++)
        values[first_of(pair)] = sums[pair][octet][i], values[second_of(pair)] = sums[pair][octet][2 + i];
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
#define QC_GEMM(Format, format, octets, rows, Act, act)                                              \
  QC_KERNEL(qconv_##format##_m##rows##_##act, (Block<Format<Act>, octets>::THREADS),                 \
            (Block<Format<Act>, octets>::RESIDENT), (Block<Format<Act>, octets>::BYTES), GemmArgs) { \
    gemm<Format, Act, octets>(args);                                                                 \
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
