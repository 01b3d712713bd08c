// Float32 logits of float32 or bfloat16 tokens: s = z Gᵀ, with G rounded to z's dtype first.
#pragma once

#include "tensor.h"

namespace mumoe {

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
