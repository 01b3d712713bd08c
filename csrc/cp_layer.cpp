// cp_layer: gate and CP experts of one layer in one call, without gradients.
//
// Few tokens (decoding, one input) are read out of the weights in two parallel passes, with everything small between
// them: rows of G and U_in against z; norm, entmax and the support's rows of U_e; rows of U_out against h. All that lies
// in between is one block of float32 scratch. More tokens go through the operators of the two halves.
#include <cmath>

#include "cp.h"
#include "experts.h"
#include "gate.h"

namespace mumoe {
namespace {

struct Options {
  bool layer;
  float alpha, eps;
};

// What lies between the two passes is one thread's work.
template <class S>
constexpr int64_t kTokensInOneCall = std::min<int64_t>(16, kFewTokens<S>);

template <class S>
Tensor few_tokens(const Tensor& z, const std::vector<Tensor>& gates, const std::vector<Tensor>& experts,
                  const Tensor& in_factor, const std::optional<Tensor>& in_bias, const Tensor& out_factor,
                  Options options) {
  int64_t T = z.size(0), I = z.size(1), R = in_factor.size(0), O = out_factor.size(0);
  int64_t total_experts = 0, most_experts = 0;
  for (const Tensor& gate : gates) {
    total_experts += gate.size(0);
    most_experts = std::max(most_experts, gate.size(0));
  }
  int64_t columns = total_experts + R;  // of the first pass: every level's logits, then B
  Scratch scratch(T * (I + columns + R + O) + R + 3 * (most_experts + 16));
  float *x = scratch.data(), *first_pass = x + T * I, *h = first_pass + T * columns, *y_float = h + T * R;
  float *row = y_float + T * O, *solver = row + R;
  Matrix<S> z_rows = matrix<S>(z);
  for (int64_t t = 0; t < T; ++t) rows_of<S>().widen(z_rows[t], I, x + t * I);

  parallel(columns, T * I / 2, [&](int64_t first, int64_t last) {
    int64_t start = 0;
    auto part = [&](const Tensor& weight) {
      int64_t begin = std::max(first - start, int64_t{0}), end = std::min(last - start, weight.size(0));
      if (begin < end) {
        rows_of<S>().dots(x, T, I, data<S>(weight), weight.stride(0), begin, end, first_pass + start, columns);
      }
      start += weight.size(0);
    };
    for (const Tensor& gate : gates) part(gate);
    part(in_factor);
  });

  int32_t* index = reinterpret_cast<int32_t*>(solver + most_experts + 16);
  float* value = solver + 2 * (most_experts + 16);
  for (int64_t t = 0; t < T; ++t) {
    float *s = first_pass + t * columns, *B = s + total_experts, *h_row = h + t * R;
    rows().single.widen(B, R, h_row);
    if (in_bias.has_value()) rows_of<S>().add(data<S>(in_bias), R, 1.0f, h_row);
    for (size_t e = 0; e < gates.size(); ++e) {
      int64_t N = gates[e].size(0);
      float mean, rstd;
      rows().moments(s, nullptr, N, options.eps, &mean, &rstd);
      rows().single.entmax(s, N, options.alpha, options.layer ? rstd : 1.0f, s, solver);
      int64_t count = rows().single.find_nonzero(s, N, index, value);
      rows_of<S>().gather({index, value, count}, data<S>(experts[e]), experts[e].stride(0), R, row);
      rows().single.multiply(row, R, h_row);
      s += N;
    }
  }

  parallel(O, T * R / 2, [&](int64_t first, int64_t last) {
    rows_of<S>().dots(h, T, R, data<S>(out_factor), out_factor.stride(0), first, last, y_float, O);
  });
  Tensor y = empty<S>({T, O});
  rows_of<S>().narrow(y_float, T * O, data<S>(y));
  return y;
}

std::vector<Tensor> with_dense_rows(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> dense;
  for (const Tensor& x : tensors) dense.push_back(mumoe::with_dense_rows(x));
  return dense;
}

bool all_of_dtype(const std::vector<Tensor>& tensors, ScalarType dtype) {
  return std::all_of(tensors.begin(), tensors.end(), [&](const Tensor& x) { return x.scalar_type() == dtype; });
}

Tensor cp_layer(
    Tensor z, std::vector<Tensor> gate_weights, std::vector<Tensor> expert_factors, Tensor in_factor,
    std::optional<Tensor> in_bias, Tensor out_factor, std::string norm, double alpha, double eps) {
  STD_TORCH_CHECK(norm == "layer" || norm == "none", "cp_layer: expected norm layer or none, got ", norm);
  STD_TORCH_CHECK(
      !gate_weights.empty() && gate_weights.size() == expert_factors.size(),
      "cp_layer: expected one gate weight and one expert factor for every level, got ", gate_weights.size(), " and ",
      expert_factors.size());
  std::optional<Tensor> y = with_element(z, [&](auto element) -> std::optional<Tensor> {
    using S = decltype(element);
    if (z.size(0) > kTokensInOneCall<S> || !all_of_dtype(gate_weights, dtype_of<S>)) return std::nullopt;
    std::optional<Tensor> bias = in_bias.has_value() ? std::optional(as_contiguous(*in_bias)) : std::nullopt;
    return few_tokens<S>(
        mumoe::with_dense_rows(z), with_dense_rows(gate_weights), with_dense_rows(expert_factors),
        mumoe::with_dense_rows(in_factor), bias, mumoe::with_dense_rows(out_factor),
        {norm == "layer", static_cast<float>(alpha), static_cast<float>(eps)});
  });
  if (y.has_value()) return *y;
  std::vector<Tensor> coefficients;
  for (const Tensor& weight : gate_weights) {
    coefficients.push_back(gate_forward(z, weight, std::nullopt, norm, alpha, eps));
  }
  return std::get<0>(cp_forward(z, coefficients, expert_factors, in_factor, in_bias, out_factor, "none", false));
}

STABLE_TORCH_LIBRARY_FRAGMENT(mumoe_native, library) {
  library.def(
      "cp_layer(Tensor z, Tensor[] gate_weights, Tensor[] expert_factors, Tensor in_factor, Tensor? in_bias, "
      "Tensor out_factor, *, str norm, float alpha, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mumoe_native, CPU, library) {
  library.impl("cp_layer", TORCH_BOX(&cp_layer));
}

}  // namespace
}  // namespace mumoe
