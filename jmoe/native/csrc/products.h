// Products with a matrix in any format, split over threads.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace jmoe {

// A matrix in few bits or of floats: quant.codes is null for the latter.
struct MatrixView {
  QuantView quant;
  DenseView dense;

  bool is_quant() const { return quant.codes != nullptr; }
  int64_t rows() const { return is_quant() ? quant.rows : dense.rows; }
  int64_t columns() const { return is_quant() ? quant.columns : dense.columns; }
};

// Rows of activations in the form that matrices of one format take.
class Activations {
 public:
  // x: [num_rows, columns], kept by reference. Quantizes it if matrices like `like` are in few bits.
  Activations(const Kernels& kernels, Threads& threads, const MatrixView& like, const float* x, int64_t num_rows,
              int activation_bits, AlignedBuffer& memory);

  // Rows [first_row, first_row + num_rows) of w times selected rows.
  void multiply(const MatrixView& w, int64_t first_row, int64_t num_rows, const Selection& selection) const;

 private:
  const Kernels& kernels_;
  const float* x_;
  int64_t columns_;
  QuantRows* quant_rows_ = nullptr;
};

// n floats as float32: converted into `memory` unless they are that already.
const float* as_float32(const Kernels& kernels, const FloatView& x, int64_t n, AlignedBuffer& memory);

// How many rows of a matrix one part of the work has: a multiple of 32.
int64_t rows_per_part(int64_t num_rows, int num_threads);

}  // namespace jmoe
