// Tensors as the operators see them: PyTorch's stable ABI, and rows of S behind a pointer and a stride.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "simd/rows.h"

namespace mumoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class S>
constexpr ScalarType dtype_of = ScalarType::Float;
template <>
inline constexpr ScalarType dtype_of<bfloat16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType dtype_of<int64_t> = ScalarType::Long;

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[8], stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes.begin()[d], 1);
  }
  int32_t code = dtype == ScalarType::Float  ? aoti_torch_dtype_float32()
                 : dtype == ScalarType::Long ? aoti_torch_dtype_int64()
                                             : aoti_torch_dtype_bfloat16();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class S>
Tensor empty(std::initializer_list<int64_t> sizes) {
  return empty(sizes, dtype_of<S>);
}

inline bool defined(const Tensor& x) {
  bool is_defined;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(x.get(), &is_defined));
  return is_defined;
}

// A view of x's memory, `offset` elements after x's own first one (and so after its storage offset, which is added).
inline Tensor view(
    const Tensor& x, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, int64_t offset = 0) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      x.get(), static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(), offset, &handle));
  return Tensor(handle);
}

inline Tensor transposed(const Tensor& x) {
  return view(x, {x.size(1), x.size(0)}, {x.stride(1), x.stride(0)});
}

// Rows [first, last) of a matrix.
inline Tensor row_range(const Tensor& x, int64_t first, int64_t last) {
  return view(x, {last - first, x.size(1)}, {x.stride(0), x.stride(1)}, first * x.stride(0));
}

inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// Columns [first, last) of a matrix.
inline Tensor column_range(const Tensor& x, int64_t first, int64_t last) {
  return view(x, {x.size(0), last - first}, {x.stride(0), x.stride(1)}, first * x.stride(1));
}

// A matrix whose rows are dense: x itself where they are.
inline Tensor with_dense_rows(const Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

template <class S>
struct Matrix {
  S* data;
  int64_t rows, columns, stride;

  S* operator[](int64_t row) const {
    return data + row * stride;
  }
};

// The rows of a matrix with dense rows.
template <class S>
Matrix<S> matrix(const Tensor& x) {
  return {static_cast<S*>(x.data_ptr()), x.size(0), x.size(1), x.stride(0)};
}

template <class S>
S* data(const Tensor& x) {
  return static_cast<S*>(x.data_ptr());
}

template <class S>
const S* data(const std::optional<Tensor>& x) {
  return x.has_value() ? static_cast<const S*>(x->data_ptr()) : nullptr;
}

// Call body with a float or a bfloat16 for x's dtype.
template <class Body>
auto with_element(const Tensor& x, Body body) {
  ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
      "mumoe_native: expected float32 or bfloat16, got another dtype");
  return dtype == ScalarType::Float ? body(float{}) : body(bfloat16{});
}

// Memory of a thread's own for rows in between, with room for one vector more.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(static_cast<size_t>(floats) + 16) {}
  float* data() {
    return memory_.data();
  }

 private:
  std::vector<float> memory_;
};

// Run body(first, last) over 0 … n in parallel, in pieces that are worth handing out: an item takes about `cost` steps.
template <class Body>
void parallel(int64_t n, int64_t cost, const Body& body) {
  constexpr int64_t grain = 1 << 15;
  if (n > 0) torch::stable::parallel_for(0, n, std::max<int64_t>(1, grain / std::max<int64_t>(cost, 1)), body);
}

}  // namespace mumoe
