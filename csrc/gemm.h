// Matrix products by ATen, and which of its GEMMs computes them in float32.
#pragma once

#include "tensor.h"

namespace mumoe {

// X·Y for matrices of one dtype (any strides), in a new matrix.
Tensor gemm(const Tensor& X, const Tensor& Y);

// X·Y into memory that is there.
void gemm_into(const Tensor& out, const Tensor& X, const Tensor& Y);

// X·Wᵀ, as a linear layer keeps its weight.
inline Tensor linear(const Tensor& X, const Tensor& W) {
  return gemm(X, transposed(W));
}

// x in another dtype (itself where it has it).
Tensor converted(const Tensor& x, ScalarType dtype);

}  // namespace mumoe
