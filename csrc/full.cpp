// full_forward, full_backward: the unfactorised experts, a dense MoE, y = Σ_n a_n (W_n x + b_n), x = act(z).
//
// Backward, with g_n = W_nᵀ dy:
//
//   dz = act'(z) ⊙ Σ_n a_n g_n,  da_n = ⟨g_n, x⟩ + ⟨dy, b_n⟩,  dW_n = Σ_t a_n dy xᵀ,  db = aᵀ dy
//
// One expert after the other, on the tokens that have a coefficient for it: forward, dx and dW cost what the supports
// hold. Only da off the support meets every token. Sums over the experts are kept in float32, in the experts' order.
#include "experts.h"

namespace mumoe {
namespace {

// Tokens of one expert at a time: its GEMM's rows stay in the caches until they are added up.
constexpr int64_t kExpertTokens = 1024;

// The coefficients (T, N) expert by expert. What `support` and `all` return lives until the next call of either.
template <class S>
class Experts {
 public:
  explicit Experts(const Tensor& a)
      : by_expert_(as_contiguous(transposed(a))),
        index_(static_cast<size_t>(a.size(0)) + 16),
        every_(static_cast<size_t>(a.size(0))),
        value_(a.size(0)) {
    for (size_t t = 0; t < every_.size(); ++t) every_[t] = static_cast<int32_t>(t);
  }

  // The tokens with a nonzero coefficient for expert n, and those coefficients.
  Support support(int64_t n) {
    int64_t T = by_expert_.size(1);
    int64_t count = rows_of<S>().find_nonzero(matrix<S>(by_expert_)[n], T, index_.data(), value_.data());
    return {index_.data(), value_.data(), count};
  }

  // Every token and its coefficient for expert n.
  Support all(int64_t n) {
    int64_t T = by_expert_.size(1);
    rows_of<S>().widen(matrix<S>(by_expert_)[n], T, value_.data());
    return {every_.data(), value_.data(), T};
  }

 private:
  Tensor by_expert_;
  std::vector<int32_t> index_, every_;
  Scratch value_;
};

// Call body with the tokens in pieces that stay in the caches.
template <class Body>
void in_pieces(Support tokens, const Body& body) {
  for (int64_t begin = 0; begin < tokens.count; begin += kExpertTokens) {
    int64_t count = std::min(kExpertTokens, tokens.count - begin);
    body(Support{tokens.index + begin, tokens.value + begin, count});
  }
}

// The tokens' rows of x: x itself where they follow each other, else copied into `buffer`, times their coefficients
// where `weighted`.
template <class S>
Tensor rows_for(const Tensor& x, Support tokens, bool weighted, const Tensor& buffer) {
  int64_t count = tokens.count, columns = x.size(1);
  bool consecutive = count == 0 || tokens.index[count - 1] - tokens.index[0] + 1 == count;
  if (consecutive && !weighted) {
    int64_t first = count == 0 ? 0 : tokens.index[0];
    return row_range(x, first, first + count);
  }
  Matrix<S> from = matrix<S>(x), to = matrix<S>(buffer);
  parallel(count, columns, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      S* row = from[tokens.index[k]];
      if (weighted) {
        rows_of<S>().matrix_product(tokens.value + k, row, nullptr, 1, 1, columns, nullptr, to[k]);
      } else {
        std::copy_n(row, columns, to[k]);
      }
    }
  });
  return row_range(buffer, 0, count);
}

// Expert n's matrix, or its gradient's.
Tensor expert(const Tensor& weight, int64_t n) {
  int64_t O = weight.size(1), I = weight.size(2);
  return view(weight, {O, I}, {I, 1}, n * O * I);
}

template <class S>
Tensor forward(const Tensor& z, const Tensor& a, const Tensor& weight_tensor, const std::optional<Tensor>& bias,
               Activation activation) {
  int64_t T = z.size(0), I = z.size(1), N = a.size(1), O = weight_tensor.size(1), most = std::min(T, kExpertTokens);
  Tensor weight = as_contiguous(weight_tensor), x = with_dense_rows(activated<S>(z, activation));
  Tensor y = empty<float>({T, O}), inputs = empty<S>({most, I}), outputs = empty<S>({most, O});
  Matrix<float> y_rows = matrix<float>(y);
  if (bias.has_value()) {
    Contraction<S> biases(a, *bias);
    parallel(T, 16 * O, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) biases.row(t, y_rows[t]);
    });
  } else {
    std::fill_n(y_rows.data, T * O, 0.0f);
  }
  Experts<S> experts(a);
  for (int64_t n = 0; n < N; ++n) {
    in_pieces(experts.support(n), [&](Support tokens) {
      Tensor out = row_range(outputs, 0, tokens.count);
      gemm_into(out, rows_for<S>(x, tokens, false, inputs), transposed(expert(weight, n)));
      Matrix<S> rows = matrix<S>(out);
      parallel(tokens.count, 2 * O, [&](int64_t first, int64_t last) {
        for (int64_t k = first; k < last; ++k) {
          rows_of<S>().add(rows[k], O, tokens.value[k], y_rows[tokens.index[k]]);
        }
      });
    });
  }
  return converted(y, dtype_of<S>);
}

