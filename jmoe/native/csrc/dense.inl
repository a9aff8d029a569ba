// Products with matrices of floats.
//
// Lanes lie along the columns of a few rows of the weights, which are multiplied by a few rows of x at a time, so that
// one load serves several products. A result is the sum over chunks of columns of sums in float32 lanes: the same for a
// row of x whatever the other rows are, and however the weights' rows are split over calls.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace jmoe::JMOE_ISA {

constexpr int64_t kPair = 2 * kFloats;  // columns of a step
constexpr int64_t kChunk = 2048;        // columns
// Rows of x that take turns with weights that are in the first cache; scratch space on the stack is 128 KiB.
constexpr int64_t kMostRows = 16;
constexpr int64_t kDenseScratch = kMostRows * kChunk;
// Rows of x in one step.
constexpr int kMostTokens = kAccumulators < 8 ? 2 : kAccumulators < 20 ? 4 : 5;

template <FloatType kType>
constexpr int64_t kItemBytes = kType == FloatType::kBFloat16 ? 2 : 4;

// Rows of the weights in one step.
constexpr int rows_of_step(int num_tokens) {
  const int most = num_tokens <= 3 ? 8 : 4;
  return kAccumulators / num_tokens < most ? kAccumulators / num_tokens : most;
}

// Bfloat16 are taken apart by words: those of even columns and those of odd ones.
template <FloatType kType>
inline void load_weights(const char* p, Floats& first, Floats& second) {
  if constexpr (kType == FloatType::kBFloat16) {
    load_pairs_bf16(reinterpret_cast<const uint16_t*>(p), first, second);
  } else {
    first = load(reinterpret_cast<const float*>(p));
    second = load(reinterpret_cast<const float*>(p) + kFloats);
  }
}

// Copies rows of x in the order in which a step reads them: [column / kPair, row, kPair], with zeros up to whole pairs.
template <FloatType kType>
inline void arrange(const float* const* x, int64_t num_tokens, int64_t first_column, int64_t num_columns, float* to) {
  for (int64_t c = 0; c < num_columns; c += kPair) {
    for (int64_t t = 0; t < num_tokens; ++t, to += kPair) {
      float some[kPair] = {};
      const float* from = x[t] + first_column + c;
      if (c + kPair > num_columns) {
        std::memcpy(some, from, static_cast<size_t>(num_columns - c) * sizeof(float));
        from = some;
      }
      Floats first;
      Floats second;
      if constexpr (kType == FloatType::kBFloat16) {
        load_pairs(from, first, second);
      } else {
        first = load(from);
        second = load(from + kFloats);
      }
      store(to, first);
      store(to + kFloats, second);
    }
  }
}

template <FloatType kType, int kRows, int kTokens>
inline void multiply_step(const char* const (&w)[kRows], int64_t offset, const float* x,
                          Floats (&acc)[kRows][kTokens]) {
  for (int r = 0; r < kRows; ++r) {
    Floats first;
    Floats second;
    load_weights<kType>(w[r] + offset, first, second);
    for (int t = 0; t < kTokens; ++t) {
      acc[r][t] = fma(first, load(x + t * kPair), acc[r][t]);
      acc[r][t] = fma(second, load(x + t * kPair + kFloats), acc[r][t]);
    }
  }
}

// y (plus, if add_to, what is there) = w @ x for kRows rows of the weights and kTokens of x, as arranged. What will be
// needed next lies `ahead` bytes behind w.
template <FloatType kType, int kRows, int kTokens>
inline void multiply_rows(const char* const (&w)[kRows], const float* x, int64_t num_columns, float* const (&y)[kRows],
                          int64_t y_stride, bool add_to, int64_t ahead) {
  constexpr int64_t kItem = kItemBytes<kType>;
  for (int64_t c0 = 0; c0 < num_columns; c0 += kChunk) {
    Floats acc[kRows][kTokens];
    for (int r = 0; r < kRows; ++r) {
      for (int t = 0; t < kTokens; ++t) acc[r][t] = zero();
    }
    const int64_t end = c0 + kChunk < num_columns ? c0 + kChunk : num_columns;
    int64_t c = c0;
    for (; c + kPair <= end; c += kPair) {
      for (int r = 0; r < kRows; ++r) {
        for (int64_t line = 0; line < kPair * kItem; line += 64) prefetch_far(w[r] + c * kItem + line + ahead);
      }
      multiply_step<kType, kRows, kTokens>(w, c * kItem, x + c * kTokens, acc);
    }
    if (c < end) {
      char some[kRows][kPair * kItem] = {};
      const char* rest[kRows];
      for (int r = 0; r < kRows; ++r) {
        std::memcpy(some[r], w[r] + c * kItem, static_cast<size_t>((end - c) * kItem));
        rest[r] = some[r];
      }
      multiply_step<kType, kRows, kTokens>(rest, 0, x + c * kTokens, acc);
    }
    for (int r = 0; r < kRows; ++r) {
      for (int t = 0; t < kTokens; ++t) {
        float& out = y[r][t * y_stride];
        out = sum(acc[r][t]) + (add_to || c0 > 0 ? out : 0.0f);
      }
    }
  }
}

// Some columns of a matrix.
struct DensePart {
  const char* data;
  int64_t row_bytes;
  int64_t num_columns;
};

// Up to kMostRows rows of x, in groups of kTokens and kTokens - 1.
template <int kTokens>
struct Groups {
  int64_t num_groups;
  int64_t num_large;

  explicit Groups(int64_t num_tokens)
      : num_groups((num_tokens + kTokens - 1) / kTokens), num_large(num_tokens - num_groups * (kTokens - 1)) {}
};

