// tucker_forward, tucker_backward: Tucker experts y = U_out c, c = vᵀ core, v = u ⊗ B, with the core as a matrix
// (M·R_I, R_O), u = ⊗_e a_e U_e the joint expert mode (M = Π R_e) and B = act(z) U_inᵀ + b.
//
// Backward, with dc = dy U_out and dv = core dc (M × R_I):
//
//   dU_out = dyᵀ c,  dcore = Σ_t v dcᵀ,  dB = uᵀ dv,  du = dv B,  dA_e = du with every other level's mode contracted
//   da_e = dA_e U_eᵀ,  dU_e = a_eᵀ dA_e,  dU_in = dBᵀ act(z),  db = Σ_t dB,  dz = act'(z) ⊙ (dB U_in)
//
// v and dv are M·R_I numbers a token, and most of the time are their three GEMMs with the core, which cost what they
// cost anyone: what can be saved is memory. v and dv exist in pieces: of the tokens where they meet the core, and of
// the modes m where v makes the core's gradient, which so needs no sum over pieces.
#include "experts.h"

namespace mumoe {
namespace {

// Elements of v or dv at a time, as far as that leaves this many tokens for a GEMM. Pieces of 2^19 to 2^23 elements
// take the same time but for a GEMM of few left-over tokens.
constexpr int64_t kOuterElements = 1 << 21, kOuterTokens = 128;

// The outer product of the vectors of a token's levels [first, last), one after the other.
class OuterProduct {
 public:
  explicit OuterProduct(const std::vector<Tensor>& factors) {
    int64_t joint = 1;
    for (const Tensor& factor : factors) {
      ranks_.push_back(factor.size(1));
      starts_.push_back(total_);
      total_ += factor.size(1);
      joint *= factor.size(1);
    }
    modes_.resize(static_cast<size_t>(total_) + 16);
    product_.resize(static_cast<size_t>(joint) + 16);
    other_.resize(product_.size());
  }

  template <class S>
  void load(const std::vector<Contraction<S>>& levels, int64_t t) {
    for (size_t e = 0; e < levels.size(); ++e) levels[e].row(t, modes_.data() + starts_[e]);
  }

  const float* of(size_t first, size_t last) {
    product_[0] = 1.0f;
    for (size_t e = first; e < last; ++e) {
      int64_t before = size(first, e);
      float* mode = modes_.data() + starts_[e];
      rows().single.matrix_product(product_.data(), mode, nullptr, before, 1, ranks_[e], nullptr, other_.data());
      product_.swap(other_);
    }
    return product_.data();
  }

  // Elements of that product.
  int64_t size(size_t first, size_t last) const {
    int64_t product = 1;
    for (size_t e = first; e < last; ++e) product *= ranks_[e];
    return product;
  }

  size_t levels() const {
    return ranks_.size();
  }

 private:
  int64_t total_ = 0;
  std::vector<int64_t> ranks_, starts_;
  std::vector<float> modes_, product_, other_;
};

// The core as a matrix (M·R_I, R_O), and its sizes.
struct Core {
  Tensor dense;
  int64_t R_I, R_O, M;
  Tensor matrix;

  explicit Core(const Tensor& core)
      : dense(as_contiguous(core)),
        R_I(core.size(core.dim() - 2)),
        R_O(core.size(core.dim() - 1)),
        M(core.numel() / (R_I * R_O)),
        matrix(view(dense, {M * R_I, R_O}, {R_O, 1})) {}

