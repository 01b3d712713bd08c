// bfloat16 dot products kept in float32, by AVX-512 BF16: what a GEMM of bfloat16 matrices computes before it rounds.
#pragma once

#include <cstdint>

#include "rows.h"

namespace mumoe {

struct Bf16Dots {
  static constexpr int64_t kRows = 12, kColumns = 32;  // of a tile: its 24 accumulators stay in registers

  // Words (pairs of bfloat16) of a panel of kColumns rows of W (·, I), and of a tile of kRows rows of z.
  static int64_t panel_words(int64_t I) {
    return (I + 1) / 2 * kColumns;
  }
  static int64_t tile_words(int64_t I) {
    return (I + 1) / 2 * kRows;
  }

  // Rows [0, count) of W, pair by pair side by side; the rest of the panel is zero.
  void (*pack_panel)(const bfloat16* W, int64_t ldW, int64_t count, int64_t I, uint32_t* panel);
  // Rows [0, count) of z, one after the other; the rest of the tile is zero.
  void (*pack_tile)(const bfloat16* z, int64_t ldz, int64_t count, int64_t I, uint32_t* tile);
  // out[r·ldo + c] = ⟨tile row r, panel row c⟩ for r < rows and c < columns.
  void (*multiply)(
      const uint32_t* tile, const uint32_t* panel, int64_t I, int64_t rows, int64_t columns, float* out, int64_t ldo);
};

// Null where the machine has no such instructions.
const Bf16Dots* bf16_dots();

}  // namespace mumoe
