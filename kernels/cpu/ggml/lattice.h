// The lattices of IQ2 and IQ3, whose points stand for the magnitudes of four or eight weights (qconv/grids/ggml/lattice.py).
#pragma once

#include "lanes.h"
#include "scaled.h"

namespace qconv {

constexpr int kRun = 8;  // points that share a high half are looked at in runs of so many

// As the reference has it. Points are in the order of their codes; `low` and `high` are places among all combinations
// of levels, the last element's changing fastest.
struct Lattice {
  int32_t runs;
  const int32_t* low;     // of each point of each run
  const int32_t* high;    // of each run
  const int32_t* starts;  // the code of each run's first point
  const float* points;
  const float* levels;
  float inverse_middle;  // 1 / the middle of the levels
};

// The sum of a power of two of terms, which are overwritten: halves are added until one is left.
template <int N>
Floats sum_of_halves(Floats (&terms)[N]) {
  for (int n = N / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) terms[i] = terms[i] + terms[i + n];
  }
  return terms[0];
}

constexpr int power(int base, int exponent) { return exponent == 0 ? 1 : base * power(base, exponent - 1); }

// The score of every combination of levels of Half elements.
template <int Half, int Levels>
void combined(const Floats (*scores)[Levels], Floats* out) {
  constexpr int kPairs = Levels * Levels;
  if constexpr (Half == 2) {
    for (int i = 0; i < Levels; ++i) {
      for (int j = 0; j < Levels; ++j) out[i * Levels + j] = scores[0][i] + scores[1][j];
    }
  } else {
    static_assert(Half == 4);
    Floats first[kPairs], second[kPairs];
    combined<2, Levels>(scores, first);
    combined<2, Levels>(scores + 2, second);
    for (int i = 0; i < kPairs; ++i) {
      for (int j = 0; j < kPairs; ++j) out[i * kPairs + j] = first[i] + second[j];
    }
  }
}

// The code of the point g of each lane with the largest sum of linear * g - quadratic * g^2, of equals the first; and
// the point itself.
template <int Elements, int Levels>
Ints nearest_point(const Lattice& lattice, const Floats (&linear)[Elements], const Floats (&quadratic)[Elements],
                   Floats* point) {
  constexpr int kHalf = Elements / 2, kCombinations = power(Levels, kHalf);
  Floats scores[Elements][Levels];
  for (int i = 0; i < Elements; ++i) {
    for (int l = 0; l < Levels; ++l) {
      const float level = lattice.levels[l];
      scores[i][l] = (linear[i] - quadratic[i] * level) * level;
    }
  }
  Floats low[kCombinations], high[kCombinations];
  combined<kHalf, Levels>(scores, low);
  combined<kHalf, Levels>(scores + kHalf, high);
  Floats best = splat(-__builtin_inff());
  Ints best_run{};
  for (int run = 0; run < lattice.runs; ++run) {
    const int32_t* of_run = lattice.low + run * kRun;
    Floats best_low = low[of_run[0]];
    for (int i = 1; i < kRun; ++i) best_low = larger(low[of_run[i]], best_low);
    const Floats score = best_low + high[lattice.high[run]];
    const Ints better = score > best;
    best = better ? score : best;
    best_run = better ? Ints{} + run : best_run;
  }
  // Which point of the run it was differs from lane to lane.
  Ints codes;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int run = best_run[lane];
    const int32_t* of_run = lattice.low + run * kRun;
    const float* column = reinterpret_cast<const float*>(low) + lane;
    int place = 0;
    float most = column[of_run[0] * kLanes];
    for (int i = 1; i < kRun; ++i) {
      const float score = column[of_run[i] * kLanes];
      place = score > most ? i : place;
      most = score > most ? score : most;
    }
    const int code = lattice.starts[run] + place;
    codes[lane] = code;
    for (int i = 0; i < Elements; ++i) point[i][lane] = lattice.points[code * Elements + i];
  }
  return codes;
}

// Of values that are to approximate some of importance: x is importance times those.
template <int Elements>
ScaledMoments moments_of(const Floats (&values)[Elements], const Floats (&x)[Elements], const float* importance) {
  Floats qq[Elements], xq[Elements];
  for (int i = 0; i < Elements; ++i) {
    qq[i] = importance[i] * (values[i] * values[i]);
    xq[i] = x[i] * values[i];
  }
  return {sum_of_halves(qq), sum_of_halves(xq)};
}

// What points are to approximate in one sub-block of each lane: importance * magnitude, and importance.
template <int Elements, int Point, int Levels>
struct Target {
  const Lattice& lattice;
  const Floats (&x)[Elements];
  const float* importance;

  // The nearest points for a scale.
  void codes(Floats scale, Ints (&out)[Elements / Point], Floats (&values)[Elements]) const {
    const Floats twice = scale + scale, square = scale * scale;
    for (int group = 0; group < Elements / Point; ++group) {
      Floats linear[Point], quadratic[Point];
      for (int i = 0; i < Point; ++i) {
        linear[i] = x[group * Point + i] * twice;
        quadratic[i] = importance[group * Point + i] * square;
      }
      out[group] = nearest_point<Point, Levels>(lattice, linear, quadratic, values + group * Point);
    }
  }

  ScaledMoments moments(Floats scale) const {
    Ints unused[Elements / Point];
    Floats values[Elements];
    codes(scale, unused, values);
    return moments_of(values, x, importance);
  }

  // Of the lowest level everywhere.
  ScaledMoments lowest() const {
    const float level = lattice.levels[0];
    Floats weights[Elements], targets[Elements];
    for (int i = 0; i < Elements; ++i) {
      weights[i] = splat(importance[i]);
      targets[i] = x[i];
    }
    return {sum_of_halves(weights) * (level * level), sum_of_halves(targets) * level};
  }
};

}  // namespace qconv
