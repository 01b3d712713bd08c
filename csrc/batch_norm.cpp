// The gate with batch norm, in the pieces between which its statistics can be all-reduced; all in float32.
//
//   s = z Gᵀ;  mean, var over the tokens (two passes);  a = entmax((s − mean) ⊙ rstd)
//   ds = (dmean + 2 dvar ⊙ (s − mean)) / T  of the statistics
//   ds = rstd ⊙ dx̂,  dmean = −Σ_t ds,  drstd = Σ_t dx̂ ⊙ (s − mean)  of entmax, dx̂ its gradient
#include <limits>

#include "columns.h"
#include "gate.h"
#include "gemm.h"

namespace mumoe {

namespace {

std::tuple<Tensor, Tensor> gate_logits_backward(Tensor ds, Tensor z, Tensor weight) {
  return logits_backward(converted(ds, z.scalar_type()), z, weight, true, true);
}

// Run body(t, first, columns) for every token in order, on strips of columns that the threads divide.
template <class Body>
void by_columns(int64_t T, int64_t N, const Body& body) {
  constexpr int64_t strip = 64;
  parallel((N + strip - 1) / strip, T * strip, [&](int64_t first, int64_t last) {
    int64_t begin = first * strip, columns = std::min(last * strip, N) - begin;
    for (int64_t t = 0; t < T; ++t) body(t, begin, begin + columns);
  });
}

std::tuple<Tensor, Tensor> batch_norm_statistics(Tensor s) {
  Tensor dense = with_dense_rows(s);
  Matrix<float> x = matrix<float>(dense);
  Tensor mean = column_sums(x), var = empty<float>({x.columns});
  float *m = data<float>(mean), *v = data<float>(var);
  float share = x.rows == 0 ? std::numeric_limits<float>::quiet_NaN() : 1.0f / static_cast<float>(x.rows);
  for (int64_t n = 0; n < x.columns; ++n) m[n] *= share, v[n] = 0.0f;
  by_columns(x.rows, x.columns, [&](int64_t t, int64_t first, int64_t last) {
    const float* row = x[t];
    for (int64_t n = first; n < last; ++n) v[n] += (row[n] - m[n]) * (row[n] - m[n]);
  });
  for (int64_t n = 0; n < x.columns; ++n) v[n] *= share;
  return {mean, var};
}

Tensor batch_norm_statistics_backward(Tensor dmean, Tensor dvar, Tensor s, Tensor mean) {
  Tensor dense = with_dense_rows(s), mean_row = as_contiguous(mean);
  Tensor dmean_row = as_contiguous(dmean), dvar_row = as_contiguous(dvar);
  Matrix<float> x = matrix<float>(dense);
  Tensor ds = empty<float>({x.rows, x.columns});
  Matrix<float> out = matrix<float>(ds);
  const float *dm = data<float>(dmean_row), *dv = data<float>(dvar_row), *centre = data<float>(mean_row);
  float share = 1.0f / static_cast<float>(x.rows);
  parallel(x.rows, 4 * x.columns, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      for (int64_t n = 0; n < x.columns; ++n) out[t][n] = (dm[n] + 2.0f * dv[n] * (x[t][n] - centre[n])) * share;
    }
  });
  return ds;
}

Tensor batch_entmax_forward(Tensor s, Tensor mean, Tensor rstd, double alpha, ScalarType dtype) {
  Tensor a = empty({s.size(0), s.size(1)}, dtype), dense = with_dense_rows(s);
  Tensor mean_row = as_contiguous(mean), rstd_row = as_contiguous(rstd);
  const float *m = data<float>(mean_row), *r = data<float>(rstd_row);
  with_element(a, [&](auto element) {
    using S = decltype(element);
    Matrix<float> logits = matrix<float>(dense);
    Matrix<S> out = matrix<S>(a);
    int64_t N = logits.columns;
    parallel(logits.rows, 6 * N, [&](int64_t first, int64_t last) {
      Scratch x(N), scratch(N);
      for (int64_t t = first; t < last; ++t) {
        for (int64_t n = 0; n < N; ++n) x.data()[n] = (logits[t][n] - m[n]) * r[n];
        rows_of<S>().entmax_of_logits(x.data(), N, static_cast<float>(alpha), 1.0f, out[t], scratch.data());
      }
    });
  });
  return a;
}

std::tuple<Tensor, Tensor, Tensor> batch_entmax_backward(
    Tensor da, Tensor a, Tensor s, Tensor mean, Tensor rstd, double alpha) {
  int64_t T = s.size(0), N = s.size(1);
  Tensor ds = empty<float>({T, N}), dmean = empty<float>({N}), drstd = empty<float>({N}), dense = with_dense_rows(s);
  Tensor mean_row = as_contiguous(mean), rstd_row = as_contiguous(rstd);
  const float *m = data<float>(mean_row), *r = data<float>(rstd_row);
  float *dm = data<float>(dmean), *dr = data<float>(drstd);
  Matrix<float> logits = matrix<float>(dense), gradient = matrix<float>(ds);
  with_element(a, [&](auto element) {
    using S = decltype(element);
    Tensor upstream = with_dense_rows(da), forward = with_dense_rows(a);
    Matrix<S> da_rows = matrix<S>(upstream), a_rows = matrix<S>(forward);
    parallel(T, 6 * N, [&](int64_t first, int64_t last) {
      Scratch scratch(3 * (N + 16));
      for (int64_t t = first; t < last; ++t) {
        rows_of<S>().entmax_backward_of_logits(
            da_rows[t], a_rows[t], N, static_cast<float>(alpha), gradient[t], scratch.data());
      }
    });
  });
  std::fill_n(dm, N, 0.0f);
  std::fill_n(dr, N, 0.0f);
  by_columns(T, N, [&](int64_t t, int64_t first, int64_t last) {
    float* dx = gradient[t];
    for (int64_t n = first; n < last; ++n) {
      dr[n] += dx[n] * (logits[t][n] - m[n]);
      dx[n] *= r[n];
      dm[n] -= dx[n];
    }
  });
  return {ds, dmean, drstd};
}

STABLE_TORCH_LIBRARY_FRAGMENT(mumoe_native, library) {
  library.def("gate_logits_forward(Tensor z, Tensor weight) -> Tensor");
  library.def("gate_logits_backward(Tensor ds, Tensor z, Tensor weight) -> (Tensor, Tensor)");
  library.def("batch_norm_statistics(Tensor s) -> (Tensor, Tensor)");
  library.def("batch_norm_statistics_backward(Tensor dmean, Tensor dvar, Tensor s, Tensor mean) -> Tensor");
  library.def("batch_entmax_forward(Tensor s, Tensor mean, Tensor rstd, float alpha, ScalarType dtype) -> Tensor");
  library.def(
      "batch_entmax_backward(Tensor da, Tensor a, Tensor s, Tensor mean, Tensor rstd, float alpha)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mumoe_native, CPU, library) {
  library.impl("gate_logits_forward", TORCH_BOX(&gate_logits_forward));
  library.impl("gate_logits_backward", TORCH_BOX(&gate_logits_backward));
  library.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics));
  library.impl("batch_norm_statistics_backward", TORCH_BOX(&batch_norm_statistics_backward));
  library.impl("batch_entmax_forward", TORCH_BOX(&batch_entmax_forward));
  library.impl("batch_entmax_backward", TORCH_BOX(&batch_entmax_backward));
}

}  // namespace

}  // namespace mumoe
