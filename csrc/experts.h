// What the factorisations share: coefficients times expert factors and its gradients, over the support or by GEMM, and
// the contraction with the input.
#pragma once

#include "columns.h"
#include "gemm.h"
#include "support.h"

namespace mumoe {

inline Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  STD_TORCH_CHECK(name == "silu", "expected activation none, gelu, gelu_tanh, relu or silu, got ", name);
  return Activation::silu;
}

// How much of act(z) there is at once: rows of it forward; columns of it backward, where rows are what is summed over.
constexpr int64_t kActivatedRows = 1024, kActivatedColumns = 512;

template <class S>
void activate_into(const Tensor& out, const Tensor& z, Activation activation) {
  Tensor dense = with_dense_rows(z);
  Matrix<S> from = matrix<S>(dense), to = matrix<S>(out);
  parallel(from.rows, 8 * from.columns, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) rows_of<S>().activate(from[t], from.columns, activation, to[t]);
  });
}

template <class S>
Tensor activated(const Tensor& z, Activation activation) {
  if (activation == Activation::none) return z;
  Tensor out = empty<S>({z.size(0), z.size(1)});
  activate_into<S>(out, z, activation);
  return out;
}

// act(z) Wᵀ for W (R, I), and what act(z) was made of never in memory as a whole.
template <class S>
Tensor activated_linear(const Tensor& z, const Tensor& W, Activation activation) {
  int64_t T = z.size(0), R = W.size(0);
  if (activation == Activation::none || T <= kActivatedRows) return linear(activated<S>(z, activation), W);
  Tensor out = empty<S>({T, R}), buffer = empty<S>({kActivatedRows, z.size(1)});
  for (int64_t begin = 0; begin < T; begin += kActivatedRows) {
    int64_t end = std::min(begin + kActivatedRows, T);
    Tensor part = row_range(buffer, 0, end - begin);
    activate_into<S>(part, row_range(z, begin, end), activation);
    gemm_into(row_range(out, begin, end), part, transposed(W));
  }
  return out;
}

// dBᵀ act(z) (R, I), and act(z) never in memory as a whole.
template <class S>
Tensor activated_weight_gradient(const Tensor& dB, const Tensor& z, Activation activation) {
  int64_t T = z.size(0), I = z.size(1);
  if (activation == Activation::none || I <= kActivatedColumns) {
    return gemm(transposed(dB), activated<S>(z, activation));
  }
  Tensor dW = empty<S>({dB.size(1), I}), buffer = empty<S>({T, kActivatedColumns});
  for (int64_t begin = 0; begin < I; begin += kActivatedColumns) {
    int64_t end = std::min(begin + kActivatedColumns, I);
    Tensor part = view(buffer, {T, end - begin}, {end - begin, 1});
    activate_into<S>(part, column_range(z, begin, end), activation);
    gemm_into(column_range(dW, begin, end), transposed(dB), part);
  }
  return dW;
}

// dW = dBᵀ act(z) and dz = act'(z) ⊙ (dB W), each undefined where it is not needed.
template <class S>
std::tuple<Tensor, Tensor> activated_linear_backward(
    const Tensor& dB, const Tensor& z, const Tensor& W, Activation activation, bool needs_z, bool needs_weight) {
  Tensor dz, dW;
  if (needs_weight) dW = activated_weight_gradient<S>(dB, z, activation);
  if (!needs_z) return {dz, dW};
  dz = gemm(dB, W);
  if (activation == Activation::none) return {dz, dW};
  Tensor dense = with_dense_rows(z);
  Matrix<S> from = matrix<S>(dense), to = matrix<S>(dz);
  parallel(from.rows, 16 * from.columns, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) rows_of<S>().activate_backward(from[t], from.columns, activation, to[t]);
  });
  return {dz, dW};
}

// One level's contraction a U of coefficients (T, N) with expert factors (N, R), over the support or as a dense product.
template <class S>
class Contraction {
 public:
  Contraction(const Tensor& a, const Tensor& U)
      : a_(with_dense_rows(a)), U_(with_dense_rows(U)), supports_(sparse_supports(matrix<S>(a_))) {
    if (!supports_) product_ = gemm(a_, U_);
  }

  // Row t in float32.
  void row(int64_t t, float* out) const {
    if (supports_) {
      rows_of<S>().gather(supports_->row(t), data<S>(U_), U_.stride(0), U_.size(1), out);
    } else {
      rows_of<S>().widen(matrix<S>(product_)[t], U_.size(1), out);
    }
  }

  // da (T, N) for dA (T, R). Off the support it is zero if `support_only`: enough for a gate whose own gradient is zero
  // there, as entmax's is.
  Tensor coefficients_gradient(const Tensor& dA, bool support_only) const {
    if (!supports_ || !support_only) return gemm(dA, transposed(U_));
    int64_t T = a_.size(0), N = a_.size(1), R = U_.size(1);
    Tensor da = empty<S>({T, N});
    Matrix<S> out = matrix<S>(da), upstream = matrix<S>(dA);
    parallel(T, N + 4 * R, [&](int64_t first, int64_t last) {
      Scratch x(R);
      for (int64_t t = first; t < last; ++t) {
        std::fill_n(out[t], N, S{});
        rows_of<S>().widen(upstream[t], R, x.data());
        rows_of<S>().dot_support(supports_->row(t), x.data(), data<S>(U_), U_.stride(0), R, out[t]);
      }
    });
    return da;
  }

  // dU (N, R) for dA (T, R).
  Tensor factor_gradient(const Tensor& dA) const {
    if (!supports_) return gemm(transposed(a_), dA);
    return converted(scatter_rows(*supports_, matrix<S>(dA), a_.size(1)), dtype_of<S>);
  }

 private:
  Tensor a_, U_, product_;
  std::optional<Supports> supports_;
};

template <class S>
std::vector<Contraction<S>> contractions(const std::vector<Tensor>& a, const std::vector<Tensor>& U) {
  std::vector<Contraction<S>> levels;
  levels.reserve(a.size());
  for (size_t e = 0; e < a.size(); ++e) levels.emplace_back(a[e], U[e]);
  return levels;
}

// Which gradients are needed; one entry stands for all levels of its kind.
struct Needs {
  bool z, coefficients, experts, in, in_bias, out;

  explicit Needs(const std::vector<bool>& needs)
      : z(needs[0]), coefficients(needs[1]), experts(needs[2]), in(needs[3]), in_bias(needs[4]), out(needs[5]) {}
};

using Gradients = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor, Tensor>;

}  // namespace mumoe
