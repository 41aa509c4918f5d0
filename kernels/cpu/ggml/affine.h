// The search of qconv/grids/ggml/affine.py, which explains it, over lanes: weights = scale * code + base.
#pragma once

#include "lanes.h"
#include "superblock.h"

namespace qconv {

constexpr int kAnchors = 3;  // starts come in threes: a range shortened at its high end, on both sides, at its low end

struct AffineMoments {
  Floats q, qq, xq;
};

struct Line {
  Floats scale, base;
};

// The weights of one sub-block of each lane, and the sums that no trial changes.
template <int Elements, bool Weighted>
class AffineSource {
 public:
  Floats low, range, x;
  float total;

  AffineSource() = default;

  // Shifts the weights, in place, so that each sub-block begins at 0. Every base in here is shifted alike.
  AffineSource(Floats* weights, const float* importance, float levels, bool bounded)
      : low(weights[0]), weights_(weights), importance_(importance), levels_(levels), bounded_(bounded) {
    Floats high = low;
    for (int i = 1; i < Elements; ++i) {
      low = smaller(low, weights[i]);
      high = larger(high, weights[i]);
    }
    if (bounded) {  // a super-block subtracts its mins: no base can be positive
      low = smaller(low, Floats{});
      high = larger(high, Floats{});
    }
    range = high - low;
    x = Floats{};
    total = 0.0f;
    for (int half = 0; half < Elements; half += 16) {
      Floats sum{};
      float weight = 0.0f;
      for (int i = half; i < half + 16; ++i) {
        weights[i] -= low;
        sum += Weighted ? weights[i] * importance[i] : weights[i];
        weight += Weighted ? importance[i] : 1.0f;
      }
      x += sum;
      total += weight;
    }
  }

  // The nearest codes for a scale and base.
  void codes(Line line, Floats* out) const {
    const Floats inverse = reciprocal(line.scale), offset = line.base * inverse;
    for (int i = 0; i < Elements; ++i) out[i] = code(weights_[i], inverse, offset);
  }

  // Of the nearest codes for each trial's scale and base. Sums run over sixteen elements, and then over the sixteens.
  template <int Trials>
  void moments(const Line (&lines)[Trials], AffineMoments (&out)[Trials]) const {
    Floats inverse[Trials], offset[Trials];
    for (int t = 0; t < Trials; ++t) {
      inverse[t] = reciprocal(lines[t].scale);
      offset[t] = lines[t].base * inverse[t];
      out[t] = AffineMoments{};
    }
    for (int half = 0; half < Elements; half += 16) {
      AffineMoments sums[Trials] = {};
      for (int i = half; i < half + 16; ++i) {
        for (int t = 0; t < Trials; ++t) {
          const Floats q = code(weights_[i], inverse[t], offset[t]);
          const Floats weighted = Weighted ? q * importance_[i] : q;
          sums[t].q += weighted;
          sums[t].xq += weighted * weights_[i];
          sums[t].qq += weighted * q;
        }
      }
      for (int t = 0; t < Trials; ++t) {
        out[t].q += sums[t].q;
        out[t].xq += sums[t].xq;
        out[t].qq += sums[t].qq;
      }
    }
  }

  // The scale and base of the least squared error for given codes (weighted linear regression).
  Line fit(const AffineMoments& m) const {
    const Floats inverse = inverse_determinant(total * m.qq, m.q * m.q);
    const Floats scale = (total * m.xq - m.q * x) * inverse;
    const Floats best = base(m, scale);
    // Where the base met its bound, or the codes are all alike, the scale is what remains to be chosen.
    return {(m.xq - best * m.q) * reciprocal(m.qq), best};
  }

  // The best base for given codes and scale.
  Floats base(const AffineMoments& m, Floats scale) const {
    const Floats best = (x - scale * m.q) / total;
    return bounded_ ? smaller(best, -low) : best;
  }

