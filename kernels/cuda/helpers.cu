// Small kernels around the products: the sum of slices of k, and the reordering of activations for act-order weights.
#include "activation.cuh"

constexpr int HELPER_THREADS = 256;

struct SumSlicesArgs {
  const unsigned char* partials;  // float32 [slices, elements]
  unsigned char* output;          // [elements] of 16 bits
  u64 elements;                   // a multiple of 4
  int slices;
};

// Adds the slices in order, so that the result does not depend on which block was done first. Grid: x over fours of
// elements.
template <class Act>
QC_DEVICE void sum_slices(const SumSlicesArgs& args) {
  const u64 first = ((u64)blockIdx.x * HELPER_THREADS + threadIdx.x) * 4;
  if (first >= args.elements && !QC_PLANTED(ELEMENTS_OVERRUN)) return;
  f32x4 sum = {0.f, 0.f, 0.f, 0.f};
  for (int slice = QC_PLANTED(FIRST_SLICE_LOST); slice < args.slices; slice++) {
    const f32x4 part = load_global_f32x4(args.partials + (slice * args.elements + first) * 4);
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  store_global_u32x2(args.output + first * 2, u32x2{Act::pack(sum.x, sum.y), Act::pack(sum.z, sum.w)});
}

QC_KERNEL(qconv_sum_slices_f16, HELPER_THREADS, 1, 0, SumSlicesArgs) { sum_slices<F16>(args); }
QC_KERNEL(qconv_sum_slices_bf16, HELPER_THREADS, 1, 0, SumSlicesArgs) { sum_slices<BF16>(args); }

struct GatherArgs {
  const unsigned char* activations;  // [input rows, depth] of 16 bits
  const int* gather;                 // [experts, depth]
  unsigned char* output;             // [rows, depth]
  const int* row_ids;                // as in GemmArgs
  const int* tile_experts;           // null: one linear
  int rows, depth, rows_per_input;
  int row_tile;  // rows of a tile of row_ids
};

// output[r, i] = activations[r / rows_per_input, gather[expert of r, i]]. Grid: x over eights of columns, y over tiles.
QC_KERNEL(qconv_gather_columns, HELPER_THREADS, 1, 0, GatherArgs) {
  const int column = ((int)blockIdx.x * HELPER_THREADS + (int)threadIdx.x) * 8;
  if (column >= args.depth) return;
  const bool grouped = args.tile_experts != 0;
  const int expert = grouped ? load_global_i32(args.tile_experts + blockIdx.y) : 0;
  if (expert < 0) return;
  const int* gather = args.gather + (size_t)(QC_PLANTED(WRONG_EXPERT) ? 0 : expert) * args.depth + column;
  const u32x4 low = load_global_u32x4(gather), high = load_global_u32x4(gather + 4);
  const u32 from[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  for (int i = 0; i < args.row_tile; i++) {
    int row = blockIdx.y * args.row_tile + i;
    if (grouped) row = load_global_i32(args.row_ids + row);
    if (row >= args.rows && !QC_PLANTED(PADDING_WRITTEN)) continue;
    const unsigned char* input = args.activations + (size_t)(row / args.rows_per_input) * args.depth * 2;
    u32 pairs[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
      pairs[j] = load_global_u16(input + (size_t)from[2 * j] * 2) | load_global_u16(input + (size_t)from[2 * j + 1] * 2)
                                                                        << 16;
    store_global_u32x4(args.output + ((size_t)row * args.depth + column) * 2,
                       u32x4{pairs[0], pairs[1], pairs[2], pairs[3]});
  }
}
