// What Tucker's and the full layer's backward run on one token's row between the GEMMs.
#pragma once

// du[m] = ⟨dv_m, x⟩ and dx += u[m]·dv_m for ROWS rows of dv, each of which is read once.
template <int ROWS, class S>
MUMOE_INLINE void outer_rows_backward(const S* dv, const float* u, const S* x, int64_t Q, float* du, float* dx) {
  Floats total[ROWS] = {};
  sweep(Q, [&](int64_t q, auto lanes) {
    Floats v = load(x + q, lanes), sum_dx = load(dx + q, lanes);
    for (int j = 0; j < ROWS; ++j) {
      Floats upstream = load(dv + j * Q + q, lanes);
      total[j] += upstream * v;
      sum_dx += u[j] * upstream;
    }
    store(dx + q, sum_dx, lanes);
  });
  for (int j = 0; j < ROWS; ++j) du[j] = sum(total[j]);
}

template <class S>
void outer_backward(const S* dv, const float* u, const S* x, int64_t M, int64_t Q, float* du, float* dx) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4) outer_rows_backward<4>(dv + m * Q, u + m, x, Q, du + m, dx);
  for (; m < M; ++m) outer_rows_backward<1>(dv + m * Q, u + m, x, Q, du + m, dx);
}

template <class S>
float dot(const S* x, const S* y, int64_t n) {
  Floats total{};
  sweep(n, [&](int64_t i, auto lanes) { total += load(x + i, lanes) * load(y + i, lanes); });
  return sum(total);
}
