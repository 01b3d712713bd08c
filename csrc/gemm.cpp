// GEMMs: at::mm, which is public, or in float32 oneDNN's linear layer, which is private and for some products faster than MKL
// on machines that are not Intel's. `set_gemm` chooses for each kind of product; the choice, its measurement and its
// check are the caller's.
#include "gemm.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <atomic>

namespace mumoe {

namespace {

// X Wᵀ, X W and Xᵀ Y: a linear layer, its input's gradient, its weight's gradient.
enum Kind { linear_layer, input_gradient, weight_gradient, kinds };
std::array<std::atomic<bool>, kinds> use_onednn{};

Kind kind_of(const Tensor& X, const Tensor& Y) {
  if (X.stride(1) != 1) return weight_gradient;
  return Y.stride(1) != 1 ? linear_layer : input_gradient;
}

// oneDNN falls into a reference implementation for anything but dense matrices and their transposes.
bool is_dense(const Tensor& x) {
  int64_t rows = x.size(0), columns = x.size(1);
  return (x.stride(1) == 1 && x.stride(0) == columns) || (x.stride(0) == 1 && x.stride(1) == rows);
}

Tensor dense(const Tensor& x) {
  return is_dense(x) ? x : torch::stable::contiguous(x);
}

Tensor onednn_linear(const Tensor& X, const Tensor& W) {
  namespace abi = torch::stable::detail;
  const std::vector<double> no_scalars;
  std::array<StableIValue, 6> stack{
      abi::from(X),
      abi::from(W),
      abi::from(std::nullopt),
      abi::from(std::string("none")),
      abi::from(no_scalars),
      abi::from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

bool runs_on_onednn(const Tensor& X, const Tensor& Y) {
  return X.scalar_type() == ScalarType::Float && use_onednn[kind_of(X, Y)] && X.size(0) > 1 && X.numel() > 0 && Y.numel() > 0;
}

void set_gemm(std::vector<std::string> names) {
  STD_TORCH_CHECK(names.size() == kinds, "set_gemm: expected a name for each of ", int{kinds}, " kinds of product");
  for (const std::string& name : names) {
    STD_TORCH_CHECK(name == "aten" || name == "onednn", "set_gemm: expected aten or onednn, got ", name);
  }
  for (size_t kind = 0; kind < names.size(); ++kind) use_onednn[kind] = names[kind] == "onednn";
}

std::string instruction_set() {
  return rows().name;
}

}  // namespace

Tensor gemm(const Tensor& X, const Tensor& Y) {
  if (runs_on_onednn(X, Y)) return onednn_linear(dense(X), transposed(dense(Y)));
  Tensor out = empty({X.size(0), Y.size(1)}, X.scalar_type());
  gemm_into(out, X, Y);
  return out;
}

template <class S>
Tensor linear_by_rows(const Tensor& X, const Tensor& W) {
  int64_t T = X.size(0), I = X.size(1), R = W.size(0);
  Tensor x = as_contiguous(converted(X, ScalarType::Float)), sums = empty<float>({T, R});
  parallel(R, T * I / 2, [&](int64_t first, int64_t last) {
    rows_of<S>().dots(data<float>(x), T, I, data<S>(W), W.stride(0), first, last, data<float>(sums), R);
  });
  return sums;
}

template Tensor linear_by_rows<float>(const Tensor& X, const Tensor& W);
template Tensor linear_by_rows<bfloat16>(const Tensor& X, const Tensor& W);

Tensor linear(const Tensor& X, const Tensor& W) {
  return with_element(X, [&](auto element) {
    using S = decltype(element);
    bool by_rows = X.size(0) <= kFewTokens<S> && (W.stride(1) == 1 || W.size(1) <= 1);
    return by_rows ? converted(linear_by_rows<S>(X, W), dtype_of<S>) : gemm(X, transposed(W));
  });
}

void gemm_into(const Tensor& out, const Tensor& X, const Tensor& Y) {
  if (runs_on_onednn(X, Y)) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_copy_(out.get(), onednn_linear(dense(X), transposed(dense(Y))).get(), /*non_blocking=*/0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), X.get(), Y.get()));
  }
}

Tensor converted(const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() == dtype) return x;
  Tensor dense_x = with_dense_rows(x), out = empty({x.size(0), x.size(1)}, dtype);
  int64_t columns = x.size(1);
  parallel(x.size(0), columns, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      if (dtype == ScalarType::Float) {
        rows().half.widen(matrix<bfloat16>(dense_x)[t], columns, matrix<float>(out)[t]);
      } else {
        rows().half.narrow(matrix<float>(dense_x)[t], columns, matrix<bfloat16>(out)[t]);
      }
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(mumoe_native, library) {
  library.def("set_gemm(str[] names) -> ()");
  library.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mumoe_native, CompositeExplicitAutograd, library) {
  library.impl("set_gemm", TORCH_BOX(&set_gemm));
  library.impl("instruction_set", TORCH_BOX(&instruction_set));
}

}  // namespace mumoe
