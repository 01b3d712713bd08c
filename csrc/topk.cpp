// topk_gate_forward, topk_gate_backward: the gate of the Mixture of Decoders. With s = z Gᵀ + b in float32
//
//   (v, i) = the k largest of relu(s), falling, and their experts; of equal ones those of the lowest experts
//   ds_tk = dv_tk where v_tk > 0,  dz_t = Σ_k ds_tk G[i_tk],  dG_n = Σ_{i_tk = n} ds_tk z_t,  db_n = Σ_{i_tk = n} ds_tk
//
// A row is read once and never sorted. Positive entries above a threshold are collected; whenever a batch of them is full
// the k largest so far stay and the threshold rises to the least of them, so that soon almost nothing passes. A later entry
// that equals the threshold has a higher expert and loses.
#include <cstring>
#include <functional>
#include <numeric>

#include "chosen.h"
#include "gemm.h"
#include "logits.h"

namespace mumoe {
namespace {

// The k largest positive entries of a row. They are kept as integers that compare as (value, −expert).
class Largest {
 public:
  explicit Largest(int64_t k)
      : k_(static_cast<size_t>(k)), room_(std::max<int64_t>(k, 64)), index_(room_ + 16), value_(room_ + 16) {}

  // Reads the row s + bias (s where bias is null); returns its poison, NaN where an entry is NaN or infinite, else zero.
  float read(const float* s, const float* bias, int64_t N) {
    float threshold = 0.0f, poison = 0.0f;
    keys_.clear();
    for (int64_t n = 0; n < N;) {
      Candidates found{index_.data(), value_.data(), room_, 0, 0.0f};
      n = rows().find_above(s, bias, n, N, threshold, &found);
      poison += found.poison;
      for (int64_t c = 0; c < found.count; ++c) keys_.push_back(key(found.value[c], found.index[c]));
      if (keys_.size() < k_) continue;
      std::nth_element(keys_.begin(), keys_.begin() + (k_ - 1), keys_.end(), std::greater<>());
      keys_.resize(k_);
      threshold = value(k_ - 1);
    }
    std::sort(keys_.begin(), keys_.end(), std::greater<>());
    return poison;
  }

  size_t count() const {
    return keys_.size();
  }

  float value(size_t j) const {
    uint32_t bits = static_cast<uint32_t>(keys_[j] >> 32);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  int64_t expert(size_t j) const {
    return static_cast<uint32_t>(~keys_[j]);
  }

 private:
  // The bits of positive floats are in the order of the floats.
  static uint64_t key(float value, int32_t expert) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(~expert);
  }