  int64_t tokens_at_once(int64_t T) const {
    return std::min(T, std::max(kOuterTokens, kOuterElements / (M * R_I)));
  }
};

// u (T, M) in float32.
template <class S>
Tensor joint_modes(
    const std::vector<Contraction<S>>& levels, const std::vector<Tensor>& factors, int64_t T, int64_t M) {
  Tensor u = empty<float>({T, M});
  Matrix<float> out = matrix<float>(u);
  parallel(T, 64 * M, [&](int64_t first, int64_t last) {
    OuterProduct product(factors);
    for (int64_t t = first; t < last; ++t) {
      product.load(levels, t);
      std::copy_n(product.of(0, levels.size()), M, out[t]);
    }
  });
  return u;
}

// dA_e (T, R_e) in S for every level, from du (T, M) in float32.
template <class S>
std::vector<Tensor> level_gradients(
    const std::vector<Contraction<S>>& levels, const std::vector<Tensor>& factors, const Tensor& du) {
  if (levels.size() == 1) return {converted(du, dtype_of<S>)};
  int64_t T = du.size(0), M = du.size(1);
  std::vector<Tensor> out;
  for (const Tensor& factor : factors) out.push_back(empty<S>({T, factor.size(1)}));
  Matrix<float> upstream = matrix<float>(du);
  parallel(T, 64 * M, [&](int64_t first, int64_t last) {
    OuterProduct product(factors);
    Scratch without_front(M), both(M);
    for (int64_t t = first; t < last; ++t) {
      product.load(levels, t);
      for (size_t e = 0; e < levels.size(); ++e) {
        int64_t R = factors[e].size(1), front = product.size(0, e), back = product.size(e + 1, levels.size());
        std::fill_n(without_front.data(), R * back, 0.0f);
        const float* weights = product.of(0, e);
        for (int64_t i = 0; i < front; ++i) {
          rows().single.add(upstream[t] + i * R * back, R * back, weights[i], without_front.data());
        }
        const float* after = product.of(e + 1, levels.size());
        rows().single.dots(after, 1, back, without_front.data(), back, 0, R, both.data(), R);
        rows_of<S>().narrow(both.data(), R, matrix<S>(out[e])[t]);
      }
    }
  });
  return out;
}

// c (T, R_O) = v core, and B += bias in place on the way.
template <class S>
Tensor contracted_with_core(const Tensor& u, const Tensor& B, const std::optional<Tensor>& bias, const Core& core) {
  int64_t T = B.size(0), rows_at_once = core.tokens_at_once(T);
  Tensor c = empty<S>({T, core.R_O}), v = empty<S>({rows_at_once, core.M * core.R_I});
  Matrix<float> u_rows = matrix<float>(u);
  Matrix<S> B_rows = matrix<S>(B), v_rows = matrix<S>(v);
  for (int64_t begin = 0; begin < T; begin += rows_at_once) {
    int64_t end = std::min(begin + rows_at_once, T);
    parallel(end - begin, core.M * core.R_I, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        int64_t t = begin + i;
        rows_of<S>().matrix_product(u_rows[t], B_rows[t], data<S>(bias), core.M, 1, core.R_I, nullptr, v_rows[i]);
      }
    });
    gemm_into(row_range(c, begin, end), row_range(v, 0, end - begin), core.matrix);
  }
  return c;
}

// dcore as the matrix: rows m of it are (u_m ⊙ B)ᵀ dc.
template <class S>
Tensor core_gradient(const Tensor& dc, const Tensor& u, const Tensor& B, const Core& core) {
  int64_t T = B.size(0), M = core.M, R_I = core.R_I;
  int64_t modes_at_once = std::clamp<int64_t>(kOuterElements / std::max<int64_t>(T * R_I, 1), 1, M);
  Tensor dcore = torch::stable::empty_like(core.dense), v = empty<S>({T, modes_at_once * R_I});
  Tensor out = view(dcore, {M * R_I, core.R_O}, {core.R_O, 1});
  Matrix<float> u_rows = matrix<float>(u);
  Matrix<S> B_rows = matrix<S>(B), v_rows = matrix<S>(v);
  for (int64_t begin = 0; begin < M; begin += modes_at_once) {
    int64_t modes = std::min(modes_at_once, M - begin);
    parallel(T, modes * R_I, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        rows_of<S>().matrix_product(u_rows[t] + begin, B_rows[t], nullptr, modes, 1, R_I, nullptr, v_rows[t]);
      }
    });
    Tensor part = view(v, {modes * R_I, T}, {1, modes_at_once * R_I});
    gemm_into(row_range(out, begin * R_I, (begin + modes) * R_I), part, dc);
  }
  return dcore;
}

// du (T, M) in float32 and dB (T, R_I).
template <class S>
std::tuple<Tensor, Tensor> outer_gradients(const Tensor& dc, const Tensor& u, const Tensor& B, const Core& core) {
  int64_t T = B.size(0), M = core.M, R_I = core.R_I, rows_at_once = core.tokens_at_once(T);
  Tensor du = empty<float>({T, M}), dB = empty<S>({T, R_I}), dv = empty<S>({rows_at_once, M * R_I});
  Matrix<float> u_rows = matrix<float>(u), du_rows = matrix<float>(du);
  Matrix<S> B_rows = matrix<S>(B), dB_rows = matrix<S>(dB), dv_rows = matrix<S>(dv);
  for (int64_t begin = 0; begin < T; begin += rows_at_once) {
    int64_t end = std::min(begin + rows_at_once, T);
    gemm_into(row_range(dv, 0, end - begin), row_range(dc, begin, end), transposed(core.matrix));
    parallel(end - begin, 2 * M * R_I, [&](int64_t first, int64_t last) {
      Scratch sums(R_I);
      for (int64_t i = first; i < last; ++i) {
        int64_t t = begin + i;
        std::fill_n(sums.data(), R_I, 0.0f);
        rows_of<S>().outer_backward(dv_rows[i], u_rows[t], B_rows[t], M, R_I, du_rows[t], sums.data());
        rows_of<S>().narrow(sums.data(), R_I, dB_rows[t]);
      }
    });
  }
  return {du, dB};
}

