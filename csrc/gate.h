// The gate's launchers, for the operator of a whole layer.
#pragma once

#include "tensor.h"

namespace mumoe {

Tensor gate_forward(
    Tensor z, Tensor weight, std::optional<Tensor> bias, std::string norm, double alpha, double eps);

// s (T, N) in float32 of z (T, I) and weight (N, I), which is rounded to z's dtype first.
Tensor gate_logits_forward(Tensor z, Tensor weight);

// dz (T, I) in z's dtype and dweight (N, I) in float32, each undefined where it is not needed.
std::tuple<Tensor, Tensor> logits_backward(
    const Tensor& ds, const Tensor& z, const Tensor& weight, bool needs_z, bool needs_weight);

}  // namespace mumoe
