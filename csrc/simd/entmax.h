// α-entmax of a row and its gradient, without a sort.
//
// With x ≤ 0 shifted by its maximum and c = (α−1)x, only entries with c > −1 can be in the support: those candidates
// are compacted once, and every step of the solver runs on them alone. f(τ) = Σ (c − τ)₊^{1/(α−1)} − 1 falls in τ and
// changes sign in [−1, −N^{1−α}]. α = 1.5: the root of the quadratic that f is on the current support, inside that
// bracket; α = 2: the root of the linear function that it is (Michelot); other α: Halley in v = (τ + 1)/(α − 1), which
// keeps the digits that τ loses near α = 1; α = 1: softmax.
#pragma once

// Where a row peaks, or NaN where the row has a NaN or an infinity in it.
template <class In>
MUMOE_INLINE float top_of(const In* x, int64_t N) {
  const float lowest = -std::numeric_limits<float>::infinity();
  Floats top[4], poison[4];  // four of each, because one would wait for itself
  for (int j = 0; j < 4; ++j) top[j] = broadcast(lowest), poison[j] = Floats{};
  int64_t whole = N / (4 * kWidth) * (4 * kWidth);
  for (int64_t n = 0; n < whole; n += 4 * kWidth) {
    for (int j = 0; j < 4; ++j) {
      Floats v = load(x + n + j * kWidth, All{});
      prefetch(x + N + n + j * kWidth);
      poison[j] += v * 0.0f;
      top[j] = larger(v, top[j]);
    }
  }
  sweep(N - whole, [&](int64_t n, auto lanes) {
    Floats v = load(x + whole + n, lanes);
    poison[0] += v * 0.0f;
    top[0] = larger(lanes_or(v, lowest, lanes), top[0]);
  });
  Floats highest = larger(larger(top[0], top[1]), larger(top[2], top[3]));
  return maximum(highest) + sum((poison[0] + poison[1]) + (poison[2] + poison[3]));
}

// Candidates c = (x − top)·factor > floor, padded to whole vectors with what no support can hold; their padded number.
template <class In>
MUMOE_INLINE int64_t compact(const In* x, int64_t N, float top, float factor, float floor, float* candidates) {
  int64_t count = 0;
  sweep(N, [&](int64_t n, auto lanes) {
    Floats c = lanes_or((load(x + n, lanes) - top) * factor, floor, lanes);
    Ints inside = c > floor;
    if (any(inside)) count += compress(candidates + count, c, inside);
  });
  store(candidates + count, broadcast(2.0f * floor), All{});
  return (count + kWidth - 1) / kWidth * kWidth;
}

struct Bracket {
  float low, high;

  // The candidate if it lies inside, else the middle; f is the function's value at `at`, and falls.
  MUMOE_INLINE float narrow_to(Bracket& bracket, float at, float f, float candidate) {
    (f > 0 ? bracket.low : bracket.high) = at;
    bool inside = candidate >= bracket.low && candidate <= bracket.high;
    return inside ? candidate : 0.5f * (bracket.low + bracket.high);
  }
};

constexpr int kMaxSteps = 64;

// τ for α = 1.5 (QUADRATIC) or α = 2.
template <bool QUADRATIC>
MUMOE_INLINE float solve_polynomial(const float* candidates, int64_t count, int64_t N) {
  Bracket bracket{-1.0f, QUADRATIC ? -1.0f / std::sqrt(static_cast<float>(N)) : -1.0f / static_cast<float>(N)};
  float tau = -1.0f;
  for (int step = 0; step < kMaxSteps; ++step) {
    Floats first{}, second{}, members{};
    for (int64_t n = 0; n < count; n += kWidth) {
      Floats d = load(candidates + n, All{}) - tau;
      members += d > 0.0f ? broadcast(1.0f) : Floats{};
      d = d > 0.0f ? d : Floats{};
      first += d;
      second += d * d;
    }
    float k = sum(members), slope = sum(first), f = (QUADRATIC ? sum(second) : slope) - 1.0f;
    float discriminant = slope * slope - k * f;
    float move = QUADRATIC ? (discriminant >= 0 ? f / (slope + std::sqrt(discriminant)) : 2.0f) : f / k;
    float next = Bracket::narrow_to(bracket, tau, f, tau + move);
    float moved = std::fabs(next - tau);
    tau = next;
    if (moved <= 0x1p-22f) break;
  }
  return tau;
}

