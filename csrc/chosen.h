// Supports that come as the k experts each token has chosen, and sums over the tokens that have chosen an expert.
#pragma once

#include "support.h"

namespace mumoe {

// The experts (T, k), any integer dtype and strides, as one list. Nothing else checks them before memory is addressed.
inline std::vector<int32_t> chosen_experts(const Tensor& indices, int64_t N) {
  Tensor dense = as_contiguous(indices);
  std::vector<int32_t> experts(static_cast<size_t>(indices.numel()));
  auto copy = [&](const auto* from) {
    for (size_t p = 0; p < experts.size(); ++p) {
      STD_TORCH_CHECK(from[p] >= 0 && from[p] < N, "indices: expected experts in [0, ", N, "), got ", from[p]);
      experts[p] = static_cast<int32_t>(from[p]);
    }
  };
  if (indices.scalar_type() == ScalarType::Int) {
    copy(data<int32_t>(dense));
  } else {
    copy(data<int64_t>(dense));
  }
  return experts;
}

// A matrix (T, k) in float32, row after row.
template <class S>
std::vector<float> widened(const Tensor& x) {
  Tensor dense = as_contiguous(x);
  std::vector<float> out(static_cast<size_t>(x.numel()));
  rows_of<S>().widen(data<S>(dense), x.numel(), out.data());
  return out;
}

// The support of T tokens that gave `values` to their k `experts`. A zero takes no part, so that nothing comes through it.
inline Supports chosen_support(
    const std::vector<float>& values, const std::vector<int32_t>& experts, int64_t T, int64_t k) {
  Supports supports;
  supports.start.push_back(0);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t p = t * k; p < (t + 1) * k; ++p) {
      if (values[p] == 0.0f) continue;
      supports.index.push_back(experts[p]);
      supports.value.push_back(values[p]);
    }
    supports.start.push_back(static_cast<int64_t>(supports.index.size()));
  }
  return supports;
}

// The same entries by expert: of each the tokens that have chosen it, in their order.
inline Supports by_expert(const Supports& supports, int64_t N) {
  Supports experts{std::vector<int64_t>(static_cast<size_t>(N) + 1), supports.index, supports.value};
  for (int32_t n : supports.index) ++experts.start[n + 1];
  for (int64_t n = 0; n < N; ++n) experts.start[n + 1] += experts.start[n];
  std::vector<int64_t> next(experts.start.begin(), experts.start.end() - 1);
  for (size_t t = 0; t + 1 < supports.start.size(); ++t) {
    for (int64_t p = supports.start[t]; p < supports.start[t + 1]; ++p) {
      int64_t place = next[supports.index[p]]++;
      experts.index[place] = static_cast<int32_t>(t);
      experts.value[place] = supports.value[p];
    }
  }
  return experts;
}

// Σ value·x_t over the tokens of each expert (N, R), accumulated in float32: by one thread, in the order of the tokens.
template <class Out, class S>
Tensor sums_by_expert(const Supports& experts, Matrix<S> x) {
  int64_t N = static_cast<int64_t>(experts.start.size()) - 1, R = x.columns;
  Tensor sums = empty<Out>({N, R});
  Matrix<Out> out = matrix<Out>(sums);
  // threads divide the columns first: they have the same work whichever experts are popular
  int64_t threads = torch::stable::get_num_threads(), unit = 128;
  int64_t strip = std::max<int64_t>((R + threads * unit - 1) / (threads * unit), 1) * unit;
  int64_t work = (experts.start[N] / std::max<int64_t>(N, 1) + 1) * strip;
  parallel((R + strip - 1) / strip * N, work, [&](int64_t first, int64_t last) {
    Scratch row(strip);
    for (int64_t task = first; task < last; ++task) {
      int64_t n = task % N, column = task / N * strip, columns = std::min(strip, R - column);
      rows_of<S>().gather(experts.row(n), x.data + column, x.stride, columns, row.data());
      rows_of<Out>().narrow(row.data(), columns, out[n] + column);
    }
  });
  return sums;
}

}  // namespace mumoe
