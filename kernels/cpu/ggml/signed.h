// The search of qconv/grids/ggml/signed.py, which explains it, over lanes: weights = sign * scale * magnitude.
#pragma once

#include "lattice.h"
#include "odd_multiples.h"
#include "packing.h"

namespace qconv {

constexpr int kSigns = 8;
constexpr float kSignedEnds[] = {31.0f, 29.0f, 27.0f, 25.0f, 23.0f, 21.0f};

// One weight of each eight, and whether its sign is wrong.
template <int Elements>
struct Flips {
  Ints which[Elements / kSigns], odd[Elements / kSigns];

  Ints turned(int element) const { return odd[element / kSigns] & (which[element / kSigns] == element % kSigns); }
};

template <int Elements, int Point, int Levels, bool Even>
struct SignedSource {
  static constexpr int kEights = Elements / kSigns;

  const Lattice& lattice;
  const float* importance;
  Ints negative[Elements];
  Floats magnitudes[Elements], x[Elements];

  SignedSource(const Lattice& points, const Floats* weights, const float* of_weights)
      : lattice(points), importance(of_weights) {
    for (int i = 0; i < Elements; ++i) {
      negative[i] = weights[i] < 0.0f;
      magnitudes[i] = magnitude(weights[i]);
      x[i] = importance[i] * magnitudes[i];
    }
  }

  // The weights whose sign is the cheapest to turn, and the next cheapest.
  template <int Candidates>
  void flips(Floats scale, Flips<Elements> (&out)[Candidates]) const {
    const float lowest = lattice.levels[0];
    const Floats inverse = reciprocal(scale);
    for (int eight = 0; eight < kEights; ++eight) {
      Floats cost[kSigns];
      Ints odd{};
      for (int i = 0; i < kSigns; ++i) {
        const int element = eight * kSigns + i;
        const Floats multiple = magnitudes[element] * inverse;
        const Floats above = multiple + lowest, below = larger(lowest - multiple, Floats{});
        cost[i] = (above * above - below * below) * importance[element];
        odd ^= negative[element];
      }
      for (Flips<Elements>& candidate : out) {
        Floats least = cost[0];
        Ints which{};
        for (int i = 1; i < kSigns; ++i) {
          const Ints better = cost[i] < least;
          least = better ? cost[i] : least;
          which = better ? Ints{} + i : which;
        }
        candidate.which[eight] = which;
        candidate.odd[eight] = odd;
        for (int i = 0; i < kSigns; ++i) cost[i] = which == i ? splat(__builtin_inff()) : cost[i];
      }
    }
  }

  // What the points are to approximate at a scale, with the cheapest signs turned.
  void targets(Floats scale, Floats (&out)[Elements]) const {
    Flips<Elements> found[1];
    if constexpr (Even) flips(scale, found);
    turned(found[0], out);
  }

  void turned(const Flips<Elements>& flips, Floats (&out)[Elements]) const {
    for (int i = 0; i < Elements; ++i) {
      if constexpr (Even) {
        out[i] = flips.turned(i) ? -x[i] : x[i];
      } else {
        out[i] = x[i];
      }
    }
  }

  Target<Elements, Point, Levels> target(const Floats (&targets)[Elements]) const {
    return {lattice, targets, importance};
  }

  // The best real scale that the trials find, and the curvature of the loss there.
  Floats best_of_starts(const Starts& starts, Floats& curvature) const {
    Floats peak = magnitudes[0], squares[Elements], weights[Elements];
    for (int i = 0; i < Elements; ++i) {
      peak = larger(magnitudes[i], peak);
      squares[i] = x[i] * magnitudes[i];
      weights[i] = splat(importance[i]);
    }
    const Floats mean = square_root(sum_of_halves(squares) / sum_of_halves(weights));
    Floats targets_there[Elements];
    targets(mean * lattice.inverse_middle, targets_there);
    const auto target = this->target(targets_there);
    Floats best{}, most = splat(-__builtin_inff());
    const auto compare = [&](const ScaledMoments& found) {
      const Floats scale = larger(found.optimum(), Floats{}), gained = found.gain(scale);
      const Ints better = gained > most;
      best = better ? scale : best;
      most = better ? gained : most;
      curvature = better ? found.qq : curvature;
    };
    for (int start = 0; start < starts.count; ++start) {
      compare(target.moments(peak * starts.values[2 * start] + mean * starts.values[2 * start + 1]));
    }
    compare(target.lowest());
    return best;
  }

