// gate_forward, gate_backward: a = entmax(norm(z Gᵀ + b)), norm being layer norm over the experts or none, and
// gate_hierarchy_…: one level after the other, whose gradients of z are added up.
//
// Backward, with x̂ = norm(s), σ⁻¹ a row's inverse deviation and dx̂ entmax's sparse gradient (Σ dx̂ = 0):
//
//   c = mean(dx̂ ⊙ x̂),  ds = σ⁻¹(dx̂ − c x̂),  dz = ds G,  dG = dsᵀ z
//
// ds is dense, because x̂ is. With many tokens and experts its dense part need not appear: with Gc = G less its mean row,
// x̂ = σ⁻¹ z Gcᵀ, and so with the I×I matrices C = Gcᵀ Gc and K = zᵀ diag(σ⁻² c) z
//
//   σ⁻¹ from z C zᵀ / N,  dz = σ⁻¹(dx̂ G − σ⁻¹ c z C),  dG = (σ⁻¹dx̂)ᵀ z − Gc K
//
// where the products with dx̂ run over the support, and c follows from a alone.
#include "gate.h"

#include <cmath>

#include "columns.h"
#include "gemm.h"
#include "logits.h"
#include "support.h"

namespace mumoe {

namespace {

bool is_layer(const std::string& norm) {
  STD_TORCH_CHECK(norm == "layer" || norm == "none", "gate: expected norm layer or none, got ", norm);
  return norm == "layer";
}

// The weight as it takes part: rounded to z's dtype, then float32.
Tensor quantised(const Tensor& weight, ScalarType dtype) {
  return converted(converted(weight, dtype), ScalarType::Float);
}

struct GateOptions {
  bool layer;
  float alpha, eps;
};

// ds (T, N) in S of all tokens, from the logits computed once more.
template <class S>
Tensor logit_gradient(const Tensor& da, const Tensor& a, const Tensor& z, const Tensor& weight,
                      const std::optional<Tensor>& bias, GateOptions options) {
  int64_t T = z.size(0), N = weight.size(0);
  Tensor ds = empty<S>({T, N});
  std::optional<Logits> logits_of;
  if (options.layer) logits_of.emplace(weight, dtype_of<S>, T);
  std::optional<Tensor> bias_float = logits_bias(bias, dtype_of<S>);
  Matrix<S> da_rows = matrix<S>(da), a_rows = matrix<S>(a), ds_rows = matrix<S>(ds);
  for (int64_t begin = 0, chunk = logits_chunk(N); begin < T; begin += chunk) {
    int64_t end = std::min(begin + chunk, T);
    std::optional<Tensor> logits;
    if (options.layer) logits = logits_of->of(row_range(z, begin, end));
    parallel(end - begin, 6 * N, [&](int64_t first, int64_t last) {
      Scratch scratch(3 * (N + 16));
      for (int64_t t = begin + first; t < begin + last; ++t) {
        if (!options.layer) {
          rows_of<S>().entmax_backward(da_rows[t], a_rows[t], N, options.alpha, ds_rows[t], scratch.data());
          continue;
        }
        float* s = matrix<float>(*logits)[t - begin];
        float mean, rstd;
        rows().moments(s, data<float>(bias_float), N, options.eps, &mean, &rstd);
        rows_of<S>().layer_norm_entmax_backward(
            da_rows[t], a_rows[t], s, N, options.alpha, mean, rstd, ds_rows[t], scratch.data());
      }
    });
  }
  return ds;
}

// G less its mean row.
Tensor centred(const Tensor& weight) {
  Matrix<float> from = matrix<float>(weight);
  Tensor mean = column_sums(from), out = empty<float>({from.rows, from.columns});
  Matrix<float> to = matrix<float>(out);
  float share = -1.0f / static_cast<float>(from.rows);
  parallel(from.rows, from.columns, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      std::copy_n(from[n], from.columns, to[n]);
      rows().single.add(data<float>(mean), from.columns, share, to[n]);
    }
  });
  return out;
}

