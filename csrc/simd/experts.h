// What runs on one token's row between the GEMMs of an expert layer: gathers and scatters of the support's experts,
// activations, the products over the expert mode, and dot products for few tokens.
#pragma once

// Call body.operator()<VECTORS>(r, lanes) for strips of 8, 4, 2 and 1 vectors, which stay in registers, that cover 0 … R.
template <class Body>
MUMOE_INLINE void strips(int64_t R, Body body) {
  int64_t r = 0;
  for (; r + 8 * kWidth <= R; r += 8 * kWidth) body.template operator()<8>(r, All{});
  if (r + 4 * kWidth <= R) body.template operator()<4>(r, All{}), r += 4 * kWidth;
  if (r + 2 * kWidth <= R) body.template operator()<2>(r, All{}), r += 2 * kWidth;
  if (r + kWidth <= R) body.template operator()<1>(r, All{}), r += kWidth;
  if (r < R) body.template operator()<1>(r, First{static_cast<int>(R - r)});
}

template <class S>
int64_t count_nonzero(const S* a, int64_t N) {
  Ints count{};
  sweep(N, [&](int64_t n, auto lanes) { count -= load(a + n, lanes) != 0.0f; });
  return sum(count);
}

template <class S>
int64_t find_nonzero(const S* a, int64_t N, int32_t* index, float* value) {
  int64_t count = 0;
  Ints lane = iota();
  sweep(N, [&](int64_t n, auto lanes) {
    Floats v = load(a + n, lanes);
    Ints nonzero = v != 0.0f;
    if (!any(nonzero)) return;
    compress(index + count, lane + static_cast<int32_t>(n), nonzero);
    count += compress(value + count, v, nonzero);
  });
  return count;
}

template <class S>
void gather(Support support, const S* U, int64_t ldU, int64_t R, float* out) {
  strips(R, [&]<int VECTORS>(int64_t r, auto lanes) {
    Floats total[VECTORS] = {};
    for (int64_t k = 0; k < support.count; ++k) {
      const S* row = U + support.index[k] * ldU + r;
      float value = support.value[k];
      for (int j = 0; j < VECTORS; ++j) total[j] += value * load(row + j * kWidth, lanes);
    }
    for (int j = 0; j < VECTORS; ++j) store(out + r + j * kWidth, total[j], lanes);
  });
}

template <int EXPERTS, class S>
MUMOE_INLINE void dot_experts(const int32_t* index, const float* x, const S* U, int64_t ldU, int64_t R, S* out) {
  Floats total[EXPERTS] = {};
  sweep(R, [&](int64_t r, auto lanes) {
    Floats v = load(x + r, lanes);
    for (int j = 0; j < EXPERTS; ++j) total[j] += v * load(U + index[j] * ldU + r, lanes);
  });
  for (int j = 0; j < EXPERTS; ++j) store(out + index[j], broadcast(sum(total[j])), First{1});
}

template <class S>
void dot_support(Support support, const float* x, const S* U, int64_t ldU, int64_t R, S* out) {
  int64_t k = 0;
  for (; k + 4 <= support.count; k += 4) dot_experts<4>(support.index + k, x, U, ldU, R, out);
  for (; k < support.count; ++k) dot_experts<1>(support.index + k, x, U, ldU, R, out);
}

template <class S>
void scatter(Support support, int32_t first, int32_t last, const S* x, int64_t R, float* dU, int64_t lddU) {
  const int32_t* begin = support.index;
  const int32_t* end = support.index + support.count;
  while (begin < end && *begin < first) ++begin;
  while (begin < end && end[-1] >= last) --end;
  strips(R, [&]<int VECTORS>(int64_t r, auto lanes) {
    Floats row[VECTORS];
    for (int j = 0; j < VECTORS; ++j) row[j] = load(x + r + j * kWidth, lanes);
    for (const int32_t* expert = begin; expert < end; ++expert) {
      float value = support.value[expert - support.index];
      float* total = dU + (*expert - first) * lddU + r;
      for (int j = 0; j < VECTORS; ++j) {
        store(total + j * kWidth, load(total + j * kWidth, lanes) + value * row[j], lanes);
      }
    }
  });
}

// The slopes are constant in float32 beyond |x| = 20, where their factors would overflow against each other.
MUMOE_INLINE Floats near_zero(Floats x) {
  return clamped(x, -20.0f, 20.0f);
}

// S is what the results are stored as.
template <class S>
struct Gelu {
  MUMOE_INLINE Floats value(Floats x) {
    return x * normal_cdf(x, S{});
  }
  MUMOE_INLINE Floats slope(Floats x) {
    x = near_zero(x);
    return normal_cdf(x, S{}) + x * normal_density(x, S{});
  }
};

