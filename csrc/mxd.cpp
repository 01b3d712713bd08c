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

// y and B, which is empty unless it is to be saved. A is not: backward, which reads the same rows of C for dv, gathers it
// once more.
template <class S>
std::tuple<Tensor, Tensor> forward(const Tensor& z, const Tensor& values, const Tensor& indices,
                                   const Tensor& expert_factors, const Tensor& out_factor, Activation activation,
                                   bool save) {
  int64_t T = z.size(0), O = out_factor.size(0), k = values.size(1);
  Supports supports = chosen_support(widened<S>(values), chosen_experts(indices, expert_factors.size(0)), T, k);
  Tensor B = activated_linear<S>(z, out_factor, activation), C = with_dense_rows(expert_factors);
  Tensor y = save ? empty<S>({T, O}) : B;
  Matrix<S> B_rows = matrix<S>(B), y_rows = matrix<S>(y);
  parallel(T, (k + 4) * O, [&](int64_t first, int64_t last) {
    Scratch A(O);
    for (int64_t t = first; t < last; ++t) {
      rows_of<S>().gather(supports.row(t), data<S>(C), C.stride(0), O, A.data());
      rows_of<S>().product(A.data(), B_rows[t], nullptr, O, y_rows[t]);
    }
  });
  return {y, save ? B : empty<S>({0})};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class S>
Gradients backward(const Tensor& dy, const Tensor& B, const Tensor& z, const Tensor& values, const Tensor& indices,
                   const Tensor& expert_factors, const Tensor& out_factor, Activation activation,
                   const std::vector<bool>& needs) {
  bool needs_z = needs[0], needs_values = needs[1], needs_experts = needs[2], needs_out = needs[3];
  int64_t T = z.size(0), O = out_factor.size(0), N = expert_factors.size(0), k = values.size(1);
  std::vector<int32_t> experts = chosen_experts(indices, N);
  Supports supports = chosen_support(widened<S>(values), experts, T, k);
  Tensor dy_dense = with_dense_rows(dy), B_dense = with_dense_rows(B), C = with_dense_rows(expert_factors);
  Tensor dA = empty<S>({T, O}), dB = empty<S>({T, O}), dvalues = needs_values ? empty<S>({T, k}) : Tensor();
  Matrix<S> dy_rows = matrix<S>(dy_dense), B_rows = matrix<S>(B_dense);
  Matrix<S> dA_rows = matrix<S>(dA), dB_rows = matrix<S>(dB);
  parallel(T, 2 * (k + 4) * O, [&](int64_t first, int64_t last) {
    Scratch row(O);  // A, and then dA
    std::vector<S> y(static_cast<size_t>(O)), dots(static_cast<size_t>(N));
    for (int64_t t = first; t < last; ++t) {
      rows_of<S>().gather(supports.row(t), data<S>(C), C.stride(0), O, row.data());
      rows_of<S>().product_backward(dy_rows[t], row.data(), B_rows[t], O, dA_rows[t], dB_rows[t], y.data());
      if (!needs_values) continue;
      const int32_t* chosen = experts.data() + t * k;
      rows_of<S>().widen(dA_rows[t], O, row.data());
      rows_of<S>().dot_support({chosen, nullptr, k}, row.data(), data<S>(C), C.stride(0), O, dots.data());
      for (int64_t j = 0; j < k; ++j) matrix<S>(dvalues)[t][j] = dots[chosen[j]];
    }
  });
  Tensor dexperts = needs_experts ? sums_by_expert<S>(by_expert(supports, N), dA_rows) : Tensor();
  dA = Tensor();
  auto [dz, dout] = activated_linear_backward<S>(dB, z, out_factor, activation, needs_z, needs_out);
  return {dz, dvalues, dexperts, dout};
}

std::tuple<Tensor, Tensor, Tensor> mxd_forward(
    Tensor z, Tensor values, Tensor indices, Tensor expert_factors, Tensor out_factor, std::string activation,
    bool save) {
  return with_element(z, [&](auto element) -> std::tuple<Tensor, Tensor, Tensor> {
    using S = decltype(element);
    auto [y, B] = forward<S>(z, values, indices, expert_factors, out_factor, activation_of(activation), save);
    return {y, empty<S>({0}), B};
  });
}

Gradients mxd_backward(
    Tensor dy, Tensor /*A*/, Tensor B, Tensor z, Tensor values, Tensor indices, Tensor expert_factors, Tensor out_factor,
    std::string activation, std::vector<bool> needs) {
  return with_element(z, [&](auto element) {
    return backward<decltype(element)>(
        dy, B, z, values, indices, expert_factors, out_factor, activation_of(activation), needs);
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
