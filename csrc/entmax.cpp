// entmax_forward, entmax_backward: α-entmax over the rows of a matrix; learned_… take α as a tensor and give its gradient.
#include <numeric>

#include "tensor.h"

namespace mumoe {
namespace {

Tensor entmax_forward(Tensor x, double alpha) {
  return with_element(x, [&](auto element) {
    using S = decltype(element);
    Tensor source = with_dense_rows(x), a = empty<S>({x.size(0), x.size(1)});
    Matrix<S> from = matrix<S>(source), to = matrix<S>(a);
    parallel(from.rows, 4 * from.columns, [&](int64_t first, int64_t last) {
      Scratch scratch(from.columns);
      for (int64_t t = first; t < last; ++t) {
        rows_of<S>().entmax(from[t], from.columns, static_cast<float>(alpha), 1.0f, to[t], scratch.data());
      }
    });
    return a;
  });
}

// dx (T, N) row by row: body(t, da, a, N, dx, scratch), all but t and N rows.
template <class S, class Body>
Tensor gradient_by_rows(const Tensor& da, const Tensor& a, Body body) {
  Tensor upstream = with_dense_rows(da), forward = with_dense_rows(a), dx = empty<S>({a.size(0), a.size(1)});
  Matrix<S> da_rows = matrix<S>(upstream), a_rows = matrix<S>(forward), dx_rows = matrix<S>(dx);
  parallel(a_rows.rows, 4 * a_rows.columns, [&](int64_t first, int64_t last) {
    Scratch scratch(3 * (a_rows.columns + 16));
    for (int64_t t = first; t < last; ++t) body(t, da_rows[t], a_rows[t], a_rows.columns, dx_rows[t], scratch.data());
  });
  return dx;
}

Tensor entmax_backward(Tensor da, Tensor a, double alpha) {
  return with_element(a, [&](auto element) {
    using S = decltype(element);
    return gradient_by_rows<S>(da, a, [&](int64_t, const S* da, const S* a, int64_t N, S* dx, float* scratch) {
      rows_of<S>().entmax_backward(da, a, N, static_cast<float>(alpha), dx, scratch);
    });
  });
}

// A learned α, kept off 1, where the general form has no meaning.
double value_of(const Tensor& alpha) {
  double value;
  TORCH_ERROR_CODE_CHECK(aoti_torch_item_float64(alpha.get(), &value));
  return value < 1 + 1e-6 ? 1 + 1e-6 : value;
}

Tensor learned_entmax_forward(Tensor x, Tensor alpha) {
  return entmax_forward(x, value_of(alpha));
}

std::tuple<Tensor, Tensor> learned_entmax_backward(Tensor da, Tensor a, Tensor alpha) {
  return with_element(a, [&](auto element) -> std::tuple<Tensor, Tensor> {
    using S = decltype(element);
    float value = static_cast<float>(value_of(alpha));
    std::vector<float> shares(static_cast<size_t>(a.size(0)));
    auto body = [&](int64_t t, const S* da, const S* a, int64_t N, S* dx, float* scratch) {
      shares[t] = rows_of<S>().learned_entmax_backward(da, a, N, value, dx, scratch);
    };
    Tensor dx = gradient_by_rows<S>(da, a, body), dalpha = empty<float>({});
    *data<float>(dalpha) = static_cast<float>(std::accumulate(shares.begin(), shares.end(), 0.0));
    return {dx, dalpha};
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(mumoe_native, library) {
  library.def("entmax_forward(Tensor x, float alpha) -> Tensor");
  library.def("entmax_backward(Tensor da, Tensor a, float alpha) -> Tensor");
  library.def("learned_entmax_forward(Tensor x, Tensor alpha) -> Tensor");
  library.def("learned_entmax_backward(Tensor da, Tensor a, Tensor alpha) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mumoe_native, CPU, library) {
  library.impl("entmax_forward", TORCH_BOX(&entmax_forward));
  library.impl("entmax_backward", TORCH_BOX(&entmax_backward));
  library.impl("learned_entmax_forward", TORCH_BOX(&learned_entmax_forward));
  library.impl("learned_entmax_backward", TORCH_BOX(&learned_entmax_backward));
}

}  // namespace
}  // namespace mumoe
