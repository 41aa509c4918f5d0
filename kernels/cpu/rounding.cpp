// Rounding to integer grids, and the error of what was rounded. The numbers are those of the torch operations in
// qconv/core/rounding.py and qconv/verification/weights.py, which explain the formulas.
//
// Weights are a matrix without gaps. Each run of `width` of them along a row is a group, with a scale of its own.

#include <algorithm>
#include <cstdint>

#include "exported.h"
#include "numbers.h"

namespace qconv {
namespace {

constexpr int kRun = 256;  // weights that are worked on at once, in the nearest cache

// Scales and zero points by group, and the grid's number of levels.
struct Grid {
  int64_t width;
  int32_t levels;
  const float* scales;
  const float* zeros;  // null: the zero point is in the middle

  float zero(int64_t group) const { return zeros == nullptr ? float(levels / 2) : zeros[group]; }
};

// Calls a function with each run of a group's weights: how many lie before it, and its length.
template <class Function>
void in_runs(int64_t first, int64_t width, Function function) {
  for (int64_t done = 0; done < width; done += kRun) function(first + done, std::min<int64_t>(kRun, width - done));
}

template <class From>
void extremes(From from, const void* weights, int64_t groups, int64_t width, float* low, float* high) {
  float x[kRun];
  for (int64_t group = 0; group < groups; ++group) {
    int32_t lowest = INT32_MAX, highest = INT32_MIN;
    in_runs(group * width, width, [&](int64_t first, int64_t count) {
      widen(from, weights, first, count, x);
      for (int64_t i = 0; i < count; ++i) {
        lowest = std::min(lowest, ordered(x[i]));
        highest = std::max(highest, ordered(x[i]));
      }
    });
    low[group] = unordered(lowest);
    high[group] = unordered(highest);
  }
}

// Weights in steps of the scale, counted from the zero point: integers from -zero to levels - 1 - zero.
inline void round_run(const float* x, int64_t count, float scale, float lowest, float highest, float* steps) {
  for (int64_t i = 0; i < count; ++i) {
    const float exact = x[i] / scale;
    const float raised = exact > lowest ? exact : lowest;
    const float within = raised < highest ? raised : highest;
    steps[i] = (within + 0x1.8p23f) - 0x1.8p23f;  // the nearest integer, ties to even; 0 is positive
  }
}

template <class From>
void encode(From from, const void* weights, int64_t groups, const Grid& grid, uint8_t* codes) {
  float x[kRun];
  for (int64_t group = 0; group < groups; ++group) {
    const float zero = grid.zero(group), scale = grid.scales[group];
    in_runs(group * grid.width, grid.width, [&](int64_t first, int64_t count) {
      widen(from, weights, first, count, x);
      round_run(x, count, scale, -zero, float(grid.levels - 1) - zero, x);
      for (int64_t i = 0; i < count; ++i) codes[first + i] = uint8_t(int32_t(x[i] + zero));
    });
  }
}

void round(float* weights, int64_t groups, const Grid& grid) {
  for (int64_t group = 0; group < groups; ++group) {
    const float zero = grid.zero(group), scale = grid.scales[group];
    in_runs(group * grid.width, grid.width, [&](int64_t first, int64_t count) {
      float* x = weights + first;
      round_run(x, count, scale, -zero, float(grid.levels - 1) - zero, x);
      for (int64_t i = 0; i < count; ++i) x[i] *= scale;
    });
  }
}

// Sums of squares in double precision, where their order is of no account.
class SumOfSquares {
 public:
  void add(const float* x, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      Floats values;
      std::memcpy(&values, x + i, sizeof values);
      const Doubles wide = __builtin_convertvector(values, Doubles);
      lanes_ += wide * wide;
    }
    for (; i < count; ++i) lanes_[0] += double(x[i]) * double(x[i]);
  }

  double total() const {
    double sum = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) sum += lanes_[lane];
    return sum;
  }

 private:
  static constexpr int kLanes = 16;
  typedef float Floats __attribute__((vector_size(4 * kLanes)));
  typedef double Doubles __attribute__((vector_size(8 * kLanes)));

  Doubles lanes_ = {};
};

// What was folded into the weights before they were rounded; either may be null.
struct Folding {
  const float* columns;  // factors
  const float* rows;     // divisors
};

template <class From>
void squared_error(From from, const void* weights, int64_t rows, int64_t columns, const uint8_t* codes,
                   const Grid& grid, const Folding& folding, double* sums) {
  SumOfSquares signals, noises;
  float reference[kRun], error[kRun];
  for (int64_t group = 0; group < rows * columns / grid.width; ++group) {
    const float zero = grid.zero(group), scale = grid.scales[group];
    const int64_t row = group * grid.width / columns;
    in_runs(group * grid.width, grid.width, [&](int64_t first, int64_t count) {
      widen(from, weights, first, count, reference);
      if (folding.columns != nullptr) {
        const float* factors = folding.columns + (first - row * columns);
        for (int64_t i = 0; i < count; ++i) reference[i] *= factors[i];
      }
      if (folding.rows != nullptr) {
        for (int64_t i = 0; i < count; ++i) reference[i] /= folding.rows[row];
      }
      for (int64_t i = 0; i < count; ++i) {
        error[i] = (float(int32_t(codes[first + i])) - zero) * scale - reference[i];
      }
      signals.add(reference, count);
      noises.add(error, count);
    });
  }
  sums[0] = signals.total();
  sums[1] = noises.total();
}

}  // namespace
}  // namespace qconv

// Each group's smallest and largest weight.
EXPORTED void qconv_extremes(const void* weights, int32_t dtype, int64_t groups, int64_t width, float* low,
                             float* high) {
  using namespace qconv;
  with_dtype(Dtype(dtype), [=](auto from) { extremes(from, weights, groups, width, low, high); });
}

// Codes below `levels`, of finite weights. `zeros` are integers, or null.
EXPORTED void qconv_encode(const void* weights, int32_t dtype, int64_t groups, int64_t width, int32_t levels,
                           const float* scales, const float* zeros, uint8_t* codes) {
  using namespace qconv;
  const Grid grid{width, levels, scales, zeros};
  with_dtype(Dtype(dtype), [=](auto from) { encode(from, weights, groups, grid, codes); });
}

// The same, and back, in place.
EXPORTED void qconv_round(float* weights, int64_t groups, int64_t width, int32_t levels, const float* scales,
                          const float* zeros) {
  qconv::round(weights, groups, {width, levels, scales, zeros});
}

// Two sums of squares: of folded weights, and of their differences from what the codes stand for.
EXPORTED void qconv_squared_error(const void* weights, int32_t dtype, int64_t rows, int64_t columns, int64_t width,
                                  int32_t levels, const uint8_t* codes, const float* scales, const float* zeros,
                                  const float* column_factors, const float* row_divisors, double* sums) {
  using namespace qconv;
  const Grid grid{width, levels, scales, zeros};
  const Folding folding{column_factors, row_divisors};
  with_dtype(Dtype(dtype), [=](auto from) {
    squared_error(from, weights, rows, columns, codes, grid, folding, sums);
  });
}
