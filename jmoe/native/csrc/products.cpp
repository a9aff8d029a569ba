#include "products.h"

#include <algorithm>

namespace jmoe {

Activations::Activations(const Kernels& kernels, Threads& threads, const MatrixView& like, const float* x,
                         int64_t num_rows, int activation_bits, AlignedBuffer& memory)
    : kernels_(kernels), x_(x), columns_(like.columns()) {
  if (!like.is_quant() || num_rows == 0) return;
  const int64_t num_bytes = kernels.quant_rows_bytes(like.quant, num_rows, activation_bits);
  quant_rows_ = kernels.make_quant_rows(like.quant, num_rows, activation_bits, memory.get(num_bytes));
  // A part of about 16K numbers is worth a thread's attention.
  const int64_t rows_at_once = std::max<int64_t>(1, 16384 / columns_);
  threads.run((num_rows + rows_at_once - 1) / rows_at_once, [&](int64_t part, int) {
    const int64_t first = part * rows_at_once;
    kernels.quantize_rows(quant_rows_, x, columns_, first, std::min(rows_at_once, num_rows - first));
  });
}

void Activations::multiply(const MatrixView& w, int64_t first_row, int64_t num_rows,
                           const Selection& selection) const {
  if (selection.num_rows == 0) return;
  if (w.is_quant()) {
    kernels_.quant_product(w.quant, first_row, num_rows, quant_rows_, selection);
  } else {
    kernels_.dense_product(w.dense, first_row, num_rows, x_, columns_, selection);
  }
}

const float* as_float32(const Kernels& kernels, const FloatView& x, int64_t n, AlignedBuffer& memory) {
  if (x.type == FloatType::kFloat32) return static_cast<const float*>(x.data);
  float* converted = memory.floats(n);
  kernels.to_float32(x, 0, converted, n);
  return converted;
}

int64_t rows_per_part(int64_t num_rows, int num_threads) {
  // Several parts for every thread: one may be slowed down by its neighbours. But long ones: at the start of a part
  // nothing was fetched ahead, and at its end something was in vain.
  const int64_t wanted = num_rows / (8 * num_threads) / 32 * 32;
  return std::clamp<int64_t>(wanted, 32, 512);
}

}  // namespace jmoe
