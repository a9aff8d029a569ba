// What kernels read: matrices in few bits or in a float type, as jmoe/quant lays them out. Pointers are checked by
// those who make a view (ffi_*.cpp), never here.
#pragma once

#include <cstdint>

namespace jmoe {

// Inlined in every instruction set's own code: a copy that the linker shared among them might be one that this
// processor cannot run.
#define JMOE_INLINE inline __attribute__((always_inline))

enum class FloatType : int32_t { kBFloat16 = 0, kFloat32 = 1 };

JMOE_INLINE int64_t size_of(FloatType type) { return type == FloatType::kBFloat16 ? 2 : 4; }

// Floats somewhere: rows of a matrix, or activations. Row-major and contiguous.
struct FloatView {
  const void* data;
  FloatType type;
};

// A matrix [rows, columns] in few bits: weight = (code - zero point) * scale, by groups of a row.
// quant/formats.py and quant/packing.py say what the arrays hold.
struct QuantView {
  int64_t rows;
  int64_t columns;
  int32_t bits;        // 2, 3, 4, 8
  int32_t group_size;  // a power of two from 16 to 256, which divides columns
  const uint8_t* codes;
  const void* scales;   // uint8 codes if nested, else bfloat16
  const void* zeros;    // the same; null if symmetric: the zero point is 2^(bits-1)
  const float* nested;  // [rows, num_nested, 4 or 2]; null if scales are bfloat16
  int32_t num_nested;   // of a row
  int32_t nested_size;  // groups that share one of them: num_groups() / num_nested

  JMOE_INLINE int64_t num_groups() const { return columns / group_size; }
  JMOE_INLINE int64_t row_bytes() const { return columns * bits / 8; }
};

// A matrix [rows, columns] of floats.
struct DenseView {
  int64_t rows;
  int64_t columns;
  FloatView values;
};

}  // namespace jmoe