  size_t k_;
  int64_t room_;
  std::vector<int32_t> index_;
  std::vector<float> value_;
  std::vector<uint64_t> keys_;
};

// One row's values, in float32, and experts. Where fewer than k are positive, the first of the others follow with zeros.
void choose_experts(
    const float* s, const float* bias, int64_t N, int64_t k, Largest& largest, float* values, int64_t* experts) {
  float poison = largest.read(s, bias, N);
  int64_t count = static_cast<int64_t>(largest.count());
  for (int64_t j = 0; j < count; ++j) {
    values[j] = largest.value(j) + poison;
    experts[j] = largest.expert(j);
  }
  for (int64_t n = 0; count < k; ++n) {
    if (s[n] + (bias == nullptr ? 0.0f : bias[n]) > 0.0f) continue;
    values[count] = poison;
    experts[count++] = n;
  }
}

std::tuple<Tensor, Tensor> topk_gate_forward(Tensor z, Tensor weight, std::optional<Tensor> bias, int64_t k) {
  return with_element(z, [&](auto element) -> std::tuple<Tensor, Tensor> {
    using S = decltype(element);
    int64_t T = z.size(0), N = weight.size(0);
    STD_TORCH_CHECK(k >= 1 && k <= N, "k: expected a number in [1, ", N, "], got ", k);
    Tensor values = empty<S>({T, k}), indices = empty<int64_t>({T, k});
    Matrix<S> values_rows = matrix<S>(values);
    Matrix<int64_t> indices_rows = matrix<int64_t>(indices);
    Logits logits_of(weight, dtype_of<S>, T);
    std::optional<Tensor> bias_row = logits_bias(bias, dtype_of<S>);
    for (int64_t begin = 0, chunk = logits_chunk(N); begin < T; begin += chunk) {
      int64_t end = std::min(begin + chunk, T);
      Tensor logits = logits_of.of(row_range(z, begin, end));
      Matrix<float> s = matrix<float>(logits);
      parallel(end - begin, 2 * N, [&](int64_t first, int64_t last) {
        Largest largest(k);
        Scratch row(k);
        for (int64_t t = first; t < last; ++t) {
          choose_experts(s[t], data<float>(bias_row), N, k, largest, row.data(), indices_rows[begin + t]);
          rows_of<S>().narrow(row.data(), k, values_rows[begin + t]);
        }
      });
    }
    return {values, indices};
  });
}

// The support of ds. A value that is NaN leaves NaN.
template <class S>
Supports logit_gradient(const Tensor& dvalues, const Tensor& values, const Tensor& indices, int64_t N) {
  std::vector<float> ds = widened<S>(dvalues), v = widened<S>(values);
  for (size_t p = 0; p < v.size(); ++p) ds[p] = v[p] > 0.0f ? ds[p] : 0.0f * v[p];
  return chosen_support(ds, chosen_experts(indices, N), values.size(0), values.size(1));
}

// Σ_k ds_tk G[i_tk] (T, I) for the weight in S.
template <class S>
Tensor tokens_gradient(const Supports& ds, const Tensor& weight, int64_t T) {
  Tensor G = with_dense_rows(weight), dz = empty<S>({T, G.size(1)});
  Matrix<S> out = matrix<S>(dz);
  parallel(T, 32 * out.columns, [&](int64_t first, int64_t last) {
    Scratch row(out.columns);
    for (int64_t t = first; t < last; ++t) {
      rows_of<S>().gather(ds.row(t), data<S>(G), G.stride(0), out.columns, row.data());
      rows_of<S>().narrow(row.data(), out.columns, out[t]);
    }
  });
  return dz;
}

// Σ of each expert's values (N,), in the order of the tokens.
Tensor value_sums(const Supports& experts, int64_t N) {
  Tensor sums = empty<float>({N});
  auto value = experts.value.begin();
  for (int64_t n = 0; n < N; ++n) {
    data<float>(sums)[n] = std::accumulate(value + experts.start[n], value + experts.start[n + 1], 0.0f);
  }
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> topk_gate_backward(
    Tensor dvalues, Tensor values, Tensor indices, Tensor z, Tensor weight, std::vector<bool> needs) {
  return with_element(z, [&](auto element) -> std::tuple<Tensor, Tensor, Tensor> {
    using S = decltype(element);
    int64_t N = weight.size(0);
    Supports ds = logit_gradient<S>(dvalues, values, indices, N);
    Tensor dz, dweight, dbias;
    if (needs[0]) dz = tokens_gradient<S>(ds, converted(weight, dtype_of<S>), z.size(0));
    if (!needs[1] && !needs[2]) return {dz, dweight, dbias};
    Supports experts = by_expert(ds, N);
    Tensor tokens = with_dense_rows(z);
    if (needs[1]) dweight = sums_by_expert<float>(experts, matrix<S>(tokens));
    if (needs[2]) dbias = value_sums(experts, N);
    return {dz, dweight, dbias};
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(mumoe_native, library) {
  library.def("topk_gate_forward(Tensor z, Tensor weight, Tensor? bias, int k) -> (Tensor, Tensor)");
  library.def(
      "topk_gate_backward(Tensor dvalues, Tensor values, Tensor indices, Tensor z, Tensor weight, *, bool[] needs)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mumoe_native, CPU, library) {
  library.impl("topk_gate_forward", TORCH_BOX(&topk_gate_forward));
  library.impl("topk_gate_backward", TORCH_BOX(&topk_gate_backward));
}

}  // namespace
}  // namespace mumoe
