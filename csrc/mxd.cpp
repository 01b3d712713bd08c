// mxd_forward, mxd_backward: the experts of the Mixture of Decoders on the k that each token has chosen. With C kept as its
// transpose (N, O), one row per expert,
//
//   A_t = Σ_k v_tk Cᵀ[i_tk],  B = act(z) Dᵀ,  y = A ⊙ B
//   dA = dy ⊙ B,  dB = dy ⊙ A,  dv_tk = dA_t · Cᵀ[i_tk],  dCᵀ_n = Σ_{i_tk = n} v_tk dA_t
//   dz = act'(z) ⊙ (dB D),  dD = dBᵀ act(z)
#include "chosen.h"
#include "experts.h"

namespace mumoe {
namespace {

template <class S>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& z, const Tensor& values, const Tensor& indices,
                                           const Tensor& expert_factors, const Tensor& out_factor,
                                           Activation activation, bool save) {
  int64_t T = z.size(0), O = out_factor.size(0);
  Supports supports = chosen_support(
      widened<S>(values), chosen_experts(indices, expert_factors.size(0)), T, values.size(1));
  Tensor B = activated_linear<S>(z, out_factor, activation), C = with_dense_rows(expert_factors);
  Tensor A = empty<S>({save ? T : 0, O}), y = save ? empty<S>({T, O}) : B;
  Matrix<S> A_rows = matrix<S>(A), B_rows = matrix<S>(B), y_rows = matrix<S>(y);
  parallel(T, (values.size(1) + 4) * O, [&](int64_t first, int64_t last) {
    Scratch row(O);
    for (int64_t t = first; t < last; ++t) {
      rows_of<S>().gather(supports.row(t), data<S>(C), C.stride(0), O, row.data());
      rows_of<S>().product(row.data(), B_rows[t], nullptr, O, save ? A_rows[t] : nullptr, y_rows[t]);
    }
  });
  if (save) return {y, A, B};
  return {y, empty<S>({0}), empty<S>({0})};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class S>
Gradients backward(const Tensor& dy, const Tensor& A, const Tensor& B, const Tensor& z, const Tensor& values,
                   const Tensor& indices, const Tensor& expert_factors, const Tensor& out_factor,
                   Activation activation, const std::vector<bool>& needs) {
  bool needs_z = needs[0], needs_values = needs[1], needs_experts = needs[2], needs_out = needs[3];
  int64_t T = z.size(0), O = out_factor.size(0), N = expert_factors.size(0), k = values.size(1);
  std::vector<int32_t> experts = chosen_experts(indices, N);
  Tensor dy_dense = with_dense_rows(dy), A_dense = with_dense_rows(A), B_dense = with_dense_rows(B);
  Tensor C = with_dense_rows(expert_factors), dA = empty<S>({T, O}), dB = empty<S>({T, O});
  Tensor dvalues = needs_values ? empty<S>({T, k}) : Tensor();
  Matrix<S> dy_rows = matrix<S>(dy_dense), A_rows = matrix<S>(A_dense), B_rows = matrix<S>(B_dense);
  Matrix<S> dA_rows = matrix<S>(dA), dB_rows = matrix<S>(dB);
  parallel(T, (k + 8) * O, [&](int64_t first, int64_t last) {
    std::vector<S> product(static_cast<size_t>(O)), dots(static_cast<size_t>(N));
    Scratch x(O);
    for (int64_t t = first; t < last; ++t) {
      rows_of<S>().product_backward(
          dy_rows[t], A_rows[t], B_rows[t], O, dA_rows[t], dB_rows[t], product.data());
      if (!needs_values) continue;
      const int32_t* chosen = experts.data() + t * k;
      rows_of<S>().widen(dA_rows[t], O, x.data());
      rows_of<S>().dot_support({chosen, nullptr, k}, x.data(), data<S>(C), C.stride(0), O, dots.data());
      for (int64_t j = 0; j < k; ++j) matrix<S>(dvalues)[t][j] = dots[chosen[j]];
    }
  });
  Tensor dexperts;
  if (needs_experts) {
    Supports supports = chosen_support(widened<S>(values), experts, T, k);
    dexperts = sums_by_expert<S>(by_expert(supports, N), dA_rows);
  }
  dA = Tensor();
  auto [dz, dout] = activated_linear_backward<S>(dB, z, out_factor, activation, needs_z, needs_out);
  return {dz, dvalues, dexperts, dout};
}

std::tuple<Tensor, Tensor, Tensor> mxd_forward(
    Tensor z, Tensor values, Tensor indices, Tensor expert_factors, Tensor out_factor, std::string activation,
    bool save) {
  return with_element(z, [&](auto element) {
    return forward<decltype(element)>(
        z, values, indices, expert_factors, out_factor, activation_of(activation), save);
  });
}

Gradients mxd_backward(
    Tensor dy, Tensor A, Tensor B, Tensor z, Tensor values, Tensor indices, Tensor expert_factors, Tensor out_factor,
    std::string activation, std::vector<bool> needs) {
  return with_element(z, [&](auto element) {
    return backward<decltype(element)>(
        dy, A, B, z, values, indices, expert_factors, out_factor, activation_of(activation), needs);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(mumoe_native, library) {
  library.def(
      "mxd_forward(Tensor z, Tensor values, Tensor indices, Tensor expert_factors, Tensor out_factor, *, "
      "str activation, bool save) -> (Tensor, Tensor, Tensor)");
  library.def(
      "mxd_backward(Tensor dy, Tensor A, Tensor B, Tensor z, Tensor values, Tensor indices, Tensor expert_factors, "
      "Tensor out_factor, *, str activation, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mumoe_native, CPU, library) {
  library.impl("mxd_forward", TORCH_BOX(&mxd_forward));
  library.impl("mxd_backward", TORCH_BOX(&mxd_backward));
}

}  // namespace
}  // namespace mumoe
