// Formats of matrices as calls give them.
#pragma once

#include <cstdint>

#include "ffi_common.h"

namespace jmoe {

struct MatrixFormat {
  int32_t bits;
  int32_t group_size;
};

inline MatrixFormat check_format(int64_t bits, int64_t group_size, int64_t symmetric, int64_t nested,
                                 int64_t columns) {
  require(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits is not 2, 3, 4 or 8");
  require(group_size >= 16 && group_size <= 256 && (group_size & (group_size - 1)) == 0,
          "group_size is not a power of two from 16 to 256");
  // A group's third bits would be half a lane of 32 bits.
  require(bits != 3 || group_size >= 32, "3 bits in groups of 16 have no kernel");
  require((symmetric == 0 || symmetric == 1) && (nested == 0 || nested == 1), "a flag is not 0 or 1");
  require(columns > 0 && columns % group_size == 0, "the group size does not divide the columns");
  return {static_cast<int32_t>(bits), static_cast<int32_t>(group_size)};
}

inline void check_activation_bits(int64_t bits) {
  require(bits == 8 || bits == 16 || bits == 24, "activation_bits is not 8, 16 or 24");
}

}  // namespace jmoe
