// Packed weights on a CPU: as numbers, times activations, and as the experts of a sparse block.

#include <cmath>
#include <memory>

#include "exported.h"
#include "runtime/decode.h"
#include "runtime/parallel.h"
#include "runtime/product.h"
#include "runtime/product_bf16.h"
#include "runtime/product_blocks.h"
#include "runtime/tile_products.h"

namespace qconv {
namespace {

// Activations [rows, inputs] in the form that products with a weight, and with all like it, want.
class Input {
 public:
  Input(const Weight& weight, const void* x, Dtype dtype, int64_t rows) : like_(weight), rows_(rows) {
    const int64_t inputs = weight.inputs;
#ifdef QCONV_BF16
    if (dtype == Dtype::kBfloat16 && has_bf16_product(weight)) {
      for (int64_t m = 0; m < rows; ++m) by_row_.emplace_back(weight, static_cast<const uint16_t*>(x) + m * inputs);
      return;
    }
#endif
    if (dtype == Dtype::kFloat32) {
      x_ = static_cast<const float*>(x);
      return;
    }
    widened_.resize(rows * inputs);
    for (int64_t i = 0; i < rows * inputs; ++i) widened_[i] = read_float(x, dtype, i);
    x_ = widened_.data();
  }
  Input(const Input&) = delete;

  bool suits(const Weight& w) const {
    return w.layout == like_.layout && w.bits == like_.bits && w.group == like_.group && w.inputs == like_.inputs &&
           w.group_index == like_.group_index && !w.zeros == !like_.zeros;
  }

  // y[rows, outputs] for a range of outputs.
  void times(const Weight& w, float* y, int64_t first, int64_t last) const {
#ifdef QCONV_BF16
    if (!by_row_.empty()) {
      for (int64_t m = 0; m < rows_; ++m) product_bf16(w, by_row_[m], y + m * w.outputs, first, last);
      return;
    }
#endif
    product_float(w, x_, rows_, y, first, last);
  }

 private:
  Weight like_;
  int64_t rows_;
  const float* x_ = nullptr;
  std::vector<float> widened_;
#ifdef QCONV_BF16
  std::vector<Activations> by_row_;
#endif
};

// The input of each of several products, made once where weights and activations allow.
class Inputs {
 public:
  void add(const Weight& weight, const void* x, Dtype dtype) {
    if (of_.empty() || x != x_ || !of_.back()->suits(weight)) {
      of_.push_back(std::make_shared<Input>(weight, x_ = x, dtype, 1));
    } else {
      of_.push_back(of_.back());
    }
  }
  const Input& operator[](int64_t i) const { return *of_[i]; }

 private:
  std::vector<std::shared_ptr<Input>> of_;
  const void* x_ = nullptr;
};

void store(const float* values, int64_t count, Dtype dtype, void* out, int64_t at) {
  if (dtype == Dtype::kBfloat16) {
    round_to_bfloat(values, count, static_cast<uint16_t*>(out) + at);
  } else {
    std::copy(values, values + count, static_cast<float*>(out) + at);
  }
}

float silu(float value) { return value / (1.0f + std::exp(-value)); }

// Work worth a thread of its own: starting one takes as long as some ten thousand weights.
int threads_for(int64_t weights, int threads) { return int(std::clamp<int64_t>(weights >> 18, 1, threads)); }

}  // namespace
}  // namespace qconv

// The size of `Weight`, for whoever declares it elsewhere.
EXPORTED int64_t qconv_weight_size() { return sizeof(qconv::Weight); }

// The weight's numbers in float32 or bfloat16: [outputs, inputs], or [inputs, outputs] of AWQ and GPTQ. Elements of `out`
// lie so that one of its rows begins `stride` after the one before.
EXPORTED void qconv_dequantize(const qconv::Weight* weight, int32_t dtype, void* out, int64_t stride, int32_t threads) {
  using namespace qconv;
  const Weight& w = *weight;
  threads = threads_for(w.outputs * w.inputs, threads);
  if (!inputs_outermost(w.layout)) {
    return in_parallel(w.outputs, 1, threads, [&](int64_t first, int64_t last) {
      std::vector<float> row(w.inputs);
      for (int64_t n = first; n < last; ++n) {
        decode_row(w, n, row.data());
        store(row.data(), w.inputs, Dtype(dtype), out, n * stride);
      }
    });
  }
  in_parallel(w.inputs, w.group_index ? 1 : w.group, threads, [&](int64_t first, int64_t last) {
    std::vector<float> scale(w.outputs), zero(w.outputs), weights(w.outputs);
    int64_t group = -1;
    for (int64_t k = first; k < last; ++k) {
      if (w.group_of(k) != group) read_group(w, group = w.group_of(k), 0, w.outputs, scale.data(), zero.data());
      decode_input(w, k, 0, w.outputs, scale.data(), zero.data(), weights.data());
      store(weights.data(), w.outputs, Dtype(dtype), out, k * stride);
    }
  });
}

// y = x times the weight: x [rows, inputs] of a dtype, y float32 [rows, outputs].
EXPORTED void qconv_product(const qconv::Weight* weight, const void* x, int32_t dtype, int64_t rows, float* y,
                            int32_t threads) {
  using namespace qconv;
  const Input input(*weight, x, Dtype(dtype), rows);
  threads = threads_for(weight->outputs * weight->inputs * rows, threads);
  in_parallel(weight->outputs, kTile, threads, [&](int64_t first, int64_t last) { input.times(*weight, y, first, last); });
}

