// Vectors of MUMOE_WIDTH floats in GCC's and Clang's vector extensions, and the few functions of them that the row
// functions need. Included once per instruction set, inside the namespace of that instruction set.
#pragma once

constexpr int kWidth = MUMOE_WIDTH;

typedef float Floats __attribute__((vector_size(kWidth * 4)));
typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Words __attribute__((vector_size(kWidth * 4)));
typedef uint16_t Halves __attribute__((vector_size(kWidth * 2)));

#define MUMOE_INLINE static inline __attribute__((always_inline))

// How many lanes of a vector take part: all of them, known at compile time, or the `count` first.
struct All {
  static constexpr int count = kWidth;
};
struct First {
  int count;
};

MUMOE_INLINE Floats broadcast(float x) {
  return Floats{} + x;
}

MUMOE_INLINE Floats widen(Halves h) {
  return (Floats)(__builtin_convertvector(h, Words) << 16);
}

// Round to nearest even; a NaN stays one although its payload may not fit.
MUMOE_INLINE Halves narrow(Floats x) {
  Words bits = (Words)x;
  Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector((Words)(x == x ? (Ints)rounded : Ints{} + 0x7fc0), Halves);
}

MUMOE_INLINE Floats load(const float* p, All) {
  Floats x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

MUMOE_INLINE Floats load(const bfloat16* p, All) {
  Halves h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(h);
}

MUMOE_INLINE void store(float* p, Floats x, All) {
  __builtin_memcpy(p, &x, sizeof x);
}

MUMOE_INLINE void store(bfloat16* p, Floats x, All) {
  Halves h = narrow(x);
  __builtin_memcpy(p, &h, sizeof h);
}

// Lanes beyond the count load as zero and are not stored: a partial vector touches no memory past its end.
#if MUMOE_WIDTH == 16
MUMOE_INLINE __mmask16 mask_of(First lanes) {
  return static_cast<__mmask16>((1u << lanes.count) - 1);
}

MUMOE_INLINE Floats load(const float* p, First lanes) {
  return (Floats)_mm512_maskz_loadu_ps(mask_of(lanes), p);
}

MUMOE_INLINE Floats load(const bfloat16* p, First lanes) {
  return widen((Halves)_mm256_maskz_loadu_epi16(mask_of(lanes), p));
}

MUMOE_INLINE void store(float* p, Floats x, First lanes) {
  _mm512_mask_storeu_ps(p, mask_of(lanes), (__m512)x);
}

MUMOE_INLINE void store(bfloat16* p, Floats x, First lanes) {
  _mm256_mask_storeu_epi16(p, mask_of(lanes), (__m256i)narrow(x));
}
#else
MUMOE_INLINE Floats load(const float* p, First lanes) {
  Floats x{};
  for (int i = 0; i < lanes.count; ++i) x[i] = p[i];
  return x;
}

MUMOE_INLINE Floats load(const bfloat16* p, First lanes) {
  Halves h{};
  for (int i = 0; i < lanes.count; ++i) h[i] = p[i].bits;
  return widen(h);
}

MUMOE_INLINE void store(float* p, Floats x, First lanes) {
  for (int i = 0; i < lanes.count; ++i) p[i] = x[i];
}

MUMOE_INLINE void store(bfloat16* p, Floats x, First lanes) {
  Halves h = narrow(x);
  for (int i = 0; i < lanes.count; ++i) p[i].bits = h[i];
}
#endif

// Call body(i, lanes) for every vector of 0 … n.
template <class Body>
MUMOE_INLINE void sweep(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) body(i, All{});
  if (i < n) body(i, First{static_cast<int>(n - i)});
}

#if MUMOE_WIDTH == 16
MUMOE_INLINE Floats larger(Floats x, Floats y) {
  return (Floats)_mm512_max_ps((__m512)x, (__m512)y);
}

MUMOE_INLINE float sum(Floats x) {
  return _mm512_reduce_add_ps((__m512)x);
}

MUMOE_INLINE int32_t sum(Ints x) {
  return _mm512_reduce_add_epi32((__m512i)x);
}

MUMOE_INLINE float maximum(Floats x) {
  return _mm512_reduce_max_ps((__m512)x);
}
#else
MUMOE_INLINE Floats larger(Floats x, Floats y) {
  return x > y ? x : y;
}