  // By how much the squared error falls below that of zeros.
  Floats gain(const AffineMoments& m, Line line) const {
    const Floats of_scale = line.scale * (2.0f * m.xq - line.scale * m.qq - 2.0f * line.base * m.q);
    return of_scale + line.base * (2.0f * x - line.base * total);
  }

  // The best real scale and base that the trials find, and the moments of their codes. A start is what the range is
  // divided by for its scale, and at how many of those its base stands.
  Line best_of_ranges(const Starts& starts, AffineMoments& best_moments) const {
    Line best[kAnchors] = {};
    Floats best_gain[kAnchors];
    for (Floats& gained : best_gain) gained = splat(-__builtin_inff());
    for (int start = 0; start < starts.count; start += kAnchors) {
      Line lines[kAnchors];
      AffineMoments found[kAnchors];
      for (int a = 0; a < kAnchors; ++a) {
        const float* pair = starts.values + 2 * (start + a);
        lines[a].scale = range / pair[0];
        lines[a].base = lines[a].scale * pair[1];
      }
      moments(lines, found);
      for (int a = 0; a < kAnchors; ++a) {
        const Line line = fit(found[a]);
        const Floats gained = gain(found[a], line);
        const Ints better = gained > best_gain[a];
        best[a] = {better ? line.scale : best[a].scale, better ? line.base : best[a].base};
        best_gain[a] = better ? gained : best_gain[a];
      }
    }
    AffineMoments found[kAnchors];
    moments(best, found);
    Line line = fit(found[0]);
    Floats most = gain(found[0], line);
    best_moments = found[0];
    for (int a = 1; a < kAnchors; ++a) {
      const Line other = fit(found[a]);
      const Floats gained = gain(found[a], other);
      const Ints better = gained > most;
      most = better ? gained : most;
      line = {better ? other.scale : line.scale, better ? other.base : line.base};
      choose(best_moments, better, found[a]);
    }
    return line;
  }

  static void choose(AffineMoments& moments, Ints where, const AffineMoments& other) {
    moments = {where ? other.q : moments.q, where ? other.qq : moments.qq, where ? other.xq : moments.xq};
  }

 private:
  Floats code(Floats weight, Floats inverse, Floats offset) const {
    return rounded_within(weight * inverse - offset, 0.0f, levels_);
  }

