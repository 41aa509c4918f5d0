// Columns rounded one after the other, each taking up its share of the errors of those before it (qconv/core/grid.py,
// Run.in_turn, which explains the formulas). Rows are independent: a few at a time, as lanes, go through all columns
// while their errors stay in the nearest cache. Matrices are [columns, rows] without gaps.
//
// A column's shares are added up in the order of the columns before it, then to its target; torch adds in another order,
// so results may differ from it where a target lies in the middle between two values. Without shares they are the same.

#include <algorithm>

#include "exported.h"
#include "ggml/shifted.h"
#include "ggml/signed.h"
#include "numbers.h"

namespace qconv {

struct Run {
  int64_t columns, rows;
  const float* targets;
  const float* original;
  const float* shares;  // [columns, columns]: at j, i what the column j takes up of an i before it
  float* values;        // of the result
};

// Scales by group and row, and which group each column is of.
struct Groups {
  const int32_t* of_columns;
  const float* steps;
  const float* inverses;
  const float* bases;  // or null
};

// What codes there are.
struct Codes {
  int32_t kind;  // 0: whole numbers; 1: short floats; 2: a codebook
  float lowest, highest;
  const float* zeros;  // by group and row, or null: what whole numbers are counted from
  float smallest_normal, shift;  // of short floats; the shift leaves room for whole steps alone, in units of the power
  int32_t count;
  const float* values;   // of the codebook, ascending
  const float* middles;  // between them
};

// Of values that are points of a lattice, with signs or a shift.
struct Points {
  const Lattice* lattice;
  const float* metric;   // by column
  const float* hessian;  // [columns, columns], or null
  const float* shifts;   // by group and row, or null: what is added to points, where each eight has none of its own
};

namespace {

constexpr int kVectors = 4;  // of rows that are worked on at once: sums of one do not wait for each other
constexpr int kTile = kVectors * kLanes;

// Numbers of consecutive rows; 0 beyond the last. A copy whose length is known is one instruction.
inline Floats load(const float* from, int64_t count) {
  Floats v{};
  if (count >= kLanes) {
    std::memcpy(&v, from, sizeof v);
  } else {
    std::memcpy(&v, from, sizeof(float) * size_t(count));
  }
  return v;
}

inline void store(Floats v, float* to, int64_t count) {
  if (count >= kLanes) {
    std::memcpy(to, &v, sizeof v);
  } else {
    std::memcpy(to, &v, sizeof(float) * size_t(count));
  }
}

// The errors of some rows in all columns.
template <int Vectors>
class Errors {
 public:
  explicit Errors(int64_t columns) : errors_(new Floats[size_t(columns) * Vectors]) {}
  ~Errors() { delete[] errors_; }
  Errors(const Errors&) = delete;
  Errors& operator=(const Errors&) = delete;

  Floats* of(int64_t column) const { return errors_ + column * Vectors; }

  // What a column takes up of those before `end`.
  void add_shares(const float* shares, int64_t end, Floats (&sums)[Vectors]) const {
    for (int64_t i = 0; i < end; ++i) {
      const Floats* error = of(i);
      for (int v = 0; v < Vectors; ++v) sums[v] += shares[i] * error[v];
    }
  }

 private:
  Floats* errors_;
};

struct WholeNumbers {
  Floats nearest(Floats multiple, const Codes& codes, int64_t at, int64_t count) const {
    const Floats zero = codes.zeros == nullptr ? Floats{} : load(codes.zeros + at, count);
    return rounded(smaller(larger(multiple, codes.lowest - zero), codes.highest - zero));
  }
};

struct ShortFloats {
  Floats nearest(Floats multiple, const Codes& codes, int64_t, int64_t) const {
    const Floats within = clamped(multiple, -codes.highest, codes.highest);
    const Floats power = larger(floats_of(bits_of(within) & 0x7f800000), splat(codes.smallest_normal));
    const Floats shift = power * codes.shift;
    return (within + shift) - shift;
  }
};

struct OfCodebook {
  Floats nearest(Floats multiple, const Codes& codes, int64_t, int64_t) const {
    Floats value = splat(codes.values[0]);
    for (int32_t i = 1; i < codes.count; ++i) {
      value = multiple >= codes.middles[i - 1] ? splat(codes.values[i]) : value;
    }
    return value;
  }
};

template <class Kind>
void round_steps(const Run& run, const Groups& groups, const Codes& codes, Kind kind) {
  const Errors<kVectors> errors(run.columns);
  for (int64_t row = 0; row < run.rows; row += kTile) {
    for (int64_t column = 0; column < run.columns; ++column) {
      Floats sums[kVectors] = {};
      errors.add_shares(run.shares + column * run.columns, column, sums);
      for (int v = 0; v < kVectors; ++v) {
        const int64_t first = row + v * kLanes, count = run.rows - first;
        if (count <= 0) break;
        const int64_t at = column * run.rows + first, scale = groups.of_columns[column] * run.rows + first;
        const Floats base = groups.bases == nullptr ? Floats{} : load(groups.bases + scale, count);
        const Floats multiple = (load(run.targets + at, count) + sums[v] - base) * load(groups.inverses + scale, count);
        const Floats code = kind.nearest(multiple, codes, scale, count);
        const Floats value = code * load(groups.steps + scale, count) + base;
        errors.of(column)[v] = load(run.original + at, count) - value;
        store(value, run.values + at, count);
      }
    }
  }
}

// The nearest values of eight columns: signs and magnitudes.
template <int Point, int Levels, bool Even>
struct OfMagnitudes {
  static void nearest(const Points& points, const Floats (&wanted)[kSigns], Floats step, Floats, const float* metric,
                      Floats (&values)[kSigns]) {
    const SignedSource<kSigns, Point, Levels, Even> source(*points.lattice, wanted, metric);
    Ints codes[kSigns / Point], signs[kSigns];
    source.best_points(step, codes, signs);
    for (int c = 0; c < kSigns; ++c) {
      Floats size;
      for (int lane = 0; lane < kLanes; ++lane) {
        size[lane] = points.lattice->points[codes[c / Point][lane] * Point + c % Point];
      }
      values[c] = (signs[c] ? -size : size) * step;
    }
  }
};

// The same of -1, 0 and 1 and a shift, the one that is given or the better one.
struct OfShifted {
  static void nearest(const Points& points, const Floats (&wanted)[kSigns], Floats step, Floats shift,
                      const float* metric, Floats (&values)[kSigns]) {
    using Source = ShiftedSource<kSigns, kSigns>;
    const Source source(*points.lattice, wanted, metric);
    typename Source::Points found;
    if (points.shifts == nullptr) {
      source.points(step, found);
    } else {
      source.nearest(step, shift, found.values, found.codes);
    }
    for (int c = 0; c < kSigns; ++c) values[c] = found.values[c] * step;
  }
};

// Values and their errors of eight columns, stored where they belong.
template <class Kind>
class Eights {
 public:
  Eights(const Run& run, const Groups& groups, const Points& points) : run_(run), groups_(groups), points_(points) {}

