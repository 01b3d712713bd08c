// entmax_forward, entmax_backward: α-entmax over the rows of a matrix.
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

Tensor entmax_backward(Tensor da, Tensor a, double alpha) {
  return with_element(a, [&](auto element) {
    using S = decltype(element);
    Tensor upstream = with_dense_rows(da), forward = with_dense_rows(a), dx = empty<S>({a.size(0), a.size(1)});
    Matrix<S> da_rows = matrix<S>(upstream), a_rows = matrix<S>(forward), dx_rows = matrix<S>(dx);
    parallel(a_rows.rows, 4 * a_rows.columns, [&](int64_t first, int64_t last) {
      Scratch scratch(3 * (a_rows.columns + 16));
      for (int64_t t = first; t < last; ++t) {
        rows_of<S>().entmax_backward(
            da_rows[t], a_rows[t], a_rows.columns, static_cast<float>(alpha), dx_rows[t], scratch.data());
      }
    });
    return dx;
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(mumoe_native, library) {
  library.def("entmax_forward(Tensor x, float alpha) -> Tensor");
  library.def("entmax_backward(Tensor da, Tensor a, float alpha) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mumoe_native, CPU, library) {
  library.impl("entmax_forward", TORCH_BOX(&entmax_forward));
  library.impl("entmax_backward", TORCH_BOX(&entmax_backward));
}

}  // namespace
}  // namespace mumoe