template <class S>
std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& z, const std::vector<Tensor>& coefficients, const std::vector<Tensor>& expert_factors,
    const Tensor& in_factor, const std::optional<Tensor>& in_bias, const Tensor& core_tensor, const Tensor& out_factor,
    Activation activation, bool save) {
  Core core(core_tensor);
  Tensor u = joint_modes(contractions<S>(coefficients, expert_factors), expert_factors, z.size(0), core.M);
  Tensor B = activated_linear<S>(z, in_factor, activation);
  std::optional<Tensor> bias = in_bias.has_value() ? std::optional(as_contiguous(*in_bias)) : std::nullopt;
  Tensor c = contracted_with_core<S>(u, B, bias, core);
  Tensor y = linear(c, out_factor);
  return {y, save ? B : empty<S>({0}), save ? c : empty<S>({0})};
}

// Which gradients are needed; one entry stands for all levels of its kind.
struct TuckerNeeds {
  bool z, coefficients, experts, in, in_bias, core, out;

  explicit TuckerNeeds(const std::vector<bool>& needs)
      : z(needs[0]), coefficients(needs[1]), experts(needs[2]), in(needs[3]), in_bias(needs[4]), core(needs[5]),
        out(needs[6]) {}
};

using TuckerGradients =
    std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor>;

template <class S>
TuckerGradients backward(
    const Tensor& dy, const Tensor& z, const std::vector<Tensor>& coefficients,
    const std::vector<Tensor>& expert_factors, const Tensor& in_factor, bool has_bias, const Tensor& core_tensor,
    const Tensor& out_factor, const Tensor& B_saved, const Tensor& c, Activation activation, TuckerNeeds needs,
    bool support_only) {
  int64_t T = z.size(0);
  Core core(core_tensor);
  Tensor B = with_dense_rows(B_saved);
  TuckerGradients gradients;
  auto& [dz, da, dexperts, din, dbias, dcore, dout] = gradients;
  if (needs.out) dout = gemm(transposed(dy), c);
  bool needs_B = needs.z || needs.in || (needs.in_bias && has_bias), needs_u = needs.coefficients || needs.experts;
  if (!needs.core && !needs_B && !needs_u) return gradients;
  std::vector<Contraction<S>> levels = contractions<S>(coefficients, expert_factors);
  Tensor u = joint_modes(levels, expert_factors, T, core.M), dc = gemm(dy, out_factor);
  if (needs.core) dcore = core_gradient<S>(dc, u, B, core);
  if (!needs_B && !needs_u) return gradients;
  auto [du, dB] = outer_gradients<S>(dc, u, B, core);
  dc = u = Tensor();
  if (needs_u) {
    std::vector<Tensor> upstream = level_gradients(levels, expert_factors, du);
    for (size_t e = 0; e < levels.size(); ++e) {
      if (needs.coefficients) da.push_back(levels[e].coefficients_gradient(upstream[e], support_only));
      if (needs.experts) dexperts.push_back(levels[e].factor_gradient(upstream[e]));
    }
  }
  if (needs.in_bias && has_bias) {
    Tensor sums = column_sums(matrix<S>(dB));
    dbias = view(converted(view(sums, {1, core.R_I}, {core.R_I, 1}), dtype_of<S>), {core.R_I}, {1});
  }
  std::tie(dz, din) = activated_linear_backward<S>(dB, z, in_factor, activation, needs.z, needs.in);
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> tucker_forward(
    Tensor z, std::vector<Tensor> coefficients, std::vector<Tensor> expert_factors, Tensor in_factor,
    std::optional<Tensor> in_bias, Tensor core, Tensor out_factor, std::string activation, bool save) {
  return with_element(z, [&](auto element) {
    return forward<decltype(element)>(
        z, coefficients, expert_factors, in_factor, in_bias, core, out_factor, activation_of(activation), save);
  });
}

TuckerGradients tucker_backward(
    Tensor dy, Tensor z, std::vector<Tensor> coefficients, std::vector<Tensor> expert_factors, Tensor in_factor,
    std::optional<Tensor> in_bias, Tensor core, Tensor out_factor, Tensor B, Tensor c, std::string activation,
    std::vector<bool> needs, bool support_only) {
  return with_element(z, [&](auto element) {
    return backward<decltype(element)>(
        dy, z, coefficients, expert_factors, in_factor, in_bias.has_value(), core, out_factor, B, c,
        activation_of(activation), TuckerNeeds(needs), support_only);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(mumoe_native, library) {
  library.def(
      "tucker_forward(Tensor z, Tensor[] coefficients, Tensor[] expert_factors, Tensor in_factor, Tensor? in_bias, "
      "Tensor core, Tensor out_factor, *, str activation, bool save) -> (Tensor, Tensor, Tensor)");
  library.def(
      "tucker_backward(Tensor dy, Tensor z, Tensor[] coefficients, Tensor[] expert_factors, Tensor in_factor, "
      "Tensor? in_bias, Tensor core, Tensor out_factor, Tensor B, Tensor c, *, str activation, bool[] needs, "
      "bool support_only=False) -> (Tensor, Tensor[], Tensor[], Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mumoe_native, CPU, library) {
  library.impl("tucker_forward", TORCH_BOX(&tucker_forward));
  library.impl("tucker_backward", TORCH_BOX(&tucker_backward));
}

}  // namespace
}  // namespace mumoe