// x·σ(2k) with k = √(2/π)(x + 0.044715x³), which is ½x(1 + tanh k).
struct GeluTanh {
  MUMOE_INLINE Floats sigmoid_of_2k(Floats x) {
    return 1.0f / (1.0f + exp(x * (-1.5957691f - 0.071354816f * x * x)));
  }
  MUMOE_INLINE Floats value(Floats x) {
    return x * sigmoid_of_2k(x);
  }
  MUMOE_INLINE Floats slope(Floats x) {
    x = near_zero(x);
    Floats s = sigmoid_of_2k(x);
    return s + x * s * (1.0f - s) * (1.5957691f + 0.21406445f * x * x);
  }
};

struct Relu {
  MUMOE_INLINE Floats value(Floats x) {
    return x < 0.0f ? Floats{} : x;
  }
  MUMOE_INLINE Floats slope(Floats x) {
    return x > 0.0f ? broadcast(1.0f) : x * 0.0f;
  }
};

struct Silu {
  MUMOE_INLINE Floats value(Floats x) {
    return x / (1.0f + exp(-x));
  }
  MUMOE_INLINE Floats slope(Floats x) {
    x = near_zero(x);
    Floats s = 1.0f / (1.0f + exp(-x));
    return s + x * s * (1.0f - s);
  }
};

template <class S, class Body>
MUMOE_INLINE void with(Activation activation, Body body) {
  switch (activation) {
    case Activation::gelu: return body(Gelu<S>{});
    case Activation::gelu_tanh: return body(GeluTanh{});
    case Activation::relu: return body(Relu{});
    case Activation::silu: return body(Silu{});
    case Activation::none: return;
  }
}

template <class S>
void activate(const S* z, int64_t n, Activation activation, S* out) {
  with<S>(activation, [&](auto f) {
    sweep(n, [&](int64_t i, auto lanes) { store(out + i, f.value(load(z + i, lanes)), lanes); });
  });
}

template <class S>
void activate_backward(const S* z, int64_t n, Activation activation, S* dz) {
  with<S>(activation, [&](auto f) {
    sweep(n, [&](int64_t i, auto lanes) {
      store(dz + i, load(dz + i, lanes) * f.slope(load(z + i, lanes)), lanes);
    });
  });
}

template <class S>
MUMOE_INLINE void add_bias(S* B, const S* bias, int64_t n) {
  if (bias == nullptr) return;
  sweep(n, [&](int64_t i, auto lanes) { store(B + i, load(B + i, lanes) + load(bias + i, lanes), lanes); });
}

template <class S>
MUMOE_INLINE void narrow_row(const float* x, int64_t n, S* out) {
  sweep(n, [&](int64_t i, auto lanes) { store(out + i, load(x + i, lanes), lanes); });
}

template <class S>
void product(const float* A, S* B, const S* bias, int64_t R, S* h) {
  add_bias(B, bias, R);
  sweep(R, [&](int64_t r, auto lanes) { store(h + r, load(A + r, lanes) * load(B + r, lanes), lanes); });
}

template <class S>
void product_backward(const S* dh, const float* A, const S* B, int64_t R, S* dA, S* dB, S* h) {
  sweep(R, [&](int64_t r, auto lanes) {
    Floats a = load(A + r, lanes), b = load(B + r, lanes), upstream = load(dh + r, lanes);
    store(dA + r, upstream * b, lanes);
    store(dB + r, upstream * a, lanes);
    store(h + r, a * b, lanes);
  });
}

// out rows p … p + ROWS of X·Y, X (·×K) read with strides, Y (K×Q).
template <int ROWS, class S, class X>
MUMOE_INLINE void matrix_rows(X x, const S* Y, int64_t K, int64_t Q, S* out) {
  sweep(Q, [&](int64_t q, auto lanes) {
    Floats total[ROWS] = {};
    for (int64_t k = 0; k < K; ++k) {
      Floats y = load(Y + k * Q + q, lanes);
      for (int j = 0; j < ROWS; ++j) total[j] += x(j, k) * y;
    }
    for (int j = 0; j < ROWS; ++j) store(out + j * Q + q, total[j], lanes);
  });
}

// out (P×Q) = X·Y, X (P×K) by x(p, k).
template <class S, class X>
MUMOE_INLINE void matrix_by_rows(X x, const S* Y, int64_t P, int64_t K, int64_t Q, S* out) {
  int64_t p = 0;
  for (; p + 4 <= P; p += 4) {
    matrix_rows<4>([&](int64_t j, int64_t k) { return x(p + j, k); }, Y, K, Q, out + p * Q);
  }
  for (; p < P; ++p) matrix_rows<1>([&](int64_t, int64_t k) { return x(p, k); }, Y, K, Q, out + p * Q);
}

