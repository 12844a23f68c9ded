#include "fp8_block/fp8_block.h"

#include <algorithm>
#include <cstring>

// One binary for every x86: the loader picks the widest copy that the machine runs.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif

namespace r1mega::fp8_block {
namespace {

constexpr uint32_t kInfinity = 0x7f800000u;

template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline uint32_t float_bits(float value) { return bits<uint32_t>(value); }
inline uint32_t float_bits(uint32_t value) { return value; }
inline uint32_t float_bits(uint16_t bfloat16) { return static_cast<uint32_t>(bfloat16) << 16; }

// Without a sign, floats are ordered as their bits are, NaN above infinity.
inline uint32_t magnitude(float value) { return bits<uint32_t>(value) & 0x7fffffffu; }
inline uint16_t magnitude(uint16_t bfloat16) { return bfloat16 & 0x7fffu; }

// A select without a branch: compilers do not turn one over floats into vector code (an operation might trap).
inline uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

inline float from_fp8(uint8_t byte) {
  const uint32_t magnitude = byte & 0x7fu;
  const uint32_t normal = (magnitude << 20) + (120u << 23);  // exponent bias 7 -> 127
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f;
  uint32_t result = select(magnitude < 8u, bits<uint32_t>(subnormal), normal);
  result = select(magnitude == 0x7fu, 0x7fc00000u, result);
  return bits<float>(result | static_cast<uint32_t>(byte & 0x80u) << 24);
}

// Round to nearest, ties to even; |value| < 464. Added to 2^(e + 20), a number with exponent e keeps the three bits after its
// first one, rounded as the processor rounds: they and the first are the sum's last bits. Below 2^-6, the smallest normal,
// steps stay as they are there.
inline uint8_t to_fp8(float value) {
  const uint32_t all = bits<uint32_t>(value), magnitude = all & 0x7fffffffu;
  const uint32_t exponent = std::max(magnitude & 0x7f800000u, 121u << 23);
  const float sum = bits<float>(magnitude) + bits<float>(exponent + (20u << 23));
  const uint32_t result = bits<uint32_t>(sum) + (exponent >> 20) - (121u << 3);
  return static_cast<uint8_t>((result & 0x7fu) | (all >> 24 & 0x80u));
}

inline void store(float value, float* out) { *out = value; }

// Right for every number, and for a NaN whose mantissa's lower bits are zero, as those here are.
inline void store(float value, uint16_t* out) {
  const uint32_t all = bits<uint32_t>(value);
  *out = static_cast<uint16_t>((all + 0x7fffu + (all >> 16 & 1u)) >> 16);
}

template <typename Out>
__attribute__((always_inline)) inline void dequantize(const uint8_t* values, const float* scales, Out* out,
                                                      Shape shape) {
  const int64_t blocks = (shape.columns + kBlock - 1) / kBlock;
  for (int64_t row = 0; row < shape.rows; ++row) {
    const float* row_scales = scales + row / shape.block_rows * blocks;
    const uint8_t* from = values + row * shape.columns;
    Out* to = out + row * shape.columns;
    for (int64_t block = 0; block < blocks; ++block) {
      const float given = row_scales[block], scale = given == given ? given : bits<float>(0x7fc00000u);
      const int64_t start = block * kBlock, end = std::min(start + kBlock, shape.columns);
      for (int64_t i = start; i < end; ++i) store(from_fp8(from[i]) * scale, to + i);
    }
  }
}

// Several blocks beside each other are read before they are written: long enough stretches
// of a row for the processor to foresee, few enough to stay in its cache.
template <typename In>
__attribute__((always_inline)) inline bool quantize(const In* in, uint8_t* values, float* scales,
                                                    Shape shape) {
  constexpr int64_t kTogether = 4 * kBlock;
  using Magnitude = decltype(magnitude(In{}));
  for (int64_t top = 0; top < shape.rows; top += shape.block_rows) {
    const int64_t bottom = std::min(top + shape.block_rows, shape.rows);
    for (int64_t left = 0; left < shape.columns; left += kTogether) {
      const int64_t width = std::min(kTogether, shape.columns - left);
      Magnitude largest_of_column[kTogether] = {};
      for (int64_t row = top; row < bottom; ++row) {
        const In* from = in + row * shape.columns + left;
        for (int64_t i = 0; i < width; ++i) {
          largest_of_column[i] = std::max(largest_of_column[i], magnitude(from[i]));
        }
      }
      float* scales_here = scales;
      for (int64_t start = 0; start < width; start += kBlock) {
        const int64_t end = std::min(start + kBlock, width);
        Magnitude largest = 0;
        for (int64_t i = start; i < end; ++i) largest = std::max(largest, largest_of_column[i]);
        if (float_bits(largest) >= kInfinity) return false;
        *scales++ = std::max(bits<float>(float_bits(largest)), 1e-4f) / 448.0f;
      }
      for (int64_t row = top; row < bottom; ++row) {
        const In* from = in + row * shape.columns + left;
        uint8_t* to = values + row * shape.columns + left;
        for (int64_t start = 0; start < width; start += kBlock) {
          const int64_t end = std::min(start + kBlock, width);
          const float scale = scales_here[start / kBlock];
          for (int64_t i = start; i < end; ++i) to[i] = to_fp8(bits<float>(float_bits(from[i])) / scale);
        }
      }
    }
  }
  return true;
}

}  // namespace

WIDEST void dequantize_to_float(const uint8_t* values, const float* scales, float* out, Shape shape) {
  dequantize(values, scales, out, shape);
}

WIDEST void dequantize_to_bfloat16(const uint8_t* values, const float* scales, uint16_t* out, Shape shape) {
  dequantize(values, scales, out, shape);
}

WIDEST bool quantize_float(const float* in, uint8_t* values, float* scales, Shape shape) {
  return quantize(in, values, scales, shape);
}

WIDEST bool quantize_bfloat16(const uint16_t* in, uint8_t* values, float* scales, Shape shape) {
  return quantize(in, values, scales, shape);
}

}  // namespace r1mega::fp8_block
