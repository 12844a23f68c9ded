// fp8 e4m3 with one float32 scale per block, as DeepSeek-V3's checkpoints have it (section 3.3, figure 7).
#pragma once

#include <cstdint>

namespace r1mega::fp8_block {

constexpr int64_t kBlock = 128;

struct Shape {
  int64_t rows;
  int64_t columns;
  int64_t block_rows;  // kBlock for weights, 1 for activations; a block is always kBlock columns wide
};

// out = round(value * scale); values are fp8 bytes [rows, columns], scales [row blocks, column blocks].
void dequantize_to_float(const uint8_t* values, const float* scales, float* out, Shape shape);
void dequantize_to_bfloat16(const uint8_t* values, const float* scales, uint16_t* out, Shape shape);

// scale = max(largest |x| of the block, 1e-4) / 448, value = round(x / scale): divisions, because a product with
// the reciprocal rounds differently. False where an input is NaN or infinite; outputs are then unspecified.
bool quantize_float(const float* in, uint8_t* values, float* scales, Shape shape);
bool quantize_bfloat16(const uint16_t* in, uint8_t* values, float* scales, Shape shape);

}  // namespace r1mega::fp8_block