// The gradients by way of Gram matrices; `supports` becomes σ⁻¹ dx̂.
template <class S>
std::tuple<Tensor, Tensor> gram_backward(const Tensor& da, Supports supports, const Tensor& z, const Tensor& weight,
                                         GateOptions options, bool needs_z, bool needs_weight) {
  int64_t T = z.size(0), N = weight.size(0), I = z.size(1);
  Tensor z_float = with_dense_rows(converted(z, ScalarType::Float)), G = as_contiguous(quantised(weight, dtype_of<S>));
  Tensor Gc = centred(G);
  Tensor C = gemm(transposed(Gc), Gc), zC = gemm(z_float, C);
  Tensor weighted = empty<float>({T, I}), dz = needs_z ? empty<S>({T, I}) : Tensor();
  Matrix<S> da_rows = matrix<S>(da);
  Matrix<float> z_rows = matrix<float>(z_float), zC_rows = matrix<float>(zC), weighted_rows = matrix<float>(weighted);
  parallel(T, 8 * I, [&](int64_t first, int64_t last) {
    Scratch dx(N), row(I);
    for (int64_t t = first; t < last; ++t) {
      Support support = supports.row(t);
      float c = rows_of<S>().entmax_backward_on_support(da_rows[t], support, N, options.alpha, dx.data());
      float squares;
      rows().single.dots(z_rows[t], 1, I, zC_rows[t], I, 0, 1, &squares, 1);
      float rstd = 1.0f / std::sqrt(std::fmax(squares / static_cast<float>(N), 0.0f) + options.eps);
      if (squares != squares) rstd = squares;
      for (int64_t k = 0; k < support.count; ++k) supports.value[supports.start[t] + k] = rstd * dx.data()[k];
      std::fill_n(weighted_rows[t], I, 0.0f);
      rows().single.add(z_rows[t], I, rstd * rstd * c, weighted_rows[t]);
      if (!needs_z) continue;
      rows().single.gather(supports.row(t), data<float>(G), I, I, row.data());
      rows().single.add(zC_rows[t], I, -rstd * rstd * c, row.data());
      rows_of<S>().narrow(row.data(), I, matrix<S>(dz)[t]);
    }
  });
  if (!needs_weight) return {dz, Tensor()};
  Tensor dense = gemm(Gc, gemm(transposed(z_float), weighted));
  Tensor dweight = scatter_rows<float>(supports, z_rows, N);
  Matrix<float> dense_rows = matrix<float>(dense), dweight_rows = matrix<float>(dweight);
  parallel(N, I, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) rows().single.add(dense_rows[n], I, -1.0f, dweight_rows[n]);
  });
  return {dz, dweight};
}

// Whether Gram matrices take fewer operations than the three products with T×N logits, by a margin for the rest.
bool gram_wins(int64_t T, int64_t I, int64_t N) {
  return 2 * I * (T + N) * 5 < 3 * T * N * 4;
}

std::tuple<Tensor, Tensor, Tensor> gate_backward(
    Tensor da, Tensor a, Tensor z, Tensor weight, std::optional<Tensor> bias, std::string norm, double alpha,
    double eps, std::vector<bool> needs) {
  return with_element(z, [&](auto element) -> std::tuple<Tensor, Tensor, Tensor> {
    using S = decltype(element);
    Tensor upstream = with_dense_rows(da), forward = with_dense_rows(a);
    GateOptions options{is_layer(norm), static_cast<float>(alpha), static_cast<float>(eps)};
    bool needs_bias = needs[2] && bias.has_value();
    if (options.layer && alpha > 1.0 && !bias.has_value() && gram_wins(z.size(0), z.size(1), weight.size(0))) {
      if (std::optional<Supports> supports = sparse_supports(matrix<S>(forward))) {
        auto [dz, dweight] =
            gram_backward<S>(upstream, std::move(*supports), z, weight, options, needs[0], needs[1]);
        return {dz, dweight, Tensor()};
      }
    }
    Tensor ds = logit_gradient<S>(upstream, forward, z, weight, bias, options);
    auto [dz, dweight] = logits_backward(ds, z, weight, needs[0], needs[1]);
    return {dz, dweight, needs_bias ? column_sums(matrix<S>(ds)) : Tensor()};
  });
}

}  // namespace

Tensor gate_logits_forward(Tensor z, Tensor weight) {
  return Logits(weight, z.scalar_type(), z.size(0)).of(z);
}

std::tuple<Tensor, Tensor> logits_backward(
    const Tensor& ds, const Tensor& z, const Tensor& weight, bool needs_z, bool needs_weight) {
  Tensor dz = needs_z ? gemm(ds, converted(weight, z.scalar_type())) : Tensor();
  return {dz, needs_weight ? converted(gemm(transposed(ds), z), ScalarType::Float) : Tensor()};
}