  // Codes and signs at the scale that is stored, and their moments.
  ScaledMoments best_points(Floats scale, Ints (&codes)[Elements / Point], Ints (&signs)[Elements]) const {
    constexpr int kCandidates = Even ? 2 : 1, kPoints = kSigns / Point;
    Flips<Elements> candidates[kCandidates];
    if constexpr (Even) flips(scale, candidates);
    Floats targets_there[Elements], values[Elements], gains[kEights];
    for (int candidate = 0; candidate < kCandidates; ++candidate) {
      Floats tried_targets[Elements], tried_values[Elements];
      Ints tried[Elements / Point];
      turned(candidates[candidate], tried_targets);
      target(tried_targets).codes(scale, tried, tried_values);
      for (int eight = 0; eight < kEights; ++eight) {
        Floats terms[kSigns];
        for (int i = 0; i < kSigns; ++i) {
          const int element = eight * kSigns + i;
          const Floats multiple = tried_values[element] * scale;
          terms[i] = multiple * (2.0f * tried_targets[element] - importance[element] * multiple);
        }
        const Floats gain = sum_of_halves(terms);
        const Ints better = candidate == 0 ? ~Ints{} : gain > gains[eight];
        gains[eight] = better ? gain : gains[eight];
        for (int i = 0; i < kPoints; ++i) {
          Ints& code = codes[eight * kPoints + i];
          code = better ? tried[eight * kPoints + i] : code;
        }
        for (int element = eight * kSigns; element < (eight + 1) * kSigns; ++element) {
          Ints sign = negative[element];
          if constexpr (Even) sign ^= candidates[candidate].turned(element);
          signs[element] = better ? sign : signs[element];
          values[element] = better ? tried_values[element] : values[element];
          targets_there[element] = better ? tried_targets[element] : targets_there[element];
        }
      }
    }
    return moments_of(values, targets_there, importance);
  }
};

// What is found for one block of each lane.
template <int Subblocks, int Elements, int Point>
struct SignedEncoded {
  Ints codes[Subblocks][Elements / Point];
  Ints signs[Subblocks][Elements / kSigns];  // bit i is that of element i of eight
  Ints k[Subblocks];
  Floats d;
};

template <int Subblocks, int Elements, int Point, int Levels, bool Even, bool Weighted>
void encode_signed(const Floats* weights, const float* given, float unit, const Starts& starts,
                   SignedEncoded<Subblocks, Elements, Point>& out) {
  using Source = SignedSource<Elements, Point, Levels, Even>;
  float ones[Elements];
  for (float& one : ones) one = 1.0f;
  const auto source_of = [&](int s) {
    return Source(*starts.lattice, weights + s * Elements, Weighted ? given + s * Elements : ones);
  };
  Floats wanted[Subblocks], curvature[Subblocks], multiples[Subblocks];
  ScaledMoments moments[Subblocks];
  for (int s = 0; s < Subblocks; ++s) wanted[s] = source_of(s).best_of_starts(starts, curvature[s]);
  Floats step = shared_step(wanted, curvature, unit, kSignedEnds);
  for (int s = 0; s < Subblocks; ++s) {
    const Source source = source_of(s);
    Floats targets[Elements];
    source.targets(wanted[s], targets);
    const auto target = source.target(targets);
    const auto moments_at = [&](Floats scale) { return target.moments(scale); };
    best_multiple(wanted[s], step, kSignedEnds[0], moments_at, multiples[s], moments[s]);
  }
  step = refit(multiples, moments, step, unit);
  for (int s = 0; s < Subblocks; ++s) {
    Ints signs[Elements];
    moments[s] = source_of(s).best_points(step * multiples[s], out.codes[s], signs);
    for (int eight = 0; eight < Elements / kSigns; ++eight) {
      out.signs[s][eight] = Ints{};
      for (int i = 0; i < kSigns; ++i) out.signs[s][eight] |= signs[eight * kSigns + i] & (1 << i);
    }
    out.k[s] = __builtin_convertvector((multiples[s] - 1.0f) / 2.0f, Ints);
  }
  out.d = refit(multiples, moments, step, unit) / unit;
}

// Two sub-blocks' k in a byte, the first in the low bits.
template <int Subblocks, int Size>
void append_scales(const Ints (&k)[Subblocks], Block<Size>& block) {
  for (int s = 0; s < Subblocks; s += 2) block.append(bytes_of(k[s] | (k[s + 1] << 4)));
}

// For each sub-block of 32 a word: seven signs of each eight weights, and k on top.
template <int Subblocks, int Size>
void append_word(const Ints (&signs)[Subblocks][4], const Ints (&k)[Subblocks], int s, Block<Size>& block) {
  Ints word = k[s] << 28;
  for (int i = 0; i < 4; ++i) word |= (signs[s][i] & 127) << (7 * i);
  for (int shift = 0; shift < 32; shift += 8) block.append(bytes_of(word >> shift));
}

// Bits of neighbouring codes, from bit 8 upward, in one byte, the first in the lowest.
template <int Bits, int Subblocks, int Groups, int Size>
void append_upper(const Ints (&codes)[Subblocks][Groups], Block<Size>& block) {
  constexpr int kFields = 8 / Bits;
  for (int first = 0; first < Subblocks * Groups; first += kFields) {
    Ints joined{};
    for (int i = 0; i < kFields; ++i) {
      joined |= (codes[(first + i) / Groups][(first + i) % Groups] >> 8) << (Bits * i);
    }
    block.append(bytes_of(joined));
  }
}

struct IQ2_XXS {
  static constexpr int kElements = 256, kBytes = 66;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    SignedEncoded<8, 32, 8> found;
    encode_signed<8, 32, 8, 3, true, Weighted>(weights, importance, 1.0f / 8, starts, found);
    block.half(found.d);
    for (int s = 0; s < 8; ++s) {
      for (const Ints code : found.codes[s]) block.append(bytes_of(code));
      append_word(found.signs, found.k, s, block);
    }
  }
};

