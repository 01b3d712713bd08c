// CP's forward launcher, for the operator of a whole layer.
#pragma once

#include "tensor.h"

namespace mumoe {

std::tuple<Tensor, Tensor, Tensor> cp_forward(
    Tensor z, std::vector<Tensor> coefficients, std::vector<Tensor> expert_factors, Tensor in_factor,
    std::optional<Tensor> in_bias, Tensor out_factor, std::string activation, bool save);

}  // namespace mumoe
