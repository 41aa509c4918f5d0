// The search of qconv/grids/ggml/shifted.py, which explains it, over lanes: weights = scale * (g + shift).
#pragma once

#include "lattice.h"
#include "odd_multiples.h"
#include "packing.h"

namespace qconv {

constexpr int kShiftedPoint = 8;
constexpr float kShift = 0.125f;
constexpr float kShiftedEnds[] = {15.0f, 13.0f, 11.0f, 9.0f};

// The weights of one sub-block of each lane; Together of them share a shift.
template <int Elements, int Together>
struct ShiftedSource {
  static constexpr int kGroups = Elements / kShiftedPoint, kShifts = Elements / Together;

  struct Points {
    Floats values[Elements];
    Ints codes[kGroups], negative[kGroups];
  };

  const Lattice& lattice;
  const Floats* weights;
  const float* importance;
  Floats x[Elements];

  ShiftedSource(const Lattice& points, const Floats* of_weights, const float* of_importance)
      : lattice(points), weights(of_weights), importance(of_importance) {
    for (int i = 0; i < Elements; ++i) x[i] = importance[i] * weights[i];
  }

  // By how much those that share the shift of that number gain.
  Floats gain(const Floats* values, Floats scale, int shift) const {
    Floats terms[Together];
    for (int i = 0; i < Together; ++i) {
      const int element = shift * Together + i;
      const Floats multiple = values[element] * scale;
      terms[i] = multiple * (2.0f * x[element] - importance[element] * multiple);
    }
    return sum_of_halves(terms);
  }

  // Whether a negative shift is better, of values that belong to each.
  Ints better(const Floats* above, const Floats* below, Floats scale, int shift) const {
    return gain(below, scale, shift) > gain(above, scale, shift);
  }

  void free_values(Floats scale, Floats (&values)[Elements]) const {
    const Floats inverse = reciprocal(scale);
    Floats above[Elements], below[Elements];
    for (int i = 0; i < Elements; ++i) {
      const Floats multiple = weights[i] * inverse;
      above[i] = rounded_within(multiple - kShift, -1.0f, 1.0f) + kShift;
      below[i] = rounded_within(multiple + kShift, -1.0f, 1.0f) - kShift;
    }
    for (int shift = 0; shift < kShifts; ++shift) {
      const Ints turned = better(above, below, scale, shift);
      for (int i = shift * Together; i < (shift + 1) * Together; ++i) values[i] = turned ? below[i] : above[i];
    }
  }

  // Of values whose shift is given.
  void nearest(Floats scale, Floats shift, Floats (&values)[Elements], Ints (&codes)[kGroups]) const {
    const Floats twice = scale + scale, square = scale * scale, moved = square * (2.0f * shift);
    for (int group = 0; group < kGroups; ++group) {
      Floats linear[kShiftedPoint], quadratic[kShiftedPoint];
      for (int i = 0; i < kShiftedPoint; ++i) {
        const int element = group * kShiftedPoint + i;
        linear[i] = x[element] * twice - importance[element] * moved;
        quadratic[i] = importance[element] * square;
      }
      codes[group] = nearest_point<kShiftedPoint, 3>(lattice, linear, quadratic, values + group * kShiftedPoint);
    }
    for (Floats& value : values) value += shift;
  }

  void points(Floats scale, Points& out) const {
    Floats below[Elements];
    Ints codes_below[kGroups];
    nearest(scale, splat(kShift), out.values, out.codes);
    nearest(scale, splat(-kShift), below, codes_below);
    for (int shift = 0; shift < kShifts; ++shift) {
      const Ints turned = better(out.values, below, scale, shift);
      for (int i = shift * Together; i < (shift + 1) * Together; ++i) {
        out.values[i] = turned ? below[i] : out.values[i];
        const int group = i / kShiftedPoint;
        out.codes[group] = turned ? codes_below[group] : out.codes[group];
        out.negative[group] = turned;
      }
    }
  }

  ScaledMoments moments(Floats scale) const {
    Points found;
    points(scale, found);
    return moments_of(found.values, x, importance);
  }

