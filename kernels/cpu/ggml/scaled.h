// The search of qconv/grids/ggml/scaled.py, which explains it, over lanes: weights = scale * value(code).
#pragma once

#include "lanes.h"
#include "superblock.h"

namespace qconv {

constexpr int kSurvivors = 2;

// Values that are a range of integers.
template <int Lowest, int Highest>
struct Integers {
  static Floats nearest(Floats multiples) { return rounded_within(multiples, Lowest, Highest); }
  static Floats code(Floats value) { return value - float(Lowest); }
};

// The sixteen values of IQ4_NL and IQ4_XS, unevenly spaced as the quantiles of bell-shaped weights are.
struct Codebook {
  static constexpr float kValues[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

  // A half-way point goes to the upper value. Shifted before they are compared, as the table of the reference is.
  static Floats nearest(Floats multiples) {
    const Floats shifted = multiples + 128.0f;
    Floats value = splat(kValues[0]);
    for (int i = 1; i < 16; ++i) value += shifted >= boundary(i) ? splat(kValues[i] - kValues[i - 1]) : Floats{};
    return value;
  }

  static Floats code(Floats value) {
    Ints code{};
    for (int i = 1; i < 16; ++i) code -= value >= kValues[i];
    return __builtin_convertvector(code, Floats);
  }

 private:
  static constexpr float boundary(int i) { return (kValues[i] + kValues[i - 1]) / 2 + 128; }
};

struct ScaledMoments {
  Floats qq, xq;

  // The scale of the least squared error.
  Floats optimum() const { return xq * reciprocal(qq); }
  // By how much the squared error falls below that of zeros.
  Floats gain(Floats scale) const { return scale * (2.0f * xq - scale * qq); }
};

// The weights of one sub-block of each lane.
template <class Values, int Elements, bool Weighted>
struct ScaledSource {
  const Floats* weights;
  const float* importance;

  // The codes of the nearest values for a scale.
  void codes(Floats scale, Floats* out) const {
    const Floats inverse = reciprocal(scale);
    for (int i = 0; i < Elements; ++i) out[i] = Values::code(Values::nearest(weights[i] * inverse));
  }

  // Of the nearest values for each trial's scale. Sums run over sixteen elements, and then over the sixteens.
  template <int Trials>
  void moments(const Floats (&scales)[Trials], ScaledMoments (&out)[Trials]) const {
    Floats inverse[Trials];
    for (int t = 0; t < Trials; ++t) {
      inverse[t] = reciprocal(scales[t]);
      out[t] = ScaledMoments{};
    }
    for (int half = 0; half < Elements; half += 16) {
      ScaledMoments sums[Trials] = {};
      for (int i = half; i < half + 16; ++i) {
        for (int t = 0; t < Trials; ++t) {
          const Floats q = Values::nearest(weights[i] * inverse[t]);
          const Floats weighted = Weighted ? q * importance[i] : q;
          sums[t].xq += weighted * weights[i];
          sums[t].qq += weighted * q;
        }
      }
      for (int t = 0; t < Trials; ++t) {
        out[t].xq += sums[t].xq;
        out[t].qq += sums[t].qq;
      }
    }
  }

  // The best real scale that the trials find: each gives the weight of the largest magnitude one of the reaches.
  Floats best_of_reaches(const Starts& reaches, ScaledMoments& best_moments) const {
    Floats low = weights[0], high = weights[0];
    for (int i = 1; i < Elements; ++i) {
      low = smaller(low, weights[i]);
      high = larger(high, weights[i]);
    }
    const Floats largest = high >= -low ? high : low;
    Floats best[kSurvivors] = {}, best_gain[kSurvivors];
    for (Floats& gained : best_gain) gained = splat(-__builtin_inff());
    for (int start = 0; start < reaches.count; start += kSurvivors) {
      Floats scales[kSurvivors];
      ScaledMoments found[kSurvivors];
      for (int t = 0; t < kSurvivors; ++t) scales[t] = largest / reaches.values[start + t];
      moments(scales, found);
      for (int t = 0; t < kSurvivors; ++t) {
        const Floats scale = found[t].optimum(), gained = found[t].gain(scale);
        const Ints better = gained > best_gain[t];
        best[t] = better ? scale : best[t];
        best_gain[t] = better ? gained : best_gain[t];
      }
    }
    ScaledMoments found[kSurvivors];
    moments(best, found);
    Floats scale = found[0].optimum();
    Floats most = found[0].gain(scale);
    best_moments = found[0];
    for (int t = 1; t < kSurvivors; ++t) {
      const Floats other = found[t].optimum();
      const Ints better = found[t].gain(other) > most;
      scale = better ? other : scale;
      best_moments = {better ? found[t].qq : best_moments.qq, better ? found[t].xq : best_moments.xq};
    }
    return scale;
  }
};

// What is found for one block of each lane. Without super-blocks d is not used, and the scale is float16.
template <int Subblocks, int Elements>
struct ScaledEncoded {
  Floats codes[Subblocks][Elements];
  Floats scales[Subblocks];
  Floats d;
};

template <class Values, int Elements, bool Weighted>
void encode_scaled(const Floats* weights, const float* importance, const Starts& reaches,
                   ScaledEncoded<1, Elements>& out) {
  const ScaledSource<Values, Elements, Weighted> source{weights, importance};
  ScaledMoments moments;
  out.scales[0] = as_half(source.best_of_reaches(reaches, moments));
  source.codes(out.scales[0], out.codes[0]);
}

// Integer scales reach from -top to top - 1.
template <class Values, int Subblocks, int Elements, bool Weighted>
void encode_scaled(const Floats* weights, const float* importance, float top, const Starts& reaches,
                   ScaledEncoded<Subblocks, Elements>& out) {
  using Source = ScaledSource<Values, Elements, Weighted>;
  Floats wanted[Subblocks], curvature[Subblocks];
  for (int s = 0; s < Subblocks; ++s) {
    ScaledMoments moments;
    const Source source{weights + s * Elements, part<Weighted>(importance, s * Elements)};
    wanted[s] = source.best_of_reaches(reaches, moments);
    curvature[s] = moments.qq;
  }
  out.d = shared_scale(wanted, curvature, -top, top - 1.0f);
  const Floats inverse = reciprocal(out.d);
  for (int s = 0; s < Subblocks; ++s) {
    out.scales[s] = rounded_within(wanted[s] * inverse, -top, top - 1.0f);
    Source{weights + s * Elements, part<Weighted>(importance, s * Elements)}.codes(out.d * out.scales[s], out.codes[s]);
  }
}

}  // namespace qconv
