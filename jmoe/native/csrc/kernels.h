// The kernels of one instruction set, and the choice among those that this processor has.
#pragma once

#include <cstdint>

#include "views.h"

namespace jmoe {

// Activations in 8, 16 or 24 bits: rows of fixed-point numbers with a scale per group, as quantize_rows makes them for
// matrices of one format. Opaque to all but quant.inl.
struct QuantRows;

// Which rows of x a product takes, and where results go: y[i * stride + row - first_row] is the product of
// row `row` of the weights and row (index ? index[i] : i) of x.
struct Selection {
  const int32_t* index;
  int64_t num_rows;
  float* y;
  int64_t stride;

  // Of x, for row i of y; beyond the last row that one's once more.
  JMOE_INLINE int64_t row_of_x(int64_t i) const {
    const int64_t place = i < num_rows ? i : num_rows - 1;
    return index != nullptr ? index[place] : place;
  }
};

constexpr int64_t kMaxKeys = 256;      // of an AttentionTask
constexpr int64_t kMaxHeadDim = 1024;  // the same

// One query head group of one sequence against a run of keys: see attention.inl.
struct AttentionTask {
  const float* q;       // [num_queries, head_dim], scaled by head_dim^-1/2 already
  int64_t num_queries;  // all read the same keys and values
  int64_t head_dim;
  const void* k;  // [num_keys, head_dim], the first key of the run
  const void* v;
  FloatType type;
  const int64_t* first_key;  // of each query: keys in [first_key, end_key) count, within [0, num_keys)
  const int64_t* end_key;
  int64_t num_keys;
  float* out;    // [num_queries, head_dim]: sum of exp(score - max) * v
  float* max;    // [num_queries]: -infinity if a query saw no key
  float* total;  // [num_queries]: sum of exp(score - max)
};

struct Kernels {
  const char* name;

  // Rows of x in `bits` (8, 16, 24) bits for products with matrices of the format of `like`; `memory` has
  // quant_rows_bytes() bytes, and is aligned to 64. Rows [first, first + num) only: rows are independent.
  int64_t (*quant_rows_bytes)(const QuantView& like, int64_t num_rows, int bits);
  QuantRows* (*make_quant_rows)(const QuantView& like, int64_t num_rows, int bits, void* memory);
  void (*quantize_rows)(QuantRows* rows, const float* x, int64_t x_stride, int64_t first, int64_t num);

  // Products of rows [first_row, first_row + num_rows) of a matrix with selected rows of x. One call, one thread.
  void (*quant_product)(const QuantView& w, int64_t first_row, int64_t num_rows, const QuantRows* x,
                        const Selection& selection);
  void (*dense_product)(const DenseView& w, int64_t first_row, int64_t num_rows, const float* x, int64_t x_stride,
                        const Selection& selection);

  // out = silu(gate) * up; may be in place.
  void (*swiglu)(const float* gate, const float* up, float* out, int64_t n);
  // Converts n floats.
  void (*to_float32)(const FloatView& from, int64_t first, float* to, int64_t n);
  void (*from_float32)(const float* from, void* to, FloatType type, int64_t first, int64_t n);
  void (*attend)(const AttentionTask& task);
  // Reads n bytes, as fast as memory gives them; returns something that depends on all of them.
  uint64_t (*read_bytes)(const void* data, int64_t n);
};

// The best that this build has and this processor supports, or what jmoe_set_isa chose.
const Kernels& kernels();

}  // namespace jmoe
