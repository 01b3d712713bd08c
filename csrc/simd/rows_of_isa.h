// The table of row functions of one instruction set. A source file defines MUMOE_ISA (a namespace) and MUMOE_WIDTH,
// sets the compiler's target and includes this.

namespace mumoe {
namespace MUMOE_ISA {
namespace {

#include "vector.h"

#include "entmax.h"
#include "experts.h"
#include "topk.h"

#include "bilinear.h"

template <class S>
constexpr RowsOf<S> table() {
  return {
      .entmax = entmax<S, S>,
      .entmax_of_logits = entmax<float, S>,
      .entmax_backward = entmax_backward<S, S>,
      .entmax_backward_of_logits = entmax_backward<S, float>,
      .learned_entmax_backward = learned_entmax_backward<S>,
      .layer_norm_entmax_backward = layer_norm_entmax_backward<S>,
      .entmax_backward_on_support = entmax_backward_on_support<S>,
      .count_nonzero = count_nonzero<S>,
      .find_nonzero = find_nonzero<S>,
      .gather = gather<S>,
      .dot_support = dot_support<S>,
      .scatter = scatter<S>,
      .activate = activate<S>,
      .activate_backward = activate_backward<S>,
      .product = product<S>,
      .product_backward = product_backward<S>,
      .matrix_product = matrix_product<S>,
      .matrix_product_backward = matrix_product_backward<S>,
      .outer_backward = outer_backward<S>,
      .dot = dot<S>,
      .widen = widen_row<S>,
      .narrow = narrow_row<S>,
      .add = add<S>,
      .multiply = multiply<S>,
      .dots = dots<S>,
  };
}

}  // namespace

extern const Rows kRows;
const Rows kRows = {MUMOE_ISA_NAME, table<float>(), table<bfloat16>(), moments, find_above};

}  // namespace MUMOE_ISA
}  // namespace mumoe