// Rows of the weights from `first` on, kRows of them that are `step` apart, by all rows of x.
template <FloatType kType, int kRows, int kTokens>
inline void multiply_groups(const DensePart& w, int64_t first, int64_t step, const float* x,
                            const Groups<kTokens>& groups, float* y, int64_t y_stride, bool add_to) {
  const int64_t x_size = (w.num_columns + kPair - 1) / kPair * kPair;
  const char* rows[kRows];
  float* out[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = w.data + (first + r * step) * w.row_bytes;
    out[r] = y + first + r * step;
  }
  for (int64_t group = 0; group < groups.num_groups; ++group) {
    const int64_t num_tokens = group < groups.num_large ? kTokens : kTokens - 1;
    if (num_tokens == kTokens) {
      multiply_rows<kType, kRows, kTokens>(rows, x, w.num_columns, out, y_stride, add_to, w.row_bytes);
    } else if constexpr (kTokens > 1) {
      multiply_rows<kType, kRows, kTokens - 1>(rows, x, w.num_columns, out, y_stride, add_to, w.row_bytes);
    }
    x += num_tokens * x_size;
    for (int r = 0; r < kRows; ++r) out[r] += num_tokens * y_stride;
  }
}

template <FloatType kType, int kTokens>
inline void arrange_groups(const float* const* x, int64_t first_column, int64_t num_columns,
                           const Groups<kTokens>& groups, float* to) {
  const int64_t x_size = (num_columns + kPair - 1) / kPair * kPair;
  for (int64_t group = 0; group < groups.num_groups; ++group) {
    const int64_t num_tokens = group < groups.num_large ? kTokens : kTokens - 1;
    arrange<kType>(x, num_tokens, first_column, num_columns, to);
    x += num_tokens;
    to += num_tokens * x_size;
  }
}

template <FloatType kType, int kTokens>
inline void multiply_block(const DenseView& w, int64_t first_row, int64_t num_rows, const float* const* x,
                           int64_t num_tokens, float* y, int64_t y_stride) {
  constexpr int64_t kItem = kItemBytes<kType>;
  constexpr int kRows = rows_of_step(kTokens);
  alignas(64) float arranged[kDenseScratch];
  const Groups<kTokens> groups(num_tokens);
  const int64_t columns_at_once = kDenseScratch / num_tokens / kChunk * kChunk;
  for (int64_t c0 = 0; c0 < w.columns; c0 += columns_at_once) {
    const int64_t num_columns = w.columns - c0 < columns_at_once ? w.columns - c0 : columns_at_once;
    arrange_groups<kType, kTokens>(x, c0, num_columns, groups, arranged);
    const int64_t row_bytes = w.columns * kItem;
    const char* data = static_cast<const char*>(w.values.data) + first_row * row_bytes + c0 * kItem;
    const DensePart part = {data, row_bytes, num_columns};
    // Rows of a step lie far apart, and go on in the next step: so the processor sees streams to prefetch.
    const int64_t num_steps = num_rows / kRows;
    for (int64_t i = 0; i < num_steps; ++i) {
      multiply_groups<kType, kRows, kTokens>(part, i, num_steps, arranged, groups, y, y_stride, c0 > 0);
    }
    for (int64_t i = num_steps * kRows; i < num_rows; ++i) {
      multiply_groups<kType, 1, kTokens>(part, i, 1, arranged, groups, y, y_stride, c0 > 0);
    }
  }
}

template <FloatType kType, int kTokens>
inline void multiply_block_in_groups(int64_t group_size, const DenseView& w, int64_t first_row, int64_t num_rows,
                                     const float* const* x, int64_t num_tokens, float* y, int64_t y_stride) {
  if constexpr (kTokens > 1) {
    if (group_size < kTokens) {
      return multiply_block_in_groups<kType, kTokens - 1>(group_size, w, first_row, num_rows, x, num_tokens, y,
                                                          y_stride);
    }
  }
  multiply_block<kType, kTokens>(w, first_row, num_rows, x, num_tokens, y, y_stride);
}

template <FloatType kType>
inline void typed_dense_product(const DenseView& w, int64_t first_row, int64_t num_rows, const float* x,
                                int64_t x_stride, const Selection& selection) {
  const int64_t num_blocks = (selection.num_rows + kMostRows - 1) / kMostRows;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t first = selection.num_rows * block / num_blocks;
    const int64_t num_tokens = selection.num_rows * (block + 1) / num_blocks - first;
    const float* rows[kMostRows];
    for (int64_t i = 0; i < num_tokens; ++i) {
      rows[i] = x + selection.row_of_x(first + i) * x_stride;
    }
    const int64_t num_groups = (num_tokens + kMostTokens - 1) / kMostTokens;
    const int64_t group_size = (num_tokens + num_groups - 1) / num_groups;
    multiply_block_in_groups<kType, kMostTokens>(group_size, w, first_row, num_rows, rows, num_tokens,
                                                 selection.y + first * selection.stride, selection.stride);
  }
}

// Products of rows [first_row, first_row + num_rows) of w with selected rows of x.
inline void dense_product(const DenseView& w, int64_t first_row, int64_t num_rows, const float* x, int64_t x_stride,
                          const Selection& selection) {
  if (w.columns == 0) {
    for (int64_t i = 0; i < selection.num_rows; ++i) {
      std::memset(selection.y + i * selection.stride, 0, static_cast<size_t>(num_rows) * sizeof(float));
    }
  } else if (w.values.type == FloatType::kBFloat16) {
    typed_dense_product<FloatType::kBFloat16>(w, first_row, num_rows, x, x_stride, selection);
  } else {
    typed_dense_product<FloatType::kFloat32>(w, first_row, num_rows, x, x_stride, selection);
  }
}

}  // namespace jmoe::JMOE_ISA
