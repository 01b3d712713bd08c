// The nonzero coefficients of a matrix of them, row by row.
#pragma once

#include "tensor.h"

namespace mumoe {

struct Supports {
  std::vector<int64_t> start;  // T + 1 of them: row t's entries are [start[t], start[t + 1])
  std::vector<int32_t> index;
  std::vector<float> value;

  Support row(int64_t t) const {
    return {index.data() + start[t], value.data() + start[t], start[t + 1] - start[t]};
  }
};

// Nonzero entries of a in all, and of each row where `counts` (T) is given.
template <class S>
int64_t count_support(Matrix<S> a, int64_t* counts) {
  parallel(a.rows, a.columns, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) counts[t] = rows_of<S>().count_nonzero(a[t], a.columns);
  });
  int64_t total = 0;
  for (int64_t t = 0; t < a.rows; ++t) total += counts[t];
  return total;
}

// Products over the support win over GEMMs while rows have fewer than N / share nonzeros on average. Measured for N = 256,
// R = 552 on AMD Zen 4: up to 44 (forward) … 80 (backward) nonzeros in float32, 22 … 42 in bfloat16, whose GEMMs are faster.
template <class S>
constexpr int64_t kDenseShare = 5;
template <>
inline constexpr int64_t kDenseShare<bfloat16> = 8;

// The supports of a's rows, or nothing where they are so full that a dense product is faster.
template <class S>
std::optional<Supports> sparse_supports(Matrix<S> a) {
  Supports supports;
  supports.start.resize(static_cast<size_t>(a.rows) + 1);
  int64_t total = count_support(a, supports.start.data() + 1);
  if (total * kDenseShare<S> > a.rows * a.columns) return std::nullopt;
  for (int64_t t = 0; t < a.rows; ++t) supports.start[t + 1] += supports.start[t];
  supports.index.resize(static_cast<size_t>(total));
  supports.value.resize(static_cast<size_t>(total));
  parallel(a.rows, a.columns, [&](int64_t first, int64_t last) {
    std::vector<int32_t> index(static_cast<size_t>(a.columns) + 16);
    Scratch value(a.columns);
    for (int64_t t = first; t < last; ++t) {
      int64_t count = rows_of<S>().find_nonzero(a[t], a.columns, index.data(), value.data());
      std::copy_n(index.data(), count, supports.index.data() + supports.start[t]);
      std::copy_n(value.data(), count, supports.value.data() + supports.start[t]);
    }
  });
  return supports;
}

// Σ_t x_t ⊗ a_t over the supports, in float32 (N×R). Every element is summed over the tokens in order, by one thread:
// the bits depend on no number of threads. Threads divide the columns, and the experts where columns are few.
template <class S>
Tensor scatter_rows(const Supports& supports, Matrix<S> x, int64_t N) {
  Tensor total = empty<float>({N, x.columns});
  Matrix<float> out = matrix<float>(total);
  constexpr int64_t strip = 128;
  int64_t strips = (x.columns + strip - 1) / strip;
  int64_t threads = torch::stable::get_num_threads();
  int64_t groups = std::clamp<int64_t>(threads / std::max<int64_t>(strips, 1), 1, N);
  int64_t work = static_cast<int64_t>(supports.index.size()) * strip / groups + N * strip / groups;
  parallel(strips * groups, work, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      int64_t column = task / groups * strip, columns = std::min(strip, x.columns - column), group = task % groups;
      int64_t begin = N * group / groups, end = N * (group + 1) / groups;
      for (int64_t n = begin; n < end; ++n) std::fill_n(out[n] + column, columns, 0.0f);
      for (int64_t t = 0; t < x.rows; ++t) {
        rows_of<S>().scatter(
            supports.row(t), static_cast<int32_t>(begin), static_cast<int32_t>(end), x[t] + column, columns,
            out[begin] + column, out.stride);
      }
    }
  });
  return total;
}

}  // namespace mumoe