// Adds to y, float32 [tokens, hidden], the answers of experts: of pair i, expert[i] for token[i], times factor[i].
// Gates, ups and downs are by expert; x is [tokens, hidden] of a dtype; scratch holds pairs * (2 * width + hidden)
// floats.
EXPORTED void qconv_experts(const qconv::Weight* gates, const qconv::Weight* ups, const qconv::Weight* downs,
                            const void* x, int32_t dtype, const int64_t* expert, const int64_t* token,
                            const float* factor, int64_t pairs, float* y, float* scratch, int32_t threads) {
  using namespace qconv;
  const int64_t hidden = gates[0].inputs, width = gates[0].outputs;
  threads = threads_for(3 * pairs * hidden * width, threads);
  const int64_t row_bytes = hidden * (Dtype(dtype) == Dtype::kFloat32 ? 4 : 2);
  float *gate = scratch, *up = gate + pairs * width, *down = up + pairs * width;
  Inputs inputs;
  for (int64_t i = 0; i < pairs; ++i) {
    const void* row = static_cast<const char*>(x) + token[i] * row_bytes;
    inputs.add(gates[expert[i]], row, Dtype(dtype));
    inputs.add(ups[expert[i]], row, Dtype(dtype));
  }
  in_parallel(width, kTile, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < pairs; ++i) {
      inputs[2 * i].times(gates[expert[i]], gate + i * width, first, last);
      inputs[2 * i + 1].times(ups[expert[i]], up + i * width, first, last);
      for (int64_t n = first; n < last; ++n) gate[i * width + n] = silu(gate[i * width + n]) * up[i * width + n];
    }
  });
  std::vector<uint16_t> rounded;
  if (Dtype(dtype) == Dtype::kBfloat16) {
    rounded.resize(pairs * width);
    for (int64_t i = 0; i < pairs * width; ++i) rounded[i] = to_bfloat(gate[i]);
  }
  Inputs between;
  for (int64_t i = 0; i < pairs; ++i) {
    const void* row = rounded.empty() ? static_cast<const void*>(gate + i * width) : rounded.data() + i * width;
    between.add(downs[expert[i]], row, rounded.empty() ? Dtype::kFloat32 : Dtype::kBfloat16);
  }
  in_parallel(hidden, kTile, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < pairs; ++i) {
      between[i].times(downs[expert[i]], down + i * hidden, first, last);
      float* to = y + token[i] * hidden;
      for (int64_t n = first; n < last; ++n) to[n] += factor[i] * down[i * hidden + n];
    }
  });
}

// What products of tiles may use: 0 nothing, and they are not to be called; 1 AVX-512; 2 AMX too.
EXPORTED int32_t qconv_tile_units() {
#ifdef QCONV_BF16
  return int32_t(qconv::units());
#else
  return 0;
#endif
}

// From how many rows on products of tiles are faster than qconv_product; 0: there are none of this weight.
EXPORTED int32_t qconv_tiles_from(const qconv::Weight* weight) {
#ifdef QCONV_BF16
  if (!qconv::has_tiles(*weight)) return 0;
  return qconv::has_bf16_product(*weight) ? 5 : 1;
#else
  return 0;
#endif
}

// out = x times the weight, both bfloat16: x [rows, inputs], out [rows, outputs].
EXPORTED void qconv_tile_product(const qconv::Weight* weight, const uint16_t* x, int64_t rows, uint16_t* out,
                                 int32_t units, int32_t threads) {
#ifdef QCONV_BF16
  using namespace qconv;
  threads = threads_for(weight->outputs * weight->inputs * rows / 16, threads);
  tile_product(*weight, Units(units), x, rows, out, threads);
#endif
}

// As qconv_experts for many tokens: adds to y, float32 [tokens, hidden]. chosen and factor are [tokens, top_k], x is
// bfloat16 [tokens, hidden]. Gates, ups and downs are all of layouts with inputs outermost, or all not.
EXPORTED void qconv_tile_experts(const qconv::Weight* gates, const qconv::Weight* ups, const qconv::Weight* downs,
                                 int64_t experts, const uint16_t* x, const int64_t* chosen, const float* factor,
                                 int64_t tokens, int64_t top_k, float* y, int32_t units, int32_t threads) {
#ifdef QCONV_BF16
  using namespace qconv;
  constexpr int64_t kBatch = 4096;  // pairs that are enough to keep threads busy
  const int64_t pairs = tokens * top_k;
  threads = threads_for(3 * pairs * gates[0].inputs * gates[0].outputs / 16, threads);
  std::vector<int64_t> end(experts + 1), order(pairs);
  for (int64_t p = 0; p < pairs; ++p) ++end[chosen[p] + 1];
  for (int64_t e = 0; e < experts; ++e) end[e + 1] += end[e];
  std::vector<int64_t> next(end.begin(), end.end() - 1);
  for (int64_t p = 0; p < pairs; ++p) order[next[chosen[p]]++] = p;
  const TileExperts all = {gates, ups, downs, Units(units), threads};
  std::vector<Turn> turns;
  int64_t tiles = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t rows = end[e + 1] - end[e];
    if (rows > 0) turns.push_back({e, order.data() + end[e], rows, tiles});
    tiles += tiles_of(rows);
    if (turns.empty() || (tiles * kTileRows < kBatch && e + 1 < experts)) continue;
    all.add(turns, x, top_k, factor, y);
    turns.clear();
    tiles = 0;
  }
#endif
}
