// Scales that are odd multiples of a step, a unit times the float16 that a super-block shares (qconv/grids/ggml/odd_multiples.py).
#pragma once

#include <cmath>

#include "lattice.h"
#include "superblock.h"

namespace qconv {

inline Floats square_root(Floats v) {
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = std::sqrt(v[lane]);
  return v;
}

// A step as a float16 times the unit, and not 0 unless it is.
inline Floats storable(Floats step, float unit) { return storable(step / unit) * unit; }

// The odd multiples of the step that are nearest, up to the largest.
inline Floats nearest_multiple(Floats wanted, Floats step, float largest) {
  const Floats halves = (wanted * reciprocal(step) - 1.0f) / 2.0f;
  return rounded_within(halves, 0.0f, (largest - 1.0f) / 2.0f) * 2.0f + 1.0f;
}

// Of the odd multiples around the wanted one that whose points fit best, and their moments. `moments_at` gives those of
// the points for a scale.
template <class MomentsAt>
void best_multiple(Floats wanted, Floats step, float largest, const MomentsAt& moments_at, Floats& best,
                   ScaledMoments& of_best) {
  const Floats nearest = nearest_multiple(wanted, step, largest);
  Floats most{};
  for (const float aside : {0.0f, -2.0f, 2.0f}) {
    const Floats multiple = clamped(nearest + aside, 1.0f, largest), scale = multiple * step;
    const ScaledMoments found = moments_at(scale);
    const Floats gained = found.gain(scale);
    const Ints better = aside == 0.0f ? ~Ints{} : gained > most;
    most = better ? gained : most;
    best = better ? multiple : best;
    of_best = {better ? found.qq : of_best.qq, better ? found.xq : of_best.xq};
  }
}

// The ends are what the largest scale is tried to become; the first is the largest multiple there is.
template <int Subblocks, int Ends>
Floats shared_step(const Floats (&wanted)[Subblocks], const Floats (&curvature)[Subblocks], float unit,
                   const float (&ends)[Ends]) {
  Floats largest = wanted[0];
  for (int s = 1; s < Subblocks; ++s) largest = larger(wanted[s], largest);
  Floats best{}, least = splat(__builtin_inff());
  for (const float end : ends) {
    Floats trial = storable(largest / end, unit), fits[Subblocks], squares[Subblocks];
    for (int s = 0; s < Subblocks; ++s) {
      const Floats multiple = nearest_multiple(wanted[s], trial, ends[0]), weighted = multiple * curvature[s];
      fits[s] = weighted * wanted[s];
      squares[s] = weighted * multiple;
    }
    trial = storable(sum_of_halves(fits) * reciprocal(sum_of_halves(squares)), unit);
    Floats losses[Subblocks];
    for (int s = 0; s < Subblocks; ++s) {
      const Floats missing = nearest_multiple(wanted[s], trial, ends[0]) * trial - wanted[s];
      losses[s] = missing * missing * curvature[s];
    }
    const Floats loss = sum_of_halves(losses);
    const Ints better = end == ends[0] ? ~Ints{} : loss < least;
    best = better ? trial : best;
    least = better ? loss : least;
  }
  return best;
}

// The least-squares step for given multiples and points, where it is an improvement after rounding.
template <int Subblocks>
Floats refit(const Floats (&multiples)[Subblocks], const ScaledMoments (&moments)[Subblocks], Floats step, float unit) {
  Floats qq[Subblocks], xq[Subblocks];
  for (int s = 0; s < Subblocks; ++s) {
    qq[s] = multiples[s] * multiples[s] * moments[s].qq;
    xq[s] = multiples[s] * moments[s].xq;
  }
  const ScaledMoments sums{sum_of_halves(qq), sum_of_halves(xq)};
  const Floats optimum = as_half(larger(sums.optimum(), Floats{}) / unit) * unit;
  return sums.gain(optimum) > sums.gain(step) ? optimum : step;
}

}  // namespace qconv
