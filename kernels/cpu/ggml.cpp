// Encoders of ggml's block types. The bytes are those of the torch operations in qconv/grids/ggml, which explain the formulas.

#include "exported.h"
#include "ggml/direct.h"
#include "ggml/input.h"
#include "ggml/searched.h"
#include "ggml/shifted.h"
#include "ggml/signed.h"
#include "ggml/ternary.h"

namespace qconv {
namespace {

template <class Type>
float encode_directly(const Matrix& matrix, float limit, uint8_t* out) {
  return with_dtype(matrix.dtype, [=](auto from) {
    float x[Type::kElements];
    uint8_t* to = out;
    for (int64_t first = 0; first < matrix.rows * matrix.columns; first += Type::kElements) {
      widen(from, matrix.stored, first, Type::kElements, x);
      const float largest = largest_magnitude(x, Type::kElements);
      if (!(largest <= limit)) return largest;
      Type::encode(x, to);
      to += Type::kBytes;
    }
    return 0.0f;
  });
}

template <class Type>
float encode_numbers(const Matrix& matrix, float limit, uint8_t* out) {
  return with_dtype(matrix.dtype, [=](auto from) {
    constexpr int kRun = 1024;
    float x[kRun];
    typename Type::Stored encoded[kRun];
    const int64_t elements = matrix.rows * matrix.columns;
    for (int64_t first = 0; first < elements; first += kRun) {
      const int count = int(std::min<int64_t>(kRun, elements - first));
      widen(from, matrix.stored, first, count, x);
      const float largest = largest_magnitude(x, count);
      if (!(largest <= limit)) return largest;
      for (int i = 0; i < count; ++i) encoded[i] = Type::encoded(x[i]);
      std::memcpy(out + first * sizeof encoded[0], encoded, count * sizeof encoded[0]);
    }
    return 0.0f;
  });
}

template <class Type, bool Weighted>
float encode_searched(const Matrix& matrix, const float* importance, const Starts& starts, float limit, uint8_t* out) {
  const int64_t row_bytes = matrix.columns / Type::kElements * Type::kBytes;
  for (int64_t row = 0; row < matrix.rows; row += kLanes) {
    uint8_t* to = out + row * row_bytes;
    const int lanes = int(std::min<int64_t>(kLanes, matrix.rows - row));
    for (int64_t column = 0; column < matrix.columns; column += Type::kElements) {
      Floats weights[Type::kElements];
      const float largest =
          with_dtype(matrix.dtype, [&](auto from) { return read_lanes(from, matrix, row, column, weights); });
      if (!(largest <= limit)) return largest;
      Block<Type::kBytes> block;
      Type::template encode<Weighted>(weights, part<Weighted>(importance, int(column)), starts, block);
      for (int lane = 0; lane < lanes; ++lane) {
        for (int i = 0; i < Type::kBytes; ++i) to[lane * row_bytes + i] = block.bytes[i][lane];
      }
      to += Type::kBytes;
    }
  }
  return 0.0f;
}

template <class Type>
float encode_searched(const Matrix& matrix, const float* importance, const Starts& starts, float limit, uint8_t* out) {
  return importance == nullptr ? encode_searched<Type, false>(matrix, importance, starts, limit, out)
                               : encode_searched<Type, true>(matrix, importance, starts, limit, out);
}

}  // namespace
}  // namespace qconv

// Encode a matrix by formula. `type` is ggml's number. Gives 0, or the magnitude of the first weight found that is
// beyond `limit` or not finite; then `out` is not complete. -1: no such encoder.
EXPORTED float qconv_encode_directly(int32_t type, const void* weights, int32_t dtype, int64_t rows, int64_t columns,
                                     float limit, uint8_t* out) {
  using namespace qconv;
  const Matrix matrix{weights, Dtype(dtype), rows, columns};
  switch (type) {
    case 0: return encode_numbers<F32>(matrix, limit, out);
    case 1: return encode_numbers<F16>(matrix, limit, out);
    case 2: return encode_directly<Q4_0Block>(matrix, limit, out);
    case 3: return encode_directly<Q4_1Block>(matrix, limit, out);
    case 6: return encode_directly<Q5_0Block>(matrix, limit, out);
    case 7: return encode_directly<Q5_1Block>(matrix, limit, out);
    case 8: return encode_directly<Q8_0Block>(matrix, limit, out);
    case 30: return encode_numbers<BF16>(matrix, limit, out);
    case 34: return encode_directly<TQ1_0Block>(matrix, limit, out);
    case 35: return encode_directly<TQ2_0Block>(matrix, limit, out);
    case 39: return encode_directly<Mxfp4Block>(matrix, limit, out);
    default: return -1.0f;
  }
}

// The same by search, which begins at so many `starts`. `importance` has one positive number a column, or is null; so is
// `lattice` for types without one.
EXPORTED float qconv_encode_by_search(int32_t type, const void* weights, int32_t dtype, int64_t rows, int64_t columns,
                                      float limit, const float* importance, int32_t count, const float* starts,
                                      const qconv::Lattice* lattice, uint8_t* out) {
  using namespace qconv;
  const Matrix matrix{weights, Dtype(dtype), rows, columns};
  const Starts from{count, starts, lattice};
  switch (type) {
    case 2: return encode_searched<Q4_0>(matrix, importance, from, limit, out);
    case 3: return encode_searched<Q4_1>(matrix, importance, from, limit, out);
    case 6: return encode_searched<Q5_0>(matrix, importance, from, limit, out);
    case 7: return encode_searched<Q5_1>(matrix, importance, from, limit, out);
    case 10: return encode_searched<Q2_K>(matrix, importance, from, limit, out);
    case 11: return encode_searched<Q3_K>(matrix, importance, from, limit, out);
    case 12: return encode_searched<Q4_K>(matrix, importance, from, limit, out);
    case 13: return encode_searched<Q5_K>(matrix, importance, from, limit, out);
    case 14: return encode_searched<Q6_K>(matrix, importance, from, limit, out);
    case 16: return encode_searched<IQ2_XXS>(matrix, importance, from, limit, out);
    case 17: return encode_searched<IQ2_XS>(matrix, importance, from, limit, out);
    case 18: return encode_searched<IQ3_XXS>(matrix, importance, from, limit, out);
    case 19: return encode_searched<IQ1_S>(matrix, importance, from, limit, out);
    case 20: return encode_searched<IQ4_NL>(matrix, importance, from, limit, out);
    case 21: return encode_searched<IQ3_S>(matrix, importance, from, limit, out);
    case 22: return encode_searched<IQ2_S>(matrix, importance, from, limit, out);
    case 23: return encode_searched<IQ4_XS>(matrix, importance, from, limit, out);
    case 29: return encode_searched<IQ1_M>(matrix, importance, from, limit, out);
    case 34: return encode_searched<TQ1_0>(matrix, importance, from, limit, out);
    case 35: return encode_searched<TQ2_0>(matrix, importance, from, limit, out);
    default: return -1.0f;
  }
}