// dW (N, O, I), each expert's from its own tokens.
template <class S>
Tensor weight_gradient(const Tensor& dy, const Tensor& x, Experts<S>& experts, const Tensor& weight) {
  int64_t T = x.size(0), I = x.size(1), O = dy.size(1), N = weight.size(0);
  Tensor dW = empty<S>({N, O, I}), upstream = empty<S>({T, O}), inputs = empty<S>({T, I});
  for (int64_t n = 0; n < N; ++n) {
    Support tokens = experts.support(n);
    Tensor weighted = rows_for<S>(dy, tokens, true, upstream);
    gemm_into(expert(dW, n), transposed(weighted), rows_for<S>(x, tokens, false, inputs));
  }
  return dW;
}

// dx = Σ_n a_n g_n (T, I) in float32, and da (T, N) in S: all of it if `everywhere`, else zero off the support.
template <class S>
std::tuple<Tensor, Tensor> input_and_coefficient_gradients(
    const Tensor& dy, const Tensor& x, Experts<S>& experts, const Tensor& weight, const std::optional<Tensor>& bias,
    bool everywhere) {
  int64_t T = x.size(0), I = x.size(1), O = dy.size(1), N = weight.size(0), most = std::min(T, kExpertTokens);
  Tensor dx = empty<float>({T, I}), da = empty<S>({T, N});
  Tensor upstream = empty<S>({most, O}), g = empty<S>({most, I});
  Matrix<float> dx_rows = matrix<float>(dx);
  Matrix<S> da_rows = matrix<S>(da), dy_rows = matrix<S>(dy), x_rows = matrix<S>(x), g_rows = matrix<S>(g);
  std::fill_n(dx_rows.data, T * I, 0.0f);
  std::fill_n(da_rows.data, T * N, S{});
  for (int64_t n = 0; n < N; ++n) {
    const S* b = bias.has_value() ? data<S>(bias) + n * O : nullptr;
    in_pieces(everywhere ? experts.all(n) : experts.support(n), [&](Support tokens) {
      gemm_into(row_range(g, 0, tokens.count), rows_for<S>(dy, tokens, false, upstream), expert(weight, n));
      parallel(tokens.count, 4 * I, [&](int64_t first, int64_t last) {
        for (int64_t k = first; k < last; ++k) {
          int64_t t = tokens.index[k];
          float slope;
          rows_of<S>().outer_backward(g_rows[k], tokens.value + k, x_rows[t], 1, I, &slope, dx_rows[t]);
          if (b != nullptr) slope += rows_of<S>().dot(dy_rows[t], b, O);
          rows_of<S>().narrow(&slope, 1, da_rows[t] + n);
        }
      });
    });
  }
  return {dx, da};
}

// dz in S: act'(z) ⊙ dx.
template <class S>
Tensor through_activation(const Tensor& dx, const Tensor& z, Activation activation) {
  Tensor dz = converted(dx, dtype_of<S>);
  if (activation == Activation::none) return dz;
  Tensor dense = with_dense_rows(z);
  Matrix<S> from = matrix<S>(dense), to = matrix<S>(dz);
  parallel(from.rows, 16 * from.columns, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) rows_of<S>().activate_backward(from[t], from.columns, activation, to[t]);
  });
  return dz;
}

using FullGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class S>
FullGradients backward(
    const Tensor& dy_tensor, const Tensor& z, const Tensor& a, const Tensor& weight_tensor,
    const std::optional<Tensor>& bias_tensor, Activation activation, const std::vector<bool>& needs,
    bool support_only) {
  bool needs_z = needs[0], needs_a = needs[1], needs_weight = needs[2], needs_bias = needs[3];
  Tensor dy = with_dense_rows(dy_tensor), weight = as_contiguous(weight_tensor);
  Tensor x = with_dense_rows(activated<S>(z, activation));
  std::optional<Tensor> bias = bias_tensor.has_value() ? std::optional(as_contiguous(*bias_tensor)) : std::nullopt;
  Experts<S> experts(a);
  FullGradients gradients;
  auto& [dz, da, dweight, dbias] = gradients;
  if (needs_weight) dweight = weight_gradient<S>(dy, x, experts, weight);
  if (needs_bias && bias.has_value()) dbias = Contraction<S>(a, *bias).factor_gradient(dy);
  if (!needs_z && !needs_a) return gradients;
  bool everywhere = needs_a && !support_only;
  auto [dx, dcoefficients] = input_and_coefficient_gradients<S>(dy, x, experts, weight, bias, everywhere);
  if (needs_a) da = dcoefficients;
  if (needs_z) dz = through_activation<S>(dx, z, activation);
  return gradients;
}

Tensor full_forward(Tensor z, Tensor a, Tensor weight, std::optional<Tensor> bias, std::string activation) {
  return with_element(z, [&](auto element) {
    return forward<decltype(element)>(z, a, weight, bias, activation_of(activation));
  });
}

FullGradients full_backward(
    Tensor dy, Tensor z, Tensor a, Tensor weight, std::optional<Tensor> bias, std::string activation,
    std::vector<bool> needs, bool support_only) {
  return with_element(z, [&](auto element) {
    return backward<decltype(element)>(dy, z, a, weight, bias, activation_of(activation), needs, support_only);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(mumoe_native, library) {
  library.def("full_forward(Tensor z, Tensor a, Tensor weight, Tensor? bias, *, str activation) -> Tensor");
  library.def(
      "full_backward(Tensor dy, Tensor z, Tensor a, Tensor weight, Tensor? bias, *, str activation, bool[] needs, "
      "bool support_only=False) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mumoe_native, CPU, library) {
  library.impl("full_forward", TORCH_BOX(&full_forward));
  library.impl("full_backward", TORCH_BOX(&full_backward));
}

}  // namespace
}  // namespace mumoe
