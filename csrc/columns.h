// Sums over the tokens, column by column: every column is summed in the order of the tokens, by one thread.
#pragma once

#include "tensor.h"

namespace mumoe {

template <class S>
Tensor column_sums(Matrix<S> x) {
  Tensor total = empty<float>({x.columns});
  float* out = data<float>(total);
  constexpr int64_t strip = 64;
  parallel((x.columns + strip - 1) / strip, x.rows * strip, [&](int64_t first, int64_t last) {
    int64_t begin = first * strip, columns = std::min(last * strip, x.columns) - begin;
    std::fill_n(out + begin, columns, 0.0f);
    for (int64_t t = 0; t < x.rows; ++t) rows_of<S>().add(x[t] + begin, columns, 1.0f, out + begin);
  });
  return total;
}

}  // namespace mumoe
