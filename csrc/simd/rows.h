// The functions that run on one row, or on a few, once per instruction set: `rows()` is the best set of this machine.
#pragma once

#include <cstdint>

namespace mumoe {

struct bfloat16 {
  uint16_t bits;
};

enum class Activation : int { none, gelu, gelu_tanh, relu, silu };

// One row's support: `count` experts in ascending order and their coefficients.
struct Support {
  const int32_t* index;
  const float* value;
  int64_t count;
};

// Entries of a row that were found, in ascending order: `count` of them, with room for 16 more than `room`; and a poison,
// zero unless something that was read was NaN or infinite.
struct Candidates {
  int32_t* index;
  float* value;
  int64_t room, count;
  float poison;
};

// Functions that read and write rows of S (float or bfloat16). N, R, I count elements; ld… are row strides.
template <class S>
struct RowsOf {
  // a = entmax(scale·x). scratch holds N + 16 floats.
  void (*entmax)(const S* x, int64_t N, float alpha, float scale, S* a, float* scratch);
  // The same from float32 logits.
  void (*entmax_of_logits)(const float* s, int64_t N, float alpha, float scale, S* a, float* scratch);
  // dx̂ = g ⊙ (da − Σ g·da / Σ g), g = a^{2−α}. Here and below scratch holds 3(N + 16) floats.
  void (*entmax_backward)(const S* da, const S* a, int64_t N, float alpha, S* dx, float* scratch);
  void (*entmax_backward_of_logits)(const S* da, const S* a, int64_t N, float alpha, float* dx, float* scratch);
  // The same, and the row's share of α's gradient, for α > 1.
  float (*learned_entmax_backward)(const S* da, const S* a, int64_t N, float alpha, S* dx, float* scratch);
  // ds = σ⁻¹ (dx̂ − x̂·mean(dx̂ ⊙ x̂)) from the logits s with their mean and σ⁻¹.
  void (*layer_norm_entmax_backward)(
      const S* da, const S* a, const float* s, int64_t N, float alpha, float mean, float rstd, S* ds,
      float* scratch);
  // dx̂ on the support alone; returns mean(dx̂ ⊙ x̂) over the row, which for α > 1 follows from a.
  float (*entmax_backward_on_support)(const S* da, Support support, int64_t N, float alpha, float* dx);

  int64_t (*count_nonzero)(const S* a, int64_t N);
  // index and value have room for N + 16.
  int64_t (*find_nonzero)(const S* a, int64_t N, int32_t* index, float* value);

  // out = Σ_k value[k]·U[index[k]].
  void (*gather)(Support support, const S* U, int64_t ldU, int64_t R, float* out);
  // out[index[k]] = ⟨x, U[index[k]]⟩; nothing else of out is written.
  void (*dot_support)(Support support, const float* x, const S* U, int64_t ldU, int64_t R, S* out);
  // dU[index[k] − first] += value[k]·x for the experts of [first, last).
  void (*scatter)(Support support, int32_t first, int32_t last, const S* x, int64_t R, float* dU, int64_t lddU);

  void (*activate)(const S* z, int64_t n, Activation activation, S* out);
  // dz = dz ⊙ act'(z), in place.
  void (*activate_backward)(const S* z, int64_t n, Activation activation, S* dz);

  // B += bias (unless null) in place, and h = A ⊙ B; h may be B.
  void (*product)(const float* A, S* B, const S* bias, int64_t R, S* h);
  // From one row each of dh, A, B: dA = dh ⊙ B, dB = dh ⊙ A, h = A ⊙ B. dB may be dh.
  void (*product_backward)(const S* dh, const float* A, const S* B, int64_t R, S* dA, S* dB, S* h);

  // One token's matrices: B += bias (unless null) in place, h (P×Q) = A (P×K) · B (K×Q); A_out (A in S) may be null.
  void (*matrix_product)(const float* A, S* B, const S* bias, int64_t P, int64_t K, int64_t Q, S* A_out, S* h);
  // From dh (P×Q): dA = dh·Bᵀ in float32, dB = Aᵀ·dh, h = A·B.
  void (*matrix_product_backward)(
      const S* dh, const S* A, const S* B, int64_t P, int64_t K, int64_t Q, float* dA, S* dB, S* h);

  // From the gradient dv (M×Q) of one token's outer product v = u ⊗ x: du = dv·x and dx += uᵀ·dv, in float32.
  void (*outer_backward)(const S* dv, const float* u, const S* x, int64_t M, int64_t Q, float* du, float* dx);

  // ⟨x, y⟩
  float (*dot)(const S* x, const S* y, int64_t n);

  void (*widen)(const S* x, int64_t n, float* out);
  void (*narrow)(const float* x, int64_t n, S* out);
  // total += weight·x
  void (*add)(const S* x, int64_t n, float weight, float* total);
  // product ⊙= x
  void (*multiply)(const S* x, int64_t n, float* product);

  // out[t·ld_out + r] = ⟨x_t, W_r⟩ for T ≤ 16 rows of x (float32, packed) and rows [first, last) of W.
  void (*dots)(const float* x, int64_t T, int64_t I, const S* W, int64_t ldW, int64_t first, int64_t last, float* out,
               int64_t ld_out);
};

struct Rows {
  const char* name;
  RowsOf<float> single;
  RowsOf<bfloat16> half;
  // Mean of a row of logits after adding bias (unless null) in place, and σ⁻¹ = 1/√(var + eps), by two passes.
  void (*moments)(float* s, const float* bias, int64_t N, float eps, float* mean, float* rstd);
  // Entries of s + bias (s where bias is null) above the threshold, from `first` on until there is no room for more;
  // returns where it stopped.
  int64_t (*find_above)(
      const float* s, const float* bias, int64_t first, int64_t N, float threshold, Candidates* found);
};

const Rows& rows();

template <class S>
const RowsOf<S>& rows_of();
template <>
inline const RowsOf<float>& rows_of<float>() {
  return rows().single;
}
template <>
inline const RowsOf<bfloat16>& rows_of<bfloat16>() {
  return rows().half;
}

}  // namespace mumoe
