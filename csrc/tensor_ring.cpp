// tr_forward, tr_backward: tensor-ring experts y_o = Σ_{pr} h_pr U_out[o, p, r], h = A B per token, with
// A = Π_e A_e, A_e = U_e ×₂ a_e (R_e × R_{e+1}) and B = U_in ×₂ act(z) + b. P = R_1, M = R_{E+1}, R = R_{E+2}.
//
// Backward, with dh = dy U_out, and L_e, S_e the products of the levels before and after level e:
//
//   dU_out = dyᵀ h,  dA = dh Bᵀ,  dB = Aᵀ dh,  dA_e = L_eᵀ dA S_eᵀ
//   da_e = ⟨dA_e, U_e[n]⟩,  dU_e = a_eᵀ dA_e,  dU_in = dBᵀ act(z),  db = Σ_t dB,  dz = act'(z) ⊙ (dB U_in)
#include "experts.h"

namespace mumoe {
namespace {

// The small matrices of one token's levels, in float32.
class Chain {
 public:
  Chain(const std::vector<Tensor>& cores, int64_t P) : P_(P) {
    int64_t largest = P;
    for (const Tensor& core : cores) {
      columns_.push_back(core.size(2));
      starts_.push_back(size_);
      size_ += core.size(1) * core.size(2);
      largest = std::max({largest, core.size(1), core.size(2)});
    }
    levels_.resize(static_cast<size_t>(size_));
    product_.resize(static_cast<size_t>(largest * largest));
    other_.resize(product_.size());
  }

  float* level(size_t e) {
    return levels_.data() + starts_[e];
  }

  // A_first … A_{last−1} (rows × columns), or the identity of that many rows where there is none.
  const float* product(size_t first, size_t last, int64_t rows) {
    if (first == last) {
      std::fill(product_.begin(), product_.end(), 0.0f);
      for (int64_t i = 0; i < rows; ++i) product_[static_cast<size_t>(i * rows + i)] = 1.0f;
      return product_.data();
    }
    std::copy_n(level(first), rows * columns_[first], product_.data());
    for (size_t e = first + 1; e < last; ++e) {
      multiply(product_.data(), level(e), rows, columns_[e - 1], columns_[e], other_.data());
      product_.swap(other_);
    }
    return product_.data();
  }

  int64_t rows(size_t e) const {
    return e == 0 ? P_ : columns_[e - 1];
  }
  int64_t columns(size_t e) const {
    return columns_[e];
  }
  size_t depth() const {
    return columns_.size();
  }

  // out (X×Z) = left (X×Y) · right (Y×Z)
  static void multiply(const float* left, const float* right, int64_t X, int64_t Y, int64_t Z, float* out) {
    std::fill_n(out, X * Z, 0.0f);
    for (int64_t x = 0; x < X; ++x) {
      for (int64_t y = 0; y < Y; ++y) rows_add(right + y * Z, Z, left[x * Y + y], out + x * Z);
    }
  }

  // out (Y×Z) = leftᵀ · right, left (X×Y), right (X×Z)
  static void multiply_transposed(const float* left, const float* right, int64_t X, int64_t Y, int64_t Z, float* out) {
    std::fill_n(out, Y * Z, 0.0f);
    for (int64_t x = 0; x < X; ++x) {
      for (int64_t y = 0; y < Y; ++y) rows_add(right + x * Z, Z, left[x * Y + y], out + y * Z);
    }
  }

 private:
  static void rows_add(const float* x, int64_t n, float weight, float* total) {
    for (int64_t i = 0; i < n; ++i) total[i] += weight * x[i];
  }

  int64_t P_, size_ = 0;
  std::vector<int64_t> columns_, starts_;
  std::vector<float> levels_, product_, other_;
};

// A core (N, R_e, R_{e+1}) as a matrix with one row per expert.
std::vector<Tensor> flattened(const std::vector<Tensor>& cores) {
  std::vector<Tensor> flat;
  for (const Tensor& core : cores) {
    Tensor dense = as_contiguous(core);
    int64_t columns = dense.size(1) * dense.size(2);
    flat.push_back(view(dense, {dense.size(0), columns}, {columns, 1}));
  }
  return flat;
}

// (X, Y, Z) as (X·Y, Z) or (X, Y·Z).
Tensor joined(const Tensor& core, bool front) {
  Tensor dense = as_contiguous(core);
  int64_t X = dense.size(0), Y = dense.size(1), Z = dense.size(2);
  return front ? view(dense, {X * Y, Z}, {Z, 1}) : view(dense, {X, Y * Z}, {Y * Z, 1});
}

struct Sizes {
  int64_t T, P, M, R;