// What the general family sums at v: a = p^{1/(α−1)} with p = 1 + (α−1)(x − v), a/p and a/p²; zero off the support.
struct General {
  Floats a, slope, curvature;
};

MUMOE_INLINE General general_at(Floats x, float v, float alpha) {
  Floats y = (x - v) * (alpha - 1.0f);
  Ints inside = y > -1.0f;
  y = inside ? y : Floats{};
  Floats a = inside ? exp(log1p(y) * (1.0f / (alpha - 1.0f))) : Floats{};
  Floats slope = a / (1.0f + y);
  return {a, slope, slope / (1.0f + y)};
}

struct GeneralRoot {
  float v, rest;  // the root is v + rest, the rest too small for v's own digits
};

MUMOE_INLINE GeneralRoot solve_general(const float* candidates, int64_t count, int64_t N, float alpha) {
  Bracket bracket{0.0f, -std::expm1((1.0f - alpha) * std::log(static_cast<float>(N))) / (alpha - 1.0f)};
  float v = 0.0f, newton = 0.0f;
  for (int step = 0; step < kMaxSteps; ++step) {
    Floats total{}, slopes{}, curvatures{};
    for (int64_t n = 0; n < count; n += kWidth) {
      General at = general_at(load(candidates + n, All{}), v, alpha);
      total += at.a;
      slopes += at.slope;
      curvatures += at.curvature;
    }
    float f = sum(total) - 1.0f, slope = sum(slopes), curvature = (2.0f - alpha) * sum(curvatures);
    newton = f / slope;
    if (std::fabs(newton) <= 0x1p-20f * std::fmax(1.0f, v)) break;
    float halley = 2.0f * f * slope / (2.0f * slope * slope - f * curvature);
    float next = Bracket::narrow_to(bracket, v, f, v + halley);
    if (next == v) break;
    v = next;
  }
  return {v, newton};
}

template <class In, class Out>
MUMOE_INLINE void softmax(const In* x, int64_t N, float top, float scale, Out* a, float* scratch) {
  Floats totals{}, part{};  // sixteen vectors at a time: one long sum would lose digits on narrow vectors
  sweep(N, [&](int64_t n, auto lanes) {
    Floats e = exp((load(x + n, lanes) - top) * scale);
    part += lanes_or(e, 0.0f, lanes);
    store(scratch + n, e, lanes);
    if (n / kWidth % 16 == 15) totals += part, part = Floats{};
  });
  float total = sum(totals + part);
  sweep(N, [&](int64_t n, auto lanes) { store(a + n, load(scratch + n, lanes) / total, lanes); });
}

template <class In, class Out>
void entmax(const In* x, int64_t N, float alpha, float scale, Out* a, float* scratch) {
  float top = top_of(x, N);
  if (!(top == top)) {
    sweep(N, [&](int64_t n, auto lanes) { store(a + n, broadcast(top), lanes); });
  } else if (alpha == 1.0f) {
    softmax(x, N, top, scale, a, scratch);
  } else if (alpha == 1.5f || alpha == 2.0f) {
    bool quadratic = alpha == 1.5f;
    float factor = scale * (alpha - 1.0f);
    int64_t count = compact(x, N, top, factor, -1.0f, scratch);
    float tau = quadratic ? solve_polynomial<true>(scratch, count, N) : solve_polynomial<false>(scratch, count, N);
    sweep(N, [&](int64_t n, auto lanes) {
      Floats d = (load(x + n, lanes) - top) * factor - tau;
      d = d > 0.0f ? d : Floats{};
      store(a + n, quadratic ? d * d : d, lanes);
    });
  } else {
    int64_t count = compact(x, N, top, scale, -1.0f / (alpha - 1.0f), scratch);
    GeneralRoot root = solve_general(scratch, count, N, alpha);
    sweep(N, [&](int64_t n, auto lanes) {
      General at = general_at((load(x + n, lanes) - top) * scale, root.v, alpha);
      store(a + n, larger(at.a - at.slope * root.rest, Floats{}), lanes);
    });
  }
}

