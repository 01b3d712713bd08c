// Logits: by ATen's GEMM in float32, or by dot products that keep float32 for bfloat16, whose GEMM would round them, and for
// few tokens.
#include "logits.h"

#include "gemm.h"
#include "simd/bf16_dots.h"

namespace mumoe {

namespace {

constexpr int64_t kRows = Bf16Dots::kRows, kColumns = Bf16Dots::kColumns;
constexpr int64_t kFewHalfTokens = 4 * kRows;  // up to which packing the whole weight does not pay

}  // namespace

std::optional<Tensor> logits_bias(const std::optional<Tensor>& bias, ScalarType dtype) {
  if (!bias.has_value()) return std::nullopt;
  Tensor row = as_contiguous(*bias);
  return converted(converted(view(row, {1, row.size(0)}, {row.size(0), 1}), dtype), ScalarType::Float);
}

Logits::Logits(const Tensor& weight, ScalarType dtype, int64_t tokens) : N_(weight.size(0)), I_(weight.size(1)) {
  Tensor rounded = with_dense_rows(converted(weight, dtype));
  if (dtype != ScalarType::BFloat16 || tokens <= kFewHalfTokens) {
    weight_ = rounded;
    return;
  }
  if (bf16_dots() == nullptr) {
    weight_ = converted(rounded, ScalarType::Float);
    return;
  }
  Matrix<bfloat16> W = matrix<bfloat16>(rounded);
  int64_t count = (N_ + kColumns - 1) / kColumns, words = Bf16Dots::panel_words(I_);
  panels_.resize(static_cast<size_t>(count * words));
  parallel(count, words, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      int64_t n = p * kColumns;
      bf16_dots()->pack_panel(W[n], W.stride, std::min(kColumns, N_ - n), I_, panels_.data() + p * words);
    }
  });
}

Tensor Logits::of(const Tensor& z) const {
  if (!panels_.empty()) return by_bf16_dots(z);
  return weight_.scalar_type() == ScalarType::BFloat16 ? linear_by_rows<bfloat16>(z, weight_)
                                                       : linear(converted(z, ScalarType::Float), weight_);
}

Tensor Logits::by_bf16_dots(const Tensor& z) const {
  Tensor dense = with_dense_rows(z), s = empty<float>({z.size(0), N_});
  Matrix<bfloat16> tokens = matrix<bfloat16>(dense);
  Matrix<float> out = matrix<float>(s);
  int64_t words = Bf16Dots::panel_words(I_);
  parallel((tokens.rows + kRows - 1) / kRows, kRows * N_ * I_ / 32, [&](int64_t first, int64_t last) {
    std::vector<uint32_t> tile(static_cast<size_t>(Bf16Dots::tile_words(I_)));
    for (int64_t b = first; b < last; ++b) {
      int64_t t = b * kRows, count = std::min(kRows, tokens.rows - t);
      bf16_dots()->pack_tile(tokens[t], tokens.stride, count, I_, tile.data());
      for (int64_t n = 0; n < N_; n += kColumns) {
        const uint32_t* panel = panels_.data() + n / kColumns * words;
        bf16_dots()->multiply(tile.data(), panel, I_, count, std::min(kColumns, N_ - n), out[t] + n, out.stride);
      }
    }
  });
  return s;
}

}  // namespace mumoe