struct IQ2_XS {
  static constexpr int kElements = 256, kBytes = 74;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    SignedEncoded<16, 16, 8> found;
    encode_signed<16, 16, 8, 3, true, Weighted>(weights, importance, 1.0f / 8, starts, found);
    block.half(found.d);
    for (int s = 0; s < 16; ++s) {
      for (int i = 0; i < 2; ++i) {
        block.word(found.codes[s][i] | ((found.signs[s][i] & 127) << 9));
      }
    }
    append_scales(found.k, block);
  }
};

struct IQ2_S {
  static constexpr int kElements = 256, kBytes = 82;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    SignedEncoded<16, 16, 8> found;
    encode_signed<16, 16, 8, 3, false, Weighted>(weights, importance, 1.0f / 8, starts, found);
    block.half(found.d);
    block.low_bytes(found.codes);
    block.low_bytes(found.signs);
    append_upper<2>(found.codes, block);
    append_scales(found.k, block);
  }
};

struct IQ3_XXS {
  static constexpr int kElements = 256, kBytes = 98;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    SignedEncoded<8, 32, 4> found;
    encode_signed<8, 32, 4, 8, true, Weighted>(weights, importance, 1.0f / 4, starts, found);
    block.half(found.d);
    block.low_bytes(found.codes);
    for (int s = 0; s < 8; ++s) append_word(found.signs, found.k, s, block);
  }
};

struct IQ3_S {
  static constexpr int kElements = 256, kBytes = 110;

  template <bool Weighted>
  static void encode(Floats* weights, const float* importance, const Starts& starts, Block<kBytes>& block) {
    SignedEncoded<8, 32, 4> found;
    encode_signed<8, 32, 4, 8, false, Weighted>(weights, importance, 1.0f, starts, found);
    block.half(found.d);
    block.low_bytes(found.codes);
    append_upper<1>(found.codes, block);
    block.low_bytes(found.signs);
    append_scales(found.k, block);
  }
};

}  // namespace qconv