// g = a^{2−α}, zero off the support, NaN where a is.
MUMOE_INLINE Floats power_of_coefficients(Floats a, float alpha) {
  if (alpha == 1.5f) return square_root(a);
  if (alpha == 1.0f) return a;
  if (alpha == 2.0f) return a == 0.0f ? a : 1.0f + a * 0.0f;
  return a < 1.2e-38f ? Floats{} : exp(log(a) * (2.0f - alpha)) + a * 0.0f;
}

// On the support alone: dx, which holds da, becomes dx̂ = g ⊙ (da − Σ g·da / Σ g). Returns Σ dx̂·a/g, which is
// (α−1) Σ dx̂·x̂: (α−1)x̂ = a^{α−1} + τ, τ drops out because Σ dx̂ = 0, and a^{α−1} = a / g.
MUMOE_INLINE float gradient_on_support(const float* a, float* dx, int64_t count, float alpha) {
  Floats weights{}, weighted{}, products{};
  sweep(count, [&](int64_t k, auto lanes) {
    Floats g = power_of_coefficients(load(a + k, lanes), alpha);
    weights += lanes_or(g, 0.0f, lanes);
    weighted += lanes_or(g * load(dx + k, lanes), 0.0f, lanes);
  });
  float centre = sum(weighted) / sum(weights);
  sweep(count, [&](int64_t k, auto lanes) {
    Floats coefficient = load(a + k, lanes), g = power_of_coefficients(coefficient, alpha);
    Floats gradient = g * (load(dx + k, lanes) - centre);
    store(dx + k, gradient, lanes);
    products += coefficient > 0.0f ? gradient * coefficient / g : gradient * 0.0f;
  });
  return sum(products);
}

template <class S>
float entmax_backward_on_support(const S* da, Support support, int64_t N, float alpha, float* dx) {
  for (int64_t k = 0; k < support.count; ++k) dx[k] = scalar(da[support.index[k]]);
  float products = gradient_on_support(support.value, dx, support.count, alpha);
  return products / ((alpha - 1.0f) * static_cast<float>(N));
}

// Gather a row's support from a and da: indices, coefficients and upstream gradients, each with room for N + 16.
template <class S>
MUMOE_INLINE int64_t gather_support(
    const S* da, const S* a, int64_t N, int32_t* index, float* coefficients, float* upstream) {
  int64_t count = 0;
  Ints lane = iota();
  sweep(N, [&](int64_t n, auto lanes) {
    prefetch(a + N + n);
    prefetch(da + N + n);
    Floats coefficient = load(a + n, lanes);
    Ints nonzero = coefficient != 0.0f;
    if (kWidth < 16 && !any(nonzero)) return;
    compress(index + count, lane + static_cast<int32_t>(n), nonzero);
    compress(upstream + count, load(da + n, lanes), nonzero);
    count += compress(coefficients + count, coefficient, nonzero);
  });
  return count;
}

// A row's dx̂ on its support alone, which is gathered into 3(N + 16) floats of scratch.
struct SparseGradient {
  const int32_t* index;
  float* coefficients;
  const float* dx;
  int64_t count;
};

template <class S>
MUMOE_INLINE SparseGradient sparse_gradient(const S* da, const S* a, int64_t N, float alpha, float* scratch) {
  int32_t* index = reinterpret_cast<int32_t*>(scratch);
  float* coefficients = scratch + N + 16;
  float* dx = coefficients + N + 16;
  int64_t count = gather_support(da, a, N, index, coefficients, dx);
  gradient_on_support(coefficients, dx, count, alpha);
  return {index, coefficients, dx, count};
}

template <class Out>
MUMOE_INLINE void write_row(SparseGradient gradient, int64_t N, Out* dx) {
  sweep(N, [&](int64_t n, auto lanes) { store(dx + n, Floats{}, lanes); });
  for (int64_t k = 0; k < gradient.count; ++k) assign(dx + gradient.index[k], gradient.dx[k]);
}

template <class S, class Out>
void entmax_backward(const S* da, const S* a, int64_t N, float alpha, Out* dx, float* scratch) {
  write_row(sparse_gradient(da, a, N, alpha, scratch), N, dx);
}

