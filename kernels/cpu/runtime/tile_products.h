// Products of packed weights with many rows of bfloat16 activations: weights are decoded into tiles, 256 outputs and 512
// inputs at a time, which the caches hold until all rows have met them.
#pragma once

#include <array>

#include "parallel.h"
#include "tile_columns.h"

#ifdef QCONV_BF16

namespace qconv {

constexpr int64_t kTilesAtOnce = 32;       // of activations, that meet a panel before it is decoded again
constexpr int64_t kBlockSums = 2 * kSums;  // of a block and a tile of activations

inline int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
inline int64_t steps_of(int64_t inputs) { return (inputs + kTileInputs - 1) / kTileInputs; }

// Weights whose outputs are outermost are left tiles, the others right ones.
inline bool weights_left(const Weight& w) { return !inputs_outermost(w.layout); }

inline bool has_tiles(const Weight& w) { return w.layout != Layout::kAwq || w.inputs % 2 == 0; }

// Activations as tiles of sixteen rows. All tiles' steps that a chunk of inputs makes lie together, since they are read
// together.
class Tiles {
 public:
  Tiles(int64_t count, int64_t inputs)
      : count_(count), steps_(steps_of(inputs)), memory_(count * steps_ * kTileElements * 2) {}

  // A tile's step; those of the same chunk follow.
  uint16_t* at(int64_t tile, int64_t step) const {
    const int64_t chunk = step / kChunkSteps * kChunkSteps, in_chunk = std::min(kChunkSteps, steps_ - chunk);
    return memory_.as<uint16_t>() + (chunk * count_ + tile * in_chunk + step - chunk) * kTileElements;
  }

  // Makes a tile of rows of which `row(i)` is number i < count; inputs beyond the last and rows beyond `count` are zeros.
  template <class Row>
  void pack(int64_t tile, bool weights_left, const Row& row, int64_t count, int64_t inputs) const {
    for (int64_t step = 0; step < steps_; ++step) {
      const int64_t k = step * kTileInputs, there = std::min<int64_t>(kTileInputs, inputs - k);
      const __mmask32 mask = there == 32 ? ~0u : (1u << there) - 1;
      Ints rows[kTileRows];
      for (int64_t i = 0; i < kTileRows; ++i) {
        rows[i] = i < count ? _mm512_maskz_loadu_epi16(mask, row(i) + k) : _mm512_setzero_si512();
      }
      if (weights_left) transpose(rows);
      uint16_t* out = at(tile, step);
      for (int i = 0; i < kTileRows; ++i) _mm512_store_si512(out + kTileInputs * i, rows[i]);
    }
  }

 private:
  static constexpr int64_t kChunkSteps = kChunk / kTileInputs;

  int64_t count_, steps_;
  Buffer memory_;
};

// A thread's place of work: tile registers, decoded numbers, sums.
class Worker {
 public:
  explicit Worker(Units units) : units_(units), registers_(units), decoded_(kBlock * kChunk * 2) {}

  // Calls `use(n, tile, sums)` for all blocks of outputs [first, last) of the weights, which are alike, and all tiles of
  // activations from `start`: `n` is a block's first output, `sums` are two tiles for each weight.
  template <int kWeights, class Use>
  void products(const std::array<const Weight*, kWeights>& weights, const Tiles& x, int64_t start, int64_t tiles,
                int64_t first, int64_t last, const Use& use) {
    std::vector<Rows> rows;
    std::vector<Columns> columns;
    for (const Weight* w : weights) {
      if (weights_left(*w)) {
        rows.emplace_back(*w);
      } else {
        columns.emplace_back(*w);
      }
    }
    for (int64_t n = first; n < last; n += kPanel) {
      const int64_t end = std::min(last, n + kPanel);
      for (int64_t t = 0; t < tiles; t += kTilesAtOnce) {
        const int64_t count = std::min(tiles - t, kTilesAtOnce);
        std::array<float*, kWeights> sums;
        for (int i = 0; i < kWeights; ++i) {
          sums[i] = sums_.as<float>() + i * kPanelSums;
          const int64_t tile = start + t;
          columns.empty() ? product<true>(rows[i], weights[i]->inputs, x, tile, count, n, end, sums[i])
                          : product<false>(columns[i], weights[i]->inputs, x, tile, count, n, end, sums[i]);
        }
        for (int64_t i = 0; i < blocks_of(end - n) * count; ++i) {
          for (float*& each : sums) each += i > 0 ? kBlockSums : 0;
          use(n + i / count * kBlock, t + i % count, sums);
        }
      }
    }
  }

