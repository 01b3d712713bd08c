#include "bf16_dots.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdlib>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16")
#endif

namespace mumoe {
namespace {

constexpr int64_t kRows = Bf16Dots::kRows, kColumns = Bf16Dots::kColumns;

uint32_t pair_of(const bfloat16* row, int64_t i, int64_t I) {
  uint32_t high = i + 1 < I ? row[i + 1].bits : 0;
  return high << 16 | row[i].bits;
}

void pack_panel(const bfloat16* W, int64_t ldW, int64_t count, int64_t I, uint32_t* panel) {
  for (int64_t c = 0; c < kColumns; ++c) {
    for (int64_t i = 0; i < I; i += 2) panel[i / 2 * kColumns + c] = c < count ? pair_of(W + c * ldW, i, I) : 0;
  }
}

void pack_tile(const bfloat16* z, int64_t ldz, int64_t count, int64_t I, uint32_t* tile) {
  int64_t pairs = (I + 1) / 2;
  for (int64_t r = 0; r < kRows; ++r) {
    uint32_t* row = tile + r * pairs;
    row[pairs - 1] = 0;
    if (r < count) {
      __builtin_memcpy(row, z + r * ldz, static_cast<size_t>(I) * sizeof(bfloat16));
    } else {
      __builtin_memset(row, 0, static_cast<size_t>(pairs) * sizeof(uint32_t));
    }
  }
}

void multiply(const uint32_t* tile, const uint32_t* panel, int64_t I, int64_t rows, int64_t columns, float* out,
              int64_t ldo) {
  __m512 total[kRows][2];
  int64_t pairs = (I + 1) / 2;
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
  for (int64_t i = 0; i < pairs; ++i) {
    __m512bh left = (__m512bh)_mm512_loadu_si512(panel + i * kColumns);
    __m512bh right = (__m512bh)_mm512_loadu_si512(panel + i * kColumns + 16);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      __m512bh z = (__m512bh)_mm512_set1_epi32(static_cast<int>(tile[r * pairs + i]));
      total[r][0] = _mm512_dpbf16_ps(total[r][0], z, left);
      total[r][1] = _mm512_dpbf16_ps(total[r][1], z, right);
    }
  }
  auto lanes = static_cast<uint32_t>((uint64_t{1} << columns) - 1);
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) continue;
    _mm512_mask_storeu_ps(out + r * ldo, static_cast<__mmask16>(lanes), total[r][0]);
    _mm512_mask_storeu_ps(out + r * ldo + 16, static_cast<__mmask16>(lanes >> 16), total[r][1]);
  }
}

constexpr Bf16Dots kDots = {pack_panel, pack_tile, multiply};

}  // namespace
}  // namespace mumoe

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace mumoe {

const Bf16Dots* bf16_dots() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool has = std::strcmp(rows().name, "avx512") == 0 && __builtin_cpu_supports("avx512bf16");
  if (has) return &kDots;
#endif
  return nullptr;
}

}  // namespace mumoe
