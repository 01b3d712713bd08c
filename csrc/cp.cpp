// cp_forward, cp_backward: CP experts y = U_out h, h = A ⊙ B, A = Π_e a_e U_e, B = act(z) U_inᵀ + b.
//
// Backward, with dh = dy U_out:
//
//   dU_out = dyᵀ h,  dA = dh ⊙ B,  dB = dh ⊙ A,  dA_e = dA ⊙ Π_{e' ≠ e} a_e' U_e'
//   da_e = dA_e U_eᵀ,  dU_e = a_eᵀ dA_e,  dU_in = dBᵀ act(z),  db = Σ_t dB,  dz = act'(z) ⊙ (dB U_in)
//
// Of A and B only B is kept for backward: A is gathered once more from the few experts of a token.
#include "cp.h"

#include "experts.h"

namespace mumoe {

namespace {

// Row t of the product over the levels, all but `skipped`; `other` is scratch of the same size.
template <class S>
void product_row(const std::vector<Contraction<S>>& levels, size_t skipped, int64_t t, int64_t R, float* row,
                 float* other) {
  bool first = true;
  for (size_t e = 0; e < levels.size(); ++e) {
    if (e == skipped) continue;
    levels[e].row(t, first ? row : other);
    if (!first) rows().single.multiply(other, R, row);
    first = false;
  }
}

// dA_e (T, R): dA times the product over the other levels.
template <class S>
Tensor level_gradient(const std::vector<Contraction<S>>& levels, size_t e, const Tensor& dA) {
  if (levels.size() == 1) return dA;
  int64_t T = dA.size(0), R = dA.size(1);
  Tensor out = empty<S>({T, R});
  Matrix<S> from = matrix<S>(dA), to = matrix<S>(out);
  parallel(T, 16 * R, [&](int64_t first, int64_t last) {
    Scratch row(R), other(R);
    for (int64_t t = first; t < last; ++t) {
      product_row(levels, e, t, R, row.data(), other.data());
      rows_of<S>().widen(from[t], R, other.data());
      rows().single.multiply(other.data(), R, row.data());
      rows_of<S>().narrow(row.data(), R, to[t]);
    }
  });
  return out;
}

template <class S>
std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& z, const std::vector<Tensor>& coefficients, const std::vector<Tensor>& expert_factors,
    const Tensor& in_factor, const std::optional<Tensor>& in_bias, const Tensor& out_factor, Activation activation,
    bool save) {
  int64_t T = z.size(0), R = in_factor.size(0);
  std::vector<Contraction<S>> levels = contractions<S>(coefficients, expert_factors);
  Tensor B = activated_linear<S>(z, in_factor, activation);
  Tensor h = save ? empty<S>({T, R}) : B;
  std::optional<Tensor> bias = in_bias.has_value() ? std::optional(as_contiguous(*in_bias)) : std::nullopt;
  Matrix<S> B_rows = matrix<S>(B), h_rows = matrix<S>(h);
  parallel(T, 16 * R, [&](int64_t first, int64_t last) {
    Scratch row(R), other(R);
    for (int64_t t = first; t < last; ++t) {
      product_row(levels, levels.size(), t, R, row.data(), other.data());
      rows_of<S>().product(row.data(), B_rows[t], data<S>(bias), R, h_rows[t]);
    }
  });
  return {linear(h, out_factor), empty<S>({0}), save ? B : empty<S>({0})};
}

template <class S>
Gradients backward(
    const Tensor& dy, const Tensor& z, const std::vector<Tensor>& coefficients,
    const std::vector<Tensor>& expert_factors, const Tensor& in_factor, bool has_bias, const Tensor& out_factor,
    const Tensor& B, Activation activation, Needs needs, bool support_only) {
  int64_t T = z.size(0), R = in_factor.size(0);
  std::vector<Contraction<S>> levels = contractions<S>(coefficients, expert_factors);
  Tensor dB = gemm(dy, out_factor), dA = empty<S>({T, R}), h = empty<S>({T, R});
  Tensor B_dense = with_dense_rows(B);
  Matrix<S> B_rows = matrix<S>(B_dense), h_rows = matrix<S>(h);
  Matrix<S> dA_rows = matrix<S>(dA), dB_rows = matrix<S>(dB);  // dB holds dh until it is overwritten
  parallel(T, 16 * R, [&](int64_t first, int64_t last) {
    Scratch A(R), other(R);
    for (int64_t t = first; t < last; ++t) {
      product_row(levels, levels.size(), t, R, A.data(), other.data());
      rows_of<S>().product_backward(dB_rows[t], A.data(), B_rows[t], R, dA_rows[t], dB_rows[t], h_rows[t]);
    }
  });
  Gradients gradients;
  auto& [dz, da, dexperts, din, dbias, dout] = gradients;
  if (needs.out) dout = gemm(transposed(dy), h);
  h = Tensor();
  if (needs.coefficients || needs.experts) {
    for (size_t e = 0; e < levels.size(); ++e) {
      Tensor level = level_gradient(levels, e, dA);
      if (needs.coefficients) da.push_back(levels[e].coefficients_gradient(level, support_only));
      if (needs.experts) dexperts.push_back(levels[e].factor_gradient(level));
    }
  }
  dA = Tensor();
  levels.clear();
  if (needs.in_bias && has_bias) {
    Tensor sums = column_sums(dB_rows);
    dbias = view(converted(view(sums, {1, R}, {R, 1}), dtype_of<S>), {R}, {1});
  }
  std::tie(dz, din) = activated_linear_backward<S>(dB, z, in_factor, activation, needs.z, needs.in);
  return gradients;
}

Gradients cp_backward(
    Tensor dy, Tensor z, std::vector<Tensor> coefficients, std::vector<Tensor> expert_factors, Tensor in_factor,
    std::optional<Tensor> in_bias, Tensor out_factor, Tensor /* A, which is not kept */, Tensor B,
    std::string activation, std::vector<bool> needs, bool support_only) {
  return with_element(z, [&](auto element) {
    return backward<decltype(element)>(
        dy, z, coefficients, expert_factors, in_factor, in_bias.has_value(), out_factor, B,
        activation_of(activation), Needs(needs), support_only);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cp_forward(
    Tensor z, std::vector<Tensor> coefficients, std::vector<Tensor> expert_factors, Tensor in_factor,
    std::optional<Tensor> in_bias, Tensor out_factor, std::string activation, bool save) {
  return with_element(z, [&](auto element) {
    return forward<decltype(element)>(
        z, coefficients, expert_factors, in_factor, in_bias, out_factor, activation_of(activation), save);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(mumoe_native, library) {
  library.def(
      "cp_forward(Tensor z, Tensor[] coefficients, Tensor[] expert_factors, Tensor in_factor, Tensor? in_bias, "
      "Tensor out_factor, *, str activation, bool save) -> (Tensor, Tensor, Tensor)");
  library.def(
      "cp_backward(Tensor dy, Tensor z, Tensor[] coefficients, Tensor[] expert_factors, Tensor in_factor, "
      "Tensor? in_bias, Tensor out_factor, Tensor A, Tensor B, *, str activation, bool[] needs, "
      "bool support_only=False) -> (Tensor, Tensor[], Tensor[], Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mumoe_native, CPU, library) {
  library.impl("cp_forward", TORCH_BOX(&cp_forward));
  library.impl("cp_backward", TORCH_BOX(&cp_backward));
}

}  // namespace mumoe