 private:
  static constexpr int64_t kPanelSums = kPanel / kBlock * kTilesAtOnce * kBlockSums;

  template <bool kWeightsLeft, class Decoder>
  void product(Decoder& weights, int64_t inputs, const Tiles& x, int64_t tile, int64_t count, int64_t first,
               int64_t last, float* sums) {
    weights.open(first, last);
    for (int64_t k = 0; k < inputs; k += kChunk) {
      const int64_t steps = steps_of(std::min(kChunk, inputs - k));
      for (int64_t block = 0; block < blocks_of(last - first); ++block) {
        weights.decode(block, k, steps, decoded_.as<uint16_t>());
        for (int64_t m = 0; m < count; m += 2) {
          Step step = {decoded_.as<uint16_t>(), {}, steps, {}, k > 0};
          for (int64_t j = 0; j < std::min<int64_t>(2, count - m); ++j) {
            step.x[j] = x.at(tile + m + j, k / kTileInputs);
            step.sums[j] = sums + (block * count + m + j) * kBlockSums;
          }
          multiply<kWeightsLeft>(units_, step);
        }
      }
    }
  }

  const Units units_;
  const TileRegisters registers_;
  const Buffer decoded_, sums_ = Buffer(2 * kPanelSums * 4);
};

// Row i of a block's and a tile's sums, where rows are activations.
inline Halves row_of(Layout layout, const float* sums, int64_t i) {
  return in_order(layout, {_mm512_load_ps(sums + 16 * i), _mm512_load_ps(sums + kSums + 16 * i)});
}

// Calls `use(row, low, high)` with the 32 sums of each row that a block and a tile of activations have.
template <class Use>
void by_row(Layout layout, const float* sums, int64_t rows, const Use& use) {
  if (inputs_outermost(layout)) {
    for (int64_t i = 0; i < rows; ++i) {
      const Halves row = row_of(layout, sums, i);
      use(i, row.low, row.high);
    }
    return;
  }
  Ints low[16], high[16];
  for (int i = 0; i < 16; ++i) {
    low[i] = load(sums + 16 * i);
    high[i] = load(sums + kSums + 16 * i);
  }
  transpose(low);
  transpose(high);
  for (int64_t i = 0; i < rows; ++i) use(i, _mm512_castsi512_ps(low[i]), _mm512_castsi512_ps(high[i]));
}

// e^x for sixteen numbers, to a few units in the last place; saturates instead of overflowing.
inline Sums exponential(Sums x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
  const Sums whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  // x less whole * log 2, which is subtracted in two parts: the first has zeros for last bits.
  Sums rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
  rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), rest);
  Sums value = _mm512_set1_ps(1.0f / 720);
  for (const float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f}) {
    value = _mm512_fmadd_ps(value, rest, _mm512_set1_ps(factor));
  }
  return _mm512_scalef_ps(value, whole);
}

inline Sums silu_of(Sums x) {
  const Sums one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(x, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

inline Sums activated(Sums gate, Sums up) { return _mm512_mul_ps(silu_of(gate), up); }

// silu(gate) * up of a block and a tile of activations, rounded: a step of the next product's activations.
inline void activate(const Weight& gate_weight, const float* gate, const Weight& up_weight, const float* up,
                     uint16_t* out) {
  for (int i = 0; i < kTileRows; ++i) {
    if (weights_left(gate_weight)) {  // rows are outputs, in pairs
      const int even = i / 8 * kSums + i % 8 * 32, odd = even + 16;
      const Sums one = activated(_mm512_load_ps(gate + even), _mm512_load_ps(up + even));
      _mm512_store_si512(out + 32 * i, paired(one, activated(_mm512_load_ps(gate + odd), _mm512_load_ps(up + odd))));
    } else {
      const Halves g = row_of(gate_weight.layout, gate, i), u = row_of(up_weight.layout, up, i);
      _mm512_store_si512(out + 32 * i, rounded(activated(g.low, u.low), activated(g.high, u.high)));
    }
  }
}

// out = x times the weight, rounded: x [rows, inputs], out [rows, outputs].
inline void tile_product(const Weight& w, Units units, const uint16_t* x, int64_t rows, uint16_t* out, int threads) {
  const int64_t tiles = tiles_of(rows);
  const Tiles packed(tiles, w.inputs);
  in_parallel(tiles, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const auto row = [&](int64_t i) { return x + (t * kTileRows + i) * w.inputs; };
      packed.pack(t, weights_left(w), row, rows - t * kTileRows, w.inputs);
    }
  });
  in_parallel(w.outputs, kBlock, threads, [&](int64_t first, int64_t last) {
    const auto use = [&](int64_t n, int64_t tile, const std::array<float*, 1>& sums) {
      const int64_t row = tile * kTileRows;
      const __mmask32 mask = last - n >= kBlock ? ~0u : (1u << (last - n)) - 1;
      by_row(w.layout, sums[0], std::min<int64_t>(kTileRows, rows - row), [&](int64_t m, Sums low, Sums high) {
        _mm512_mask_storeu_epi16(out + (row + m) * w.outputs + n, mask, rounded(low, high));
      });
    };
    Worker(units).products<1>({&w}, packed, 0, tiles, first, last, use);
  });
}