template <class S>
void matrix_product(const float* A, S* B, const S* bias, int64_t P, int64_t K, int64_t Q, S* A_out, S* h) {
  add_bias(B, bias, K * Q);
  if (A_out != nullptr) narrow_row(A, P * K, A_out);
  matrix_by_rows([&](int64_t p, int64_t k) { return A[p * K + k]; }, B, P, K, Q, h);
}

// dA (ROWS×COLUMNS of it) = dh·Bᵀ.
template <int ROWS, int COLUMNS, class S>
MUMOE_INLINE void outer_dots(const S* dh, const S* B, int64_t Q, float* dA, int64_t K) {
  Floats total[ROWS][COLUMNS] = {};
  sweep(Q, [&](int64_t q, auto lanes) {
    Floats b[COLUMNS];
    for (int k = 0; k < COLUMNS; ++k) b[k] = load(B + k * Q + q, lanes);
    for (int p = 0; p < ROWS; ++p) {
      Floats upstream = load(dh + p * Q + q, lanes);
      for (int k = 0; k < COLUMNS; ++k) total[p][k] += upstream * b[k];
    }
  });
  for (int p = 0; p < ROWS; ++p) {
    for (int k = 0; k < COLUMNS; ++k) dA[p * K + k] = sum(total[p][k]);
  }
}

template <class S>
void matrix_product_backward(
    const S* dh, const S* A, const S* B, int64_t P, int64_t K, int64_t Q, float* dA, S* dB, S* h) {
  for (int64_t p = 0; p < P;) {
    bool rows = p + 4 <= P;
    for (int64_t k = 0; k < K;) {
      bool columns = k + 4 <= K;
      const S* upstream = dh + p * Q;
      const S* b = B + k * Q;
      float* out = dA + p * K + k;
      if (rows && columns) outer_dots<4, 4>(upstream, b, Q, out, K);
      else if (rows) outer_dots<4, 1>(upstream, b, Q, out, K);
      else if (columns) outer_dots<1, 4>(upstream, b, Q, out, K);
      else outer_dots<1, 1>(upstream, b, Q, out, K);
      k += columns ? 4 : 1;
    }
    p += rows ? 4 : 1;
  }
  matrix_by_rows([&](int64_t k, int64_t p) { return scalar(A[p * K + k]); }, dh, K, P, Q, dB);
  matrix_by_rows([&](int64_t p, int64_t k) { return scalar(A[p * K + k]); }, B, P, K, Q, h);
}

template <class S>
void widen_row(const S* x, int64_t n, float* out) {
  sweep(n, [&](int64_t i, auto lanes) { store(out + i, load(x + i, lanes), lanes); });
}

template <class S>
void add(const S* x, int64_t n, float weight, float* total) {
  sweep(n, [&](int64_t i, auto lanes) {
    store(total + i, load(total + i, lanes) + weight * load(x + i, lanes), lanes);
  });
}

template <class S>
void multiply(const S* x, int64_t n, float* product) {
  sweep(n, [&](int64_t i, auto lanes) { store(product + i, load(product + i, lanes) * load(x + i, lanes), lanes); });
}

// Rows r … r + ROWS of W against TOKENS rows of x.
template <int ROWS, int TOKENS, class S>
MUMOE_INLINE void dot_block(const float* x, int64_t I, const S* W, int64_t ldW, float* out, int64_t ld_out) {
  Floats total[ROWS][TOKENS] = {};
  sweep(I, [&](int64_t i, auto lanes) {
    Floats tokens[TOKENS];
    for (int t = 0; t < TOKENS; ++t) tokens[t] = load(x + t * I + i, lanes);
    for (int r = 0; r < ROWS; ++r) {
      Floats w = load(W + r * ldW + i, lanes);
      for (int t = 0; t < TOKENS; ++t) total[r][t] += w * tokens[t];
    }
  });
  for (int r = 0; r < ROWS; ++r) {
    for (int t = 0; t < TOKENS; ++t) out[t * ld_out + r] = sum(total[r][t]);
  }
}

template <class S>
void dots(const float* x, int64_t T, int64_t I, const S* W, int64_t ldW, int64_t first, int64_t last, float* out,
          int64_t ld_out) {
  int64_t r = first;
  if (T == 1) {
    for (; r + 8 <= last; r += 8) dot_block<8, 1>(x, I, W + r * ldW, ldW, out + r, ld_out);
  }
  for (; r + 4 <= last; r += 4) {
    int64_t t = 0;
    for (; t + 4 <= T; t += 4) dot_block<4, 4>(x + t * I, I, W + r * ldW, ldW, out + t * ld_out + r, ld_out);
    for (; t < T; ++t) dot_block<4, 1>(x + t * I, I, W + r * ldW, ldW, out + t * ld_out + r, ld_out);
  }
  for (; r < last; ++r) {
    for (int64_t t = 0; t < T; ++t) dot_block<1, 1>(x + t * I, I, W + r * ldW, ldW, out + t * ld_out + r, ld_out);
  }
}