Tensor gate_forward(
    Tensor z, Tensor weight, std::optional<Tensor> bias, std::string norm, double alpha, double eps) {
  return with_element(z, [&](auto element) {
    using S = decltype(element);
    bool layer = is_layer(norm);
    int64_t T = z.size(0), N = weight.size(0);
    Tensor a = empty<S>({T, N});
    Logits logits_of(weight, dtype_of<S>, T);
    std::optional<Tensor> bias_float = logits_bias(bias, dtype_of<S>);
    Matrix<S> a_rows = matrix<S>(a);
    for (int64_t begin = 0, chunk = logits_chunk(N); begin < T; begin += chunk) {
      int64_t end = std::min(begin + chunk, T);
      Tensor logits = logits_of.of(row_range(z, begin, end));
      Matrix<float> s = matrix<float>(logits);
      parallel(end - begin, 6 * N, [&](int64_t first, int64_t last) {
        Scratch scratch(N);
        for (int64_t t = first; t < last; ++t) {
          float mean, rstd;
          rows().moments(s[t], data<float>(bias_float), N, static_cast<float>(eps), &mean, &rstd);
          // entmax does not see the mean: it subtracts the maximum
          rows_of<S>().entmax_of_logits(
              s[t], N, static_cast<float>(alpha), layer ? rstd : 1.0f, a_rows[begin + t], scratch.data());
        }
      });
    }
    return a;
  });
}

namespace {

std::optional<Tensor> bias_of(const std::vector<Tensor>& biases, size_t e) {
  return biases.empty() ? std::nullopt : std::optional(biases[e]);
}

// total += part
template <class S>
void add_to(const Tensor& total, const Tensor& part) {
  Matrix<S> to = matrix<S>(total), from = matrix<S>(part);
  parallel(to.rows, to.columns, [&](int64_t first, int64_t last) {
    Scratch sum(to.columns);
    for (int64_t t = first; t < last; ++t) {
      rows_of<S>().widen(to[t], to.columns, sum.data());
      rows_of<S>().add(from[t], to.columns, 1.0f, sum.data());
      rows_of<S>().narrow(sum.data(), to.columns, to[t]);
    }
  });
}

std::vector<Tensor> gate_hierarchy_forward(
    Tensor z, std::vector<Tensor> weights, std::vector<Tensor> biases, std::string norm, double alpha, double eps) {
  std::vector<Tensor> a;
  for (size_t e = 0; e < weights.size(); ++e) {
    a.push_back(gate_forward(z, weights[e], bias_of(biases, e), norm, alpha, eps));
  }
  return a;
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> gate_hierarchy_backward(
    std::vector<Tensor> da, std::vector<Tensor> a, Tensor z, std::vector<Tensor> weights, std::vector<Tensor> biases,
    std::string norm, double alpha, double eps, std::vector<bool> needs) {
  Tensor dz;
  std::vector<Tensor> dweights, dbiases;
  for (size_t e = 0; e < weights.size(); ++e) {
    auto [dz_level, dweight, dbias] =
        gate_backward(da[e], a[e], z, weights[e], bias_of(biases, e), norm, alpha, eps, needs);
    if (needs[0] && e > 0) {
      // named anew: Clang before 16 captures no structured binding
      with_element(z, [&, &more = dz_level](auto element) { add_to<decltype(element)>(dz, more); });
    } else {
      dz = dz_level;
    }
    if (needs[1]) dweights.push_back(dweight);
    if (needs[2] && !biases.empty()) dbiases.push_back(dbias);
  }
  return {dz, dweights, dbiases};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mumoe_native, library) {
  library.def(
      "gate_forward(Tensor z, Tensor weight, Tensor? bias, *, str norm, float alpha, float eps) -> Tensor");
  library.def(
      "gate_backward(Tensor da, Tensor a, Tensor z, Tensor weight, Tensor? bias, *, str norm, float alpha, float eps, "
      "bool[] needs) -> (Tensor, Tensor, Tensor)");
  library.def(
      "gate_hierarchy_forward(Tensor z, Tensor[] weights, Tensor[] biases, *, str norm, float alpha, float eps) -> "
      "Tensor[]");
  library.def(
      "gate_hierarchy_backward(Tensor[] da, Tensor[] a, Tensor z, Tensor[] weights, Tensor[] biases, *, str norm, "
      "float alpha, float eps, bool[] needs) -> (Tensor, Tensor[], Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(mumoe_native, CPU, library) {
  library.impl("gate_forward", TORCH_BOX(&gate_forward));
  library.impl("gate_backward", TORCH_BOX(&gate_backward));
  library.impl("gate_hierarchy_forward", TORCH_BOX(&gate_hierarchy_forward));
  library.impl("gate_hierarchy_backward", TORCH_BOX(&gate_hierarchy_backward));
}

}  // namespace mumoe
