// What both searches share: where they begin, and the one float16 scale that the integer scales of a super-block's
// sub-blocks have in common (qconv/grids/ggml/superblock.py).
#pragma once

#include "lanes.h"

namespace qconv {

// The importance from an element on; there may be none.
template <bool Weighted>
const float* part(const float* importance, int element) {
  return Weighted ? importance + element : nullptr;
}

struct Lattice;

// The trials' beginnings, one or two numbers each, and for types that have one the lattice.
struct Starts {
  int count;
  const float* values;
  const Lattice* lattice;
};

template <int Subblocks>
Floats shared_scale(const Floats (&wanted)[Subblocks], const Floats (&curvature)[Subblocks], float lowest,
                    float highest) {
  Floats extreme = wanted[0];
  for (int s = 1; s < Subblocks; ++s) extreme = magnitude(wanted[s]) > magnitude(extreme) ? wanted[s] : extreme;
  if (lowest == 0.0f) extreme = magnitude(extreme);
  Floats best{}, least{};
  for (const float end : {highest, lowest}) {
    if (end == 0.0f) break;  // no wanted scale is negative
    Floats trial = storable(extreme / end);
    Floats inverse = reciprocal(trial), fits{}, squares{};
    for (int s = 0; s < Subblocks; ++s) {
      const Floats integer = rounded_within(wanted[s] * inverse, lowest, highest);
      const Floats weighted = integer * curvature[s];
      fits += weighted * wanted[s];
      squares += weighted * integer;
    }
    const Floats optimum = fits * reciprocal(squares);
    trial = optimum == 0.0f ? trial : storable(optimum);
    inverse = reciprocal(trial);
    Floats loss{};
    for (int s = 0; s < Subblocks; ++s) {
      const Floats integer = rounded_within(wanted[s] * inverse, lowest, highest);
      const Floats missing = integer * trial - wanted[s];
      loss += missing * missing * curvature[s];
    }
    const Ints better = end == highest ? ~Ints{} : loss < least;
    best = better ? trial : best;
    least = better ? loss : least;
  }
  return best;
}

}  // namespace qconv