template <class Vector>
MUMOE_INLINE auto sum(Vector x) {
  auto total = x[0];
  for (int i = 1; i < kWidth; ++i) total += x[i];
  return total;
}

MUMOE_INLINE float maximum(Floats x) {
  float top = x[0];
  for (int i = 1; i < kWidth; ++i) top = x[i] > top ? x[i] : top;
  return top;
}
#endif

MUMOE_INLINE bool any(Ints mask) {
#if MUMOE_WIDTH == 16
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

// Write the lanes of x where the mask holds, side by side, and garbage up to a whole vector after them; their number.
#if MUMOE_WIDTH == 16
MUMOE_INLINE int compress(float* out, Floats x, Ints mask) {
  __mmask16 lanes = _mm512_movepi32_mask((__m512i)mask);
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(lanes, (__m512)x));
  return __builtin_popcount(lanes);
}

MUMOE_INLINE int compress(int32_t* out, Ints x, Ints mask) {
  __mmask16 lanes = _mm512_movepi32_mask((__m512i)mask);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(lanes, (__m512i)x));
  return __builtin_popcount(lanes);
}
#else
template <class Element, class Vector>
MUMOE_INLINE int compress(Element* out, Vector x, Ints mask) {
  int count = 0;
  for (int i = 0; i < kWidth; ++i) {
    out[count] = x[i];
    count -= mask[i];
  }
  return count;
}
#endif

// The next row, most likely, while this one is worked on: prefetching never faults, wherever it points.
template <class S>
MUMOE_INLINE void prefetch(const S* p) {
  __builtin_prefetch(p);
}

MUMOE_INLINE Ints iota() {
  Ints index{};
  for (int i = 0; i < kWidth; ++i) index[i] = i;
  return index;
}

MUMOE_INLINE Floats lanes_or(Floats x, float, All) {
  return x;
}

// x, with `other` in the lanes that take no part.
MUMOE_INLINE Floats lanes_or(Floats x, float other, First lanes) {
  return iota() < lanes.count ? x : broadcast(other);
}

