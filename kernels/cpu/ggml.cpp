// Encoders of ggml's block types. The bytes are those of the torch operations in qconv/ggml, which explain the formulas.

#include "ggml/direct.h"
#include "ggml/input.h"
#include "ggml/searched.h"

namespace qconv {
namespace {

template <class Type>
float encode_directly(const Matrix& matrix, float limit, uint8_t* out) {
  float x[Type::kElements];
  for (int64_t first = 0; first < matrix.rows * matrix.columns; first += Type::kElements) {
    widen<Type::kElements>(matrix.stored, matrix.dtype, first, x);
    const float largest = largest_magnitude<Type::kElements>(x);
    if (!(largest <= limit)) return largest;
    Type::encode(x, out);
    out += Type::kBytes;
  }
  return 0.0f;
}

template <class Type, bool Weighted>
float encode_searched(const Matrix& matrix, const float* importance, const Starts& starts, float limit, uint8_t* out) {
  const int64_t row_bytes = matrix.columns / Type::kElements * Type::kBytes;
  for (int64_t row = 0; row < matrix.rows; row += kLanes) {
    uint8_t* to = out + row * row_bytes;
    const int lanes = int(std::min<int64_t>(kLanes, matrix.rows - row));
    for (int64_t column = 0; column < matrix.columns; column += Type::kElements) {
      Floats weights[Type::kElements];
      const float largest = read_lanes(matrix, row, column, weights);
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

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Encode a matrix by formula. `type` is ggml's number. Gives 0, or the magnitude of the first weight found that is
// beyond `limit` or not finite; then `out` is not complete. -1: no such encoder.
EXPORTED float qconv_encode_directly(int32_t type, const void* weights, int32_t dtype, int64_t rows, int64_t columns,
                                     float limit, uint8_t* out) {
  using namespace qconv;
  const Matrix matrix{weights, Dtype(dtype), rows, columns};
  switch (type) {
    case 2: return encode_directly<Q4_0Block>(matrix, limit, out);
    case 3: return encode_directly<Q4_1Block>(matrix, limit, out);
    case 6: return encode_directly<Q5_0Block>(matrix, limit, out);
    case 7: return encode_directly<Q5_1Block>(matrix, limit, out);
    case 8: return encode_directly<Q8_0Block>(matrix, limit, out);
    case 39: return encode_directly<Mxfp4Block>(matrix, limit, out);
    default: return -1.0f;
  }
}

// The same by search, which begins at so many `starts`. `importance` has one positive number a column, or is null.
EXPORTED float qconv_encode_by_search(int32_t type, const void* weights, int32_t dtype, int64_t rows, int64_t columns,
                                      float limit, const float* importance, int32_t count, const float* starts,
                                      uint8_t* out) {
  using namespace qconv;
  const Matrix matrix{weights, Dtype(dtype), rows, columns};
  const Starts from{count, starts};
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
    case 20: return encode_searched<IQ4_NL>(matrix, importance, from, limit, out);
    case 23: return encode_searched<IQ4_XS>(matrix, importance, from, limit, out);
    default: return -1.0f;
  }
}