  // The best real scale that the trials find without a lattice.
  Floats best_of_starts(const Starts& starts) const {
    Floats peak = magnitude(weights[0]), squares[Elements], of_weights[Elements];
    for (int i = 0; i < Elements; ++i) {
      peak = larger(magnitude(weights[i]), peak);
      squares[i] = x[i] * weights[i];
      of_weights[i] = splat(importance[i]);
    }
    const Floats mean = square_root(sum_of_halves(squares) / sum_of_halves(of_weights));
    Floats best{}, most = splat(-__builtin_inff());
    for (int start = 0; start < starts.count; ++start) {
      Floats values[Elements];
      free_values(peak * starts.values[2 * start] + mean * starts.values[2 * start + 1], values);
      const ScaledMoments found = moments_of(values, x, importance);
      const Floats scale = larger(found.optimum(), Floats{}), gained = found.gain(scale);
      best = gained > most ? scale : best;
      most = larger(gained, most);
    }
    return best;
  }
};

// What is found for one block of each lane.
template <int Subblocks, int Groups>
struct ShiftedEncoded {
  Ints codes[Subblocks][Groups], negative[Subblocks][Groups];
  Ints k[Subblocks];
  Floats d;
};

template <int Subblocks, int Elements, int Together, bool Weighted>
void encode_shifted(const Floats* weights, const float* given, const Starts& starts,
                    ShiftedEncoded<Subblocks, Elements / kShiftedPoint>& out) {
  using Source = ShiftedSource<Elements, Together>;
  float ones[Elements];
  for (float& one : ones) one = 1.0f;
  const auto source_of = [&](int s) {
    return Source(*starts.lattice, weights + s * Elements, Weighted ? given + s * Elements : ones);
  };
  Floats wanted[Subblocks], curvature[Subblocks], multiples[Subblocks];
  ScaledMoments moments[Subblocks];
  for (int s = 0; s < Subblocks; ++s) {
    const Source source = source_of(s);
    const ScaledMoments found = source.moments(source.best_of_starts(starts));
    wanted[s] = larger(found.optimum(), Floats{});
    curvature[s] = found.qq;
  }
  Floats step = shared_step(wanted, curvature, 1.0f, kShiftedEnds);
  for (int s = 0; s < Subblocks; ++s) {
    const Source source = source_of(s);
    const auto moments_at = [&](Floats scale) { return source.moments(scale); };
    best_multiple(wanted[s], step, kShiftedEnds[0], moments_at, multiples[s], moments[s]);
  }
  step = refit(multiples, moments, step, 1.0f);
  for (int s = 0; s < Subblocks; ++s) {
    const Source source = source_of(s);
    typename Source::Points found;
    source.points(step * multiples[s], found);
    moments[s] = moments_of(found.values, source.x, source.importance);
    for (int group = 0; group < Source::kGroups; ++group) {
      out.codes[s][group] = found.codes[group];
      out.negative[s][group] = found.negative[group] & 1;
    }
    out.k[s] = __builtin_convertvector((multiples[s] - 1.0f) / 2.0f, Ints);
  }
  out.d = refit(multiples, moments, step, 1.0f);
}

struct IQ1_S {
  static constexpr int kElements = 256, kBytes = 50;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    ShiftedEncoded<8, 4> found;
    encode_shifted<8, 32, 32, Weighted>(weights, importance, starts, found);
    block.half(found.d);
    block.low_bytes(found.codes);
    for (int s = 0; s < 8; ++s) {
      Ints word = (found.k[s] << 12) | (found.negative[s][0] << 15);
      for (int i = 0; i < 4; ++i) word |= (found.codes[s][i] >> 8) << (3 * i);
      block.word(word);
    }
  }
};

struct IQ1_M {
  static constexpr int kElements = 256, kBytes = 56;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    ShiftedEncoded<16, 2> found;
    encode_shifted<16, 16, 8, Weighted>(weights, importance, starts, found);
    block.low_bytes(found.codes);
    for (int s = 0; s < 16; ++s) {
      Ints upper[2];
      for (int i = 0; i < 2; ++i) upper[i] = (found.codes[s][i] >> 8) | (found.negative[s][i] << 3);
      block.append(bytes_of(upper[0] | (upper[1] << 4)));
    }
    const Ints d = half_bits(found.d);
    for (int word = 0; word < 4; ++word) {
      Ints joined = ((d >> (4 * word)) & 15) << 12;
      for (int i = 0; i < 4; ++i) joined |= found.k[4 * word + i] << (3 * i);
      block.word(joined);
    }
  }
};

}  // namespace qconv
