// Matrix products by ATen, and which of its GEMMs computes them in float32.
#pragma once

#include "tensor.h"

namespace mumoe {

// X·Y for matrices of one dtype (any strides), in a new matrix.
Tensor gemm(const Tensor& X, const Tensor& Y);

// X·Y into memory that is there.
void gemm_into(const Tensor& out, const Tensor& X, const Tensor& Y);

// Tokens up to which dot products with every row of a weight, read once, beat a GEMM, which lays it out anew.
template <class S>
constexpr int64_t kFewTokens = 128;
template <>
inline constexpr int64_t kFewTokens<bfloat16> = 4;  // its GEMM has instructions of its own

// X·Wᵀ in float32 for few rows of X and a weight of S with dense rows.
template <class S>
Tensor linear_by_rows(const Tensor& X, const Tensor& W);

// X·Wᵀ, as a linear layer keeps its weight.
Tensor linear(const Tensor& X, const Tensor& W);

// x in another dtype (itself where it has it).
Tensor converted(const Tensor& x, ScalarType dtype);

}  // namespace mumoe
