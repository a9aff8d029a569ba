// Matrices in few bits as calls give them.
#pragma once

#include <cstdint>

#include "ffi_common.h"

namespace jmoe {

// A matrix in few bits, but for its rows: what its arrays look like.
struct QuantFormat {
  int32_t bits;
  int32_t group_size;
  bool symmetric;
  bool nested;
  int64_t columns;

  int64_t num_groups() const { return columns / group_size; }
  int64_t code_bytes() const { return columns * bits / 8; }  // of a row
  ffi::DataType parameter_type() const { return nested ? ffi::DataType::U8 : ffi::DataType::BF16; }  // scales, zeros
  int64_t nested_width() const { return symmetric ? 2 : 4; }
};

// Where they are; null if the format has no such array.
struct QuantArrays {
  const void* codes;   // [rows, code_bytes]
  const void* scales;  // [rows, num_groups]
  const void* zeros;   // the same
  const void* nested;  // [rows, num_nested, nested_width], float32
};

inline QuantFormat check_format(int64_t bits, int64_t group_size, int64_t symmetric, int64_t nested, int64_t columns) {
  require(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits is not 2, 3, 4 or 8");
  require(group_size >= 16 && group_size <= 256 && (group_size & (group_size - 1)) == 0,
          "group_size is not a power of two from 16 to 256");
  // A group's third bits would be half a lane of 32 bits.
  require(bits != 3 || group_size >= 32, "3 bits in groups of 16 have no kernel");
  require((symmetric == 0 || symmetric == 1) && (nested == 0 || nested == 1), "a flag is not 0 or 1");
  require(columns > 0 && columns % group_size == 0, "the group size does not divide the columns");
  return {static_cast<int32_t>(bits), static_cast<int32_t>(group_size), symmetric == 1, nested == 1, columns};
}

// num_nested: second-level parameters of a row; 0 if the format is not nested.
inline void check_num_nested(const QuantFormat& format, int64_t num_nested) {
  require(format.nested ? num_nested > 0 && format.num_groups() % num_nested == 0 : num_nested == 0,
          "nested does not divide the groups");
}

// Of checked parts.
inline QuantView quant_view(const QuantFormat& format, int64_t rows, int64_t num_nested, const QuantArrays& arrays) {
  QuantView view{};
  view.rows = rows;
  view.columns = format.columns;
  view.bits = format.bits;
  view.group_size = format.group_size;
  view.codes = static_cast<const uint8_t*>(arrays.codes);
  view.scales = arrays.scales;
  view.zeros = arrays.zeros;
  view.nested = static_cast<const float*>(arrays.nested);
  view.num_nested = static_cast<int32_t>(num_nested);
  view.nested_size = format.nested ? static_cast<int32_t>(format.num_groups() / num_nested) : 0;
  return view;
}

inline void check_activation_bits(int64_t bits) {
  require(bits == 8 || bits == 16 || bits == 24, "activation_bits is not 8, 16 or 24");
}

}  // namespace jmoe