MUMOE_INLINE Floats square_root(Floats x) {
#if MUMOE_WIDTH == 16
  return (Floats)_mm512_sqrt_ps((__m512)x);
#elif MUMOE_WIDTH == 8
  return (Floats)_mm256_sqrt_ps((__m256)x);
#else
  Floats y;
  for (int i = 0; i < kWidth; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
#endif
}

MUMOE_INLINE Floats absolute(Floats x) {
  return (Floats)((Words)x & 0x7fffffffu);
}

// x between low and high; NaN stays NaN.
MUMOE_INLINE Floats clamped(Floats x, float low, float high) {
  x = x < low ? broadcast(low) : x;
  return x > high ? broadcast(high) : x;
}

constexpr float kToInteger = 12582912.0f;  // 1.5·2²³: adding it rounds to an integer in the low bits

// 2^x to 1–2 units in the last place; what lies outside [2^−126, 2^128) is moved to its ends, NaN stays NaN.
MUMOE_INLINE Floats exp2(Floats x) {
  x = clamped(x, -126.0f, 127.998f);
  Floats shifted = x + kToInteger;
  Floats r = x - (shifted - kToInteger);
  Floats p = broadcast(1.5370705e-4f);
  p = p * r + 1.3399848e-3f;
  p = p * r + 9.6183736e-3f;
  p = p * r + 5.5503290e-2f;
  p = p * r + 2.4022648e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  return (Floats)((Words)p + ((Words)shifted << 23));
}

// 2^x for x in [−126, 127] to 3e-6: enough for what is rounded to bfloat16.
MUMOE_INLINE Floats rough_exp2(Floats x) {
  Floats shifted = x + kToInteger;
  Floats r = x - (shifted - kToInteger);
  Floats p = broadcast(0.0095701003f);
  p = p * r + 0.05591786f;
  p = p * r + 0.24024744f;
  p = p * r + 0.6931218f;
  p = p * r + 0.9999993f;
  return (Floats)((Words)p + ((Words)shifted << 23));
}

MUMOE_INLINE Floats exp(Floats x) {
  Ints too_large = x > 88.72f;
  x = clamped(x, -87.3f, 88.72f);
  Floats shifted = x * 1.44269504f + kToInteger;
  Floats n = shifted - kToInteger;
  Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: n times the first is exact
  Floats p = broadcast(1.9875691e-4f);
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 0.5f;
  p = 1.0f + (r + r * r * p);
  Floats y = (Floats)((Words)p + ((Words)shifted << 23));
  return too_large ? broadcast(std::numeric_limits<float>::infinity()) : y;
}

// log(x) for normal x > 0, to about 1e-7 relative to max(1, |log x|).
MUMOE_INLINE Floats log(Floats x) {
  Words bits = (Words)x;
  Ints exponent = (Ints)((bits - 0x3f3504f3u) >> 23);  // so that the mantissa lies in [√½, √2)
  exponent = (exponent << 24) >> 24;
  Floats m = (Floats)(bits - ((Words)exponent << 23));
  Floats f = m - 1.0f;
  Floats s = f / (m + 1.0f);
  Floats z = s * s;
  Floats p = broadcast(0.23675093f);
  p = p * z + 0.28531662f;
  p = p * z + 0.40000442f;
  p = p * z + 0.66666663f;
  Floats r = 2.0f * s + s * (z * p);
  Floats e = __builtin_convertvector(exponent, Floats);
  return e * 0.693359375f + (e * -2.12194440e-4f + r);
}

// log(1 + y) for y > −1, keeping the digits of a small y.
MUMOE_INLINE Floats log1p(Floats y) {
  Floats u = 1.0f + y;
  Floats lost = y - (u - 1.0f);
  return log(u) + lost / u;
}

// The normal distribution's Φ(x) = erfc(−x/√2)/2, erfc(u) = 2^(−u·P(u)) with P fitted on [0, 6.5], beyond which it is
// zero in float32's terms. For float: to 3e-8 absolute, and 3e-4 relative in the lower tail.
MUMOE_INLINE Floats normal_cdf(Floats x, float) {
  Floats u = absolute(x) * 0.70710678f;
  Ints far = u > 6.5f;
  u = far ? broadcast(6.5f) : u;
  Floats p = broadcast(-1.1655360765416845e-07f);
  p = p * u + 3.2403736440755893e-06f;
  p = p * u - 3.883105455315672e-05f;
  p = p * u + 0.0002639237209223211f;
  p = p * u - 0.0011037403019145131f;
  p = p * u + 0.0026270090602338314f;
  p = p * u - 0.00037853658432140946f;
  p = p * u - 0.0275801382958889f;
  p = p * u + 0.1482689529657364f;
  p = p * u + 0.9184479117393494f;
  p = p * u + 1.6279070377349854f;
  Floats tail = far ? Floats{} : 0.5f * exp2(-u * p);
  return x < 0.0f ? tail : 1.0f - tail;
}

// The same for bfloat16, to 3e-5 relative in the lower tail down to x = −4 and 1e-4 to −6.
MUMOE_INLINE Floats normal_cdf(Floats x, bfloat16) {
  Floats u = absolute(x) * 0.70710678f;
  Ints far = u > 6.5f;
  u = far ? broadcast(6.5f) : u;
  Floats p = broadcast(1.3944931e-05f);
  p = p * u - 0.0003834108f;
  p = p * u + 0.004581369f;
  p = p * u - 0.031945687f;
  p = p * u + 0.1493988f;
  p = p * u + 0.91923976f;
  p = p * u + 1.627543f;
  Floats tail = far ? Floats{} : 0.5f * rough_exp2(-u * p);
  return x < 0.0f ? tail : 1.0f - tail;
}

// exp(−x²/2)/√(2π)
MUMOE_INLINE Floats normal_density(Floats x, float) {
  return 0.39894228f * exp(-0.5f * x * x);
}

MUMOE_INLINE Floats normal_density(Floats x, bfloat16) {
  return 0.39894228f * rough_exp2(larger(x * x * -0.72134752f, broadcast(-126.0f)));
}

MUMOE_INLINE float scalar(float x) {
  return x;
}

MUMOE_INLINE float scalar(bfloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}

MUMOE_INLINE void assign(float* p, float x) {
  *p = x;
}

MUMOE_INLINE void assign(bfloat16* p, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  p->bits = x == x ? static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : 0x7fc0;
}