  void round() {
    const Errors<1> errors(run_.columns);
    for (int64_t row = 0; row < run_.rows; row += kLanes) {
      for (int64_t first = 0; first < run_.columns; first += kSigns) round(errors, row, first);
    }
  }

 private:
  void round(const Errors<1>& errors, int64_t row, int64_t first) {
    const int64_t count = run_.rows - row;
    Floats wanted[kSigns], original[kSigns], values[kSigns], sums[kSigns] = {};
    for (int64_t i = 0; i < first; ++i) {
      const Floats error = *errors.of(i);
      for (int c = 0; c < kSigns; ++c) sums[c] += run_.shares[(first + c) * run_.columns + i] * error;
    }
    for (int c = 0; c < kSigns; ++c) {
      const int64_t at = (first + c) * run_.rows + row;
      wanted[c] = load(run_.targets + at, count) + sums[c];
      original[c] = load(run_.original + at, count);
    }
    const int64_t at = groups_.of_columns[first] * run_.rows + row;
    const Floats step = load(groups_.steps + at, count);
    const Floats shift = points_.shifts == nullptr ? Floats{} : load(points_.shifts + at, count);
    Kind::nearest(points_, wanted, step, shift, points_.metric + first, values);
    if (points_.hessian != nullptr) {
      const Ints better = gain(wanted, original, values, first) > 0.0f;
      for (int c = 0; c < kSigns; ++c) values[c] = better ? values[c] : original[c];
    }
    for (int c = 0; c < kSigns; ++c) {
      *errors.of(first + c) = original[c] - values[c];
      store(values[c], run_.values + (first + c) * run_.rows + row, count);
    }
  }

  // Half of what the loss falls by if eight columns move.
  Floats gain(const Floats (&optimum)[kSigns], const Floats (&original)[kSigns], const Floats (&values)[kSigns],
              int64_t first) const {
    Floats total{};
    for (int c = 0; c < kSigns; ++c) {
      const float* row = points_.hessian + (first + c) * run_.columns + first;
      Floats slope{};
      for (int i = 0; i < kSigns; ++i) {
        slope += row[i] * (original[i] - optimum[i] - 0.5f * (original[i] - values[i]));
      }
      total += (original[c] - values[c]) * slope;
    }
    return total;
  }

  const Run& run_;
  const Groups& groups_;
  const Points& points_;
};

}  // namespace
}  // namespace qconv

// Columns of a grid whose weights are rounded one by one.
EXPORTED void qconv_round_steps(const qconv::Run* run, const qconv::Groups* groups, const qconv::Codes* codes) {
  using namespace qconv;
  switch (codes->kind) {
    case 0: return round_steps(*run, *groups, *codes, WholeNumbers());
    case 1: return round_steps(*run, *groups, *codes, ShortFloats());
    default: return round_steps(*run, *groups, *codes, OfCodebook());
  }
}

// Columns of a ggml type whose weights are rounded eight at a time; false if it is none.
EXPORTED bool qconv_round_points(const qconv::Run* run, const qconv::Groups* groups, const qconv::Points* points,
                                 int32_t type) {
  using namespace qconv;
  switch (type) {
    case 16:
    case 17: Eights<OfMagnitudes<8, 3, true>>(*run, *groups, *points).round(); return true;
    case 18: Eights<OfMagnitudes<4, 8, true>>(*run, *groups, *points).round(); return true;
    case 19:
    case 29: Eights<OfShifted>(*run, *groups, *points).round(); return true;
    case 21: Eights<OfMagnitudes<4, 8, false>>(*run, *groups, *points).round(); return true;
    case 22: Eights<OfMagnitudes<8, 3, false>>(*run, *groups, *points).round(); return true;
    default: return false;
  }
}