// The rows of one expert among those of a batch; they begin at a tile's start.
struct Turn {
  int64_t expert;
  const int64_t* pairs;  // numbers of pairs of token and expert
  int64_t rows;
  int64_t tile;  // its first
};

// A sparse block's experts. A thread takes a range of outputs through all experts of a batch, so sums come about in the
// same order however many threads there are.
struct TileExperts {
  const Weight *gates, *ups, *downs;
  Units units;
  int threads;

  // Adds to y, float32 [tokens, hidden], what experts answer: pair p is of token p / top_k and counts factor[p]. x is
  // [tokens, hidden].
  void add(const std::vector<Turn>& turns, const uint16_t* x, int64_t top_k, const float* factor, float* y) const {
    const int64_t hidden = gates[0].inputs, width = gates[0].outputs;
    const int64_t tiles = turns.back().tile + tiles_of(turns.back().rows);
    const Tiles asked(tiles, hidden), between(tiles, width);
    in_parallel(int64_t(turns.size()), 1, threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        for (int64_t start = 0; start < turns[i].rows; start += kTileRows) {
          const auto row = [&](int64_t m) { return x + turns[i].pairs[start + m] / top_k * hidden; };
          asked.pack(turns[i].tile + start / kTileRows, weights_left(gates[0]), row, turns[i].rows - start, hidden);
        }
      }
    });
    in_parallel(width, kBlock, threads, [&](int64_t first, int64_t last) {
      Worker worker(units);
      for (const Turn& turn : turns) {
        const auto use = [&](int64_t n, int64_t tile, const std::array<float*, 2>& sums) {
          uint16_t* const out = between.at(turn.tile + tile, n / kBlock);
          activate(gates[turn.expert], sums[0], ups[turn.expert], sums[1], out);
        };
        worker.products<2>({gates + turn.expert, ups + turn.expert}, asked, turn.tile, tiles_of(turn.rows), first, last,
                           use);
      }
    });
    in_parallel(hidden, kBlock, threads, [&](int64_t first, int64_t last) {
      Worker worker(units);
      for (const Turn& turn : turns) {
        const auto use = [&](int64_t n, int64_t tile, const std::array<float*, 1>& sums) {
          const int64_t* pairs = turn.pairs + tile * kTileRows;
          const __mmask16 masks[2] = {mask_of(last - n), mask_of(last - n - 16)};
          const int64_t rows = std::min<int64_t>(kTileRows, turn.rows - tile * kTileRows);
          by_row(downs[turn.expert].layout, sums[0], rows, [&](int64_t m, Sums low, Sums high) {
            float* to = y + pairs[m] / top_k * hidden + n;
            const Sums much = _mm512_set1_ps(factor[pairs[m]]);
            _mm512_mask_storeu_ps(to, masks[0], _mm512_fmadd_ps(much, low, _mm512_maskz_loadu_ps(masks[0], to)));
            to += 16;
            _mm512_mask_storeu_ps(to, masks[1], _mm512_fmadd_ps(much, high, _mm512_maskz_loadu_ps(masks[1], to)));
          });
        };
        worker.products<1>({downs + turn.expert}, between, turn.tile, tiles_of(turn.rows), first, last, use);
      }
    });
  }
};

}  // namespace qconv

#endif