  Floats* weights_;
  const float* importance_;
  float levels_;
  bool bounded_;
};

// What is found for one block of each lane. Without super-blocks d and dmin are not used, scales and bases are float16.
template <int Subblocks, int Elements>
struct AffineEncoded {
  Floats codes[Subblocks][Elements];
  Floats scales[Subblocks], bases[Subblocks];
  Floats d, dmin;
};

template <int Elements, bool Weighted>
void encode_affine(Floats* weights, const float* importance, float levels, const Starts& starts,
                   AffineEncoded<1, Elements>& out) {
  const AffineSource<Elements, Weighted> source(weights, importance, levels, false);
  AffineMoments moments;
  const Line line = source.best_of_ranges(starts, moments);
  out.scales[0] = as_half(line.scale);
  out.bases[0] = as_half(line.base + source.low);
  source.codes({out.scales[0], out.bases[0] - source.low}, out.codes[0]);
}

// The least-squares d and dmin for given integers k and m and codes, where their float16 is an improvement. Solved for
// the corrections to both, whose right-hand sides are sums of small residuals.
template <int Subblocks, class Source>
void refit(const Source (&sources)[Subblocks], const AffineMoments (&moments)[Subblocks],
           const Floats (&k)[Subblocks], const Floats (&m)[Subblocks], Floats& d, Floats& dmin) {
  Floats slope_d{}, slope_dmin{}, dd{}, mm{}, dm{};
  for (int s = 0; s < Subblocks; ++s) {
    const AffineMoments& of = moments[s];
    const float total = sources[s].total;
    const Floats scale = d * k[s], base = -dmin * m[s] - sources[s].low;
    slope_d += k[s] * (of.xq - scale * of.qq - base * of.q);
    slope_dmin += m[s] * (sources[s].x - scale * of.q - base * total);
    dd += k[s] * k[s] * of.qq;
    mm += m[s] * m[s] * total;
    dm += k[s] * m[s] * of.q;
  }
  slope_dmin = -slope_dmin;
  dm = -dm;
  const Floats shared = dm * reciprocal(dd);
  Floats new_dmin = dmin + (slope_dmin - shared * slope_d) * inverse_determinant(mm, shared * dm);
  new_dmin = as_half(larger(new_dmin, Floats{}));
  const Floats by_dmin = new_dmin - dmin;
  // Given the dmin that is stored.
  const Floats new_d = as_half(larger(d + (slope_d - dm * by_dmin) * reciprocal(dd), Floats{}));
  const Floats by_d = new_d - d;
  const Floats cost = by_d * by_d * dd + 2.0f * by_d * by_dmin * dm + by_dmin * by_dmin * mm;
  const Ints better = 2.0f * (by_d * slope_d + by_dmin * slope_dmin) > cost;
  d = better ? new_d : d;
  dmin = better ? new_dmin : dmin;
}

template <int Subblocks, int Elements, bool Weighted>
void encode_affine(Floats* weights, const float* importance, float levels, float top, const Starts& starts,
                   AffineEncoded<Subblocks, Elements>& out) {
  using Source = AffineSource<Elements, Weighted>;
  Source sources[Subblocks];
  AffineMoments moments[Subblocks];
  Floats wanted[Subblocks], curvature[Subblocks];
  for (int s = 0; s < Subblocks; ++s) {
    sources[s] = Source(weights + s * Elements, part<Weighted>(importance, s * Elements), levels, true);
    wanted[s] = sources[s].best_of_ranges(starts, moments[s]).scale;
    curvature[s] = moments[s].qq;
  }
  out.d = shared_scale(wanted, curvature, 0.0f, top);
  const Floats inverse_d = reciprocal(out.d);
  for (int s = 0; s < Subblocks; ++s) {
    out.scales[s] = rounded_within(wanted[s] * inverse_d, 0.0f, top);
    wanted[s] = -sources[s].low - sources[s].base(moments[s], out.d * out.scales[s]);
    curvature[s] = splat(sources[s].total);
  }
  out.dmin = shared_scale(wanted, curvature, 0.0f, top);
  const Floats inverse_dmin = reciprocal(out.dmin);
  for (int s = 0; s < Subblocks; ++s) {
    // The integers next to the wanted ones are tried too, each with codes of its own and the m that suits it.
    const Floats k = out.scales[s];
    const Floats ks[3] = {k, larger(k - 1.0f, Floats{}), smaller(k + 1.0f, splat(top))};
    Floats ms[3];
    Line lines[3];
    for (int t = 0; t < 3; ++t) {
      const Floats scale = out.d * ks[t];
      const Floats min = -sources[s].low - sources[s].base(moments[s], scale);
      ms[t] = rounded_within(min * inverse_dmin, 0.0f, top);
      lines[t] = {scale, -out.dmin * ms[t] - sources[s].low};
    }
    AffineMoments tried[3];
    sources[s].moments(lines, tried);
    Floats most = sources[s].gain(tried[0], lines[0]);
    out.bases[s] = ms[0];
    moments[s] = tried[0];
    for (int t = 1; t < 3; ++t) {
      const Floats gained = sources[s].gain(tried[t], lines[t]);
      const Ints better = gained > most;
      most = better ? gained : most;
      out.scales[s] = better ? ks[t] : out.scales[s];
      out.bases[s] = better ? ms[t] : out.bases[s];
      Source::choose(moments[s], better, tried[t]);
    }
  }
  refit(sources, moments, out.scales, out.bases, out.d, out.dmin);
  for (int s = 0; s < Subblocks; ++s) {
    sources[s].codes({out.d * out.scales[s], -out.dmin * out.bases[s] - sources[s].low}, out.codes[s]);
  }
}

}  // namespace qconv