// −∂a/∂α by g at a threshold v that stays: with β = α − 1, u = −β log a and L = −log a
//
//   ℓ = (1 − (1 + u)e^{−u})/β² = L² ψ(u),  ψ(u) = ½ − u/3 + u²/8 − … = Σ_{k ≥ 2} (−1)^k (k−1)/k! u^{k−2}
//
// whose digits do not depend on how near α is to 1.
MUMOE_INLINE Floats alpha_slope(Floats a, float beta) {
  Floats L = -log(a), u = beta * L;
  Floats series = broadcast(-2.5052108e-7f);
  series = series * u + 2.4801587e-6f;
  series = series * u - 2.2045855e-5f;
  series = series * u + 1.7361111e-4f;
  series = series * u - 1.1904762e-3f;
  series = series * u + 6.9444444e-3f;
  series = series * u - 3.3333333e-2f;
  series = series * u + 0.125f;
  series = series * u - 0.33333333f;
  series = series * u + 0.5f;
  Floats closed = (1.0f - (1.0f + u) * exp(-u)) / (u * u);
  return L * L * (u > 1.0f ? closed : series);
}

// v moves with α so that Σ a stays 1: by just what the centre in dx̂ takes off da. So dα = −Σ dx̂·ℓ, here with ℓ less its
// mean under g: Σ dx̂ = 0 but for rounding, and where a row is flat ℓ is all mean.
template <class S>
float learned_entmax_backward(const S* da, const S* a, int64_t N, float alpha, S* dx, float* scratch) {
  SparseGradient gradient = sparse_gradient(da, a, N, alpha, scratch);
  write_row(gradient, N, dx);
  float* slopes = gradient.coefficients;
  Floats weights{}, weighted{}, total{};
  sweep(gradient.count, [&](int64_t k, auto lanes) {
    Floats coefficient = load(gradient.coefficients + k, lanes);
    Floats g = power_of_coefficients(coefficient, alpha), slope = alpha_slope(coefficient, alpha - 1.0f);
    store(slopes + k, slope, lanes);
    weights += lanes_or(g, 0.0f, lanes);
    weighted += lanes_or(g * slope, 0.0f, lanes);
  });
  float mean = sum(weighted) / sum(weights);
  sweep(gradient.count, [&](int64_t k, auto lanes) {
    total -= lanes_or(load(gradient.dx + k, lanes) * (load(slopes + k, lanes) - mean), 0.0f, lanes);
  });
  return sum(total);
}

// ds = σ⁻¹(dx̂ − x̂·c) in a row where x̂ = (s − mean)σ⁻¹.
template <class S>
void layer_norm_entmax_backward(
    const S* da, const S* a, const float* s, int64_t N, float alpha, float mean, float rstd, S* ds, float* scratch) {
  auto [index, coefficients, dx, count] = sparse_gradient(da, a, N, alpha, scratch);
  float products = 0.0f;
  for (int64_t k = 0; k < count; ++k) products += dx[k] * (s[index[k]] - mean);
  float correlation = rstd * rstd * products / static_cast<float>(N);
  sweep(N, [&](int64_t n, auto lanes) {
    store(ds + n, (load(s + n, lanes) - mean) * (-rstd * correlation), lanes);
  });
  for (int64_t k = 0; k < count; ++k) {
    assign(ds + index[k], rstd * (dx[k] - (s[index[k]] - mean) * correlation));
  }
}

void moments(float* s, const float* bias, int64_t N, float eps, float* mean, float* rstd) {
  Floats totals{}, squares{};
  sweep(N, [&](int64_t n, auto lanes) {
    Floats x = load(s + n, lanes);
    if (bias != nullptr) {
      x += load(bias + n, lanes);
      store(s + n, x, lanes);
    }
    totals += x;
  });
  *mean = sum(totals) / static_cast<float>(N);
  sweep(N, [&](int64_t n, auto lanes) {
    Floats centred = lanes_or(load(s + n, lanes) - *mean, 0.0f, lanes);
    squares += centred * centred;
  });
  *rstd = 1.0f / std::sqrt(sum(squares) / static_cast<float>(N) + eps);
}