  Sizes(const Tensor& z, const std::vector<Tensor>& cores, const Tensor& in_core)
      : T(z.size(0)), P(cores[0].size(1)), M(in_core.size(0)), R(in_core.size(1)) {}
};

template <class S>
std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& z, const std::vector<Tensor>& coefficients, const std::vector<Tensor>& cores, const Tensor& in_core,
    const std::optional<Tensor>& in_bias, const Tensor& out_core, Activation activation, bool save) {
  Sizes sizes(z, cores, in_core);
  auto [T, P, M, R] = sizes;
  std::vector<Contraction<S>> levels = contractions<S>(coefficients, flattened(cores));
  Tensor B = activated_linear<S>(z, joined(in_core, true), activation), h = empty<S>({T, P * R});
  Tensor A = empty<S>({save ? T : 0, P, M});
  std::optional<Tensor> bias = in_bias.has_value() ? std::optional(as_contiguous(*in_bias)) : std::nullopt;
  Matrix<S> B_rows = matrix<S>(B), h_rows = matrix<S>(h);
  parallel(T, 4 * P * M * R, [&, P = P, M = M, R = R](int64_t first, int64_t last) {
    Chain chain(cores, P);
    for (int64_t t = first; t < last; ++t) {
      for (size_t e = 0; e < levels.size(); ++e) levels[e].row(t, chain.level(e));
      S* A_out = save ? data<S>(A) + t * P * M : nullptr;
      const float* A_row = chain.product(0, levels.size(), P);
      rows_of<S>().matrix_product(A_row, B_rows[t], data<S>(bias), P, M, R, A_out, h_rows[t]);
    }
  });
  Tensor saved_B = save ? view(B, {T, M, R}, {M * R, R, 1}) : empty<S>({0, M, R});
  return {linear(h, joined(out_core, false)), A, saved_B};
}

// dA_e (T, R_e·R_{e+1}) in S for every level, from dA (T, P·M) in float32.
template <class S>
std::vector<Tensor> level_gradients(
    const std::vector<Contraction<S>>& levels, const std::vector<Tensor>& cores, const Tensor& dA, int64_t P) {
  if (levels.size() == 1) return {converted(dA, dtype_of<S>)};
  int64_t T = dA.size(0), M = cores.back().size(2);
  std::vector<Tensor> out;
  for (const Tensor& core : cores) out.push_back(empty<S>({T, core.size(1) * core.size(2)}));
  Matrix<float> upstream = matrix<float>(dA);
  parallel(T, 32 * P * M, [&](int64_t first, int64_t last) {
    Chain chain(cores, P);
    std::vector<float> left, both;
    for (int64_t t = first; t < last; ++t) {
      for (size_t e = 0; e < levels.size(); ++e) levels[e].row(t, chain.level(e));
      for (size_t e = 0; e < levels.size(); ++e) {
        int64_t rows = chain.rows(e), columns = chain.columns(e);
        left.resize(static_cast<size_t>(rows * M));
        both.resize(static_cast<size_t>(rows * columns));
        Chain::multiply_transposed(chain.product(0, e, P), upstream[t], P, rows, M, left.data());
        const float* after = chain.product(e + 1, chain.depth(), columns);
        for (int64_t i = 0; i < rows; ++i) {
          rows_of<float>().dots(
              left.data() + i * M, 1, M, after, M, 0, columns, both.data() + i * columns, columns);
        }
        rows_of<S>().narrow(both.data(), rows * columns, matrix<S>(out[e])[t]);
      }
    }
  });
  return out;
}

template <class S>
Gradients backward(
    const Tensor& dy, const Tensor& z, const std::vector<Tensor>& coefficients, const std::vector<Tensor>& cores,
    const Tensor& in_core, bool has_bias, const Tensor& out_core, const Tensor& A, const Tensor& B,
    Activation activation, Needs needs, bool support_only) {
  Sizes sizes(z, cores, in_core);
  auto [T, P, M, R] = sizes;
  int64_t O = out_core.size(0), I = z.size(1);
  Tensor dh = gemm(dy, joined(out_core, false));
  Tensor dA = empty<float>({T, P * M}), dB = empty<S>({T, M * R}), h = empty<S>({T, P * R});
  Tensor A_dense = as_contiguous(A), B_dense = as_contiguous(B);
  Matrix<S> dh_rows = matrix<S>(dh), dB_rows = matrix<S>(dB), h_rows = matrix<S>(h);
  parallel(T, 8 * P * M * R, [&, P = P, M = M, R = R](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      rows_of<S>().matrix_product_backward(
          dh_rows[t], data<S>(A_dense) + t * P * M, data<S>(B_dense) + t * M * R, P, M, R, matrix<float>(dA)[t],
          dB_rows[t], h_rows[t]);
    }
  });
  dh = Tensor();
  Gradients gradients;
  auto& [dz, da, dcores, din, dbias, dout] = gradients;
  if (needs.out) dout = view(gemm(transposed(dy), h), {O, P, R}, {P * R, R, 1});
  h = Tensor();
  if (needs.coefficients || needs.experts) {
    std::vector<Contraction<S>> levels = contractions<S>(coefficients, flattened(cores));
    std::vector<Tensor> upstream = level_gradients(levels, cores, dA, P);
    for (size_t e = 0; e < levels.size(); ++e) {
      if (needs.coefficients) da.push_back(levels[e].coefficients_gradient(upstream[e], support_only));
      if (!needs.experts) continue;
      int64_t rows = cores[e].size(1), columns = cores[e].size(2);
      Tensor flat = levels[e].factor_gradient(upstream[e]);
      dcores.push_back(view(flat, {cores[e].size(0), rows, columns}, {rows * columns, columns, 1}));
    }
  }
  if (needs.in_bias && has_bias) {
    Tensor sums = column_sums(dB_rows);
    dbias = view(converted(view(sums, {1, M * R}, {M * R, 1}), dtype_of<S>), {M, R}, {R, 1});
  }
  std::tie(dz, din) =
      activated_linear_backward<S>(dB, z, joined(in_core, true), activation, needs.z, needs.in);
  if (needs.in) din = view(din, {M, R, I}, {R * I, I, 1});
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> tr_forward(
    Tensor z, std::vector<Tensor> coefficients, std::vector<Tensor> expert_cores, Tensor in_core,
    std::optional<Tensor> in_bias, Tensor out_core, std::string activation, bool save) {
  return with_element(z, [&](auto element) {
    return forward<decltype(element)>(
        z, coefficients, expert_cores, in_core, in_bias, out_core, activation_of(activation), save);
  });
}

Gradients tr_backward(
    Tensor dy, Tensor z, std::vector<Tensor> coefficients, std::vector<Tensor> expert_cores, Tensor in_core,
    std::optional<Tensor> in_bias, Tensor out_core, Tensor A, Tensor B, std::string activation,
    std::vector<bool> needs, bool support_only) {
  return with_element(z, [&](auto element) {
    return backward<decltype(element)>(
        dy, z, coefficients, expert_cores, in_core, in_bias.has_value(), out_core, A, B, activation_of(activation),
        Needs(needs), support_only);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(mumoe_native, library) {
  library.def(
      "tr_forward(Tensor z, Tensor[] coefficients, Tensor[] expert_cores, Tensor in_core, Tensor? in_bias, "
      "Tensor out_core, *, str activation, bool save) -> (Tensor, Tensor, Tensor)");
  library.def(
      "tr_backward(Tensor dy, Tensor z, Tensor[] coefficients, Tensor[] expert_cores, Tensor in_core, "
      "Tensor? in_bias, Tensor out_core, Tensor A, Tensor B, *, str activation, bool[] needs, "
      "bool support_only=False) -> (Tensor, Tensor[], Tensor[], Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mumoe_native, CPU, library) {
  library.impl("tr_forward", TORCH_BOX(&tr_forward));
  library.impl("tr_backward", TORCH_BOX(&tr_backward));
}

}  // namespace
}  // namespace mumoe
