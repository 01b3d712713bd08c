// Float32 logits of float32 or bfloat16 tokens: s = z Gᵀ, with G rounded to z's dtype first.
#pragma once

#include "tensor.h"

namespace mumoe {

// Tokens whose float32 logits over N experts stay near the cores, but enough of them for a GEMM.
inline int64_t logits_chunk(int64_t N) {
  return std::max<int64_t>(256, (int64_t{8} << 20) / (4 * std::max<int64_t>(N, 1)));
}

// A bias (N,) of the logits as it takes part: rounded to z's dtype, then a row in float32.
std::optional<Tensor> logits_bias(const std::optional<Tensor>& bias, ScalarType dtype);

class Logits {
 public:
  // weight (N, I) in any dtype; z's dtype and, at most, how many tokens will come.
  Logits(const Tensor& weight, ScalarType dtype, int64_t tokens);

  // s (T, N) in float32 for z (T, I).
  Tensor of(const Tensor& z) const;

 private:
  Tensor by_bf16_dots(const Tensor& z) const;

  int64_t N_, I_;
  Tensor weight_;                 // in float32 where ATen multiplies, as it is for few tokens
  std::vector<uint32_t> panels_;  // else packed for bf16_dots
};

}  // namespace mumoe
