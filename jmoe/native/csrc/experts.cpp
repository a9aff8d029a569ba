#include "experts.h"

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

namespace jmoe {

namespace {

constexpr int64_t kMostColumns = 128;  // of the output at a time: rows of w2

// The tokens of one expert, as a run of rows of `hidden`.
struct ActiveExpert {
  int64_t expert;
  int64_t first_row;
  int64_t num_rows;
};

struct Assignments {
  std::vector<ActiveExpert> active;
  std::vector<int32_t> token_of_row;
  std::vector<int64_t> row_of_assignment;  // -1: none
};

Assignments group_by_expert(const ExpertsCall& call) {
  const int64_t num_assignments = call.num_tokens * call.top_k;
  const auto expert_of = [&](int64_t a) -> int64_t {
    const int64_t expert = call.expert_ids[a];
    return call.valid[a / call.top_k] && 0 <= expert && expert < call.num_experts ? expert : -1;
  };
  std::vector<int64_t> counts(call.num_experts, 0);
  for (int64_t a = 0; a < num_assignments; ++a) {
    if (const int64_t expert = expert_of(a); expert >= 0) ++counts[expert];
  }
  Assignments grouped;
  std::vector<int64_t> next(call.num_experts, 0);
  int64_t num_rows = 0;
  for (int64_t expert = 0; expert < call.num_experts; ++expert) {
    next[expert] = num_rows;
    if (counts[expert] > 0) grouped.active.push_back({expert, num_rows, counts[expert]});
    num_rows += counts[expert];
  }
  grouped.token_of_row.resize(num_rows);
  grouped.row_of_assignment.assign(num_assignments, -1);
  for (int64_t a = 0; a < num_assignments; ++a) {
    if (const int64_t expert = expert_of(a); expert >= 0) {
      grouped.token_of_row[next[expert]] = static_cast<int32_t>(a / call.top_k);
      grouped.row_of_assignment[a] = next[expert]++;
    }
  }
  return grouped;
}

// The same matrix of the expert that lies `offset` bytes further on.
MatrixView of_expert(MatrixView matrix, int64_t offset) {
  const auto move = [offset](auto*& pointer) {
    using Pointer = std::remove_reference_t<decltype(pointer)>;
    if (pointer != nullptr) pointer = reinterpret_cast<Pointer>(reinterpret_cast<const uint8_t*>(pointer) + offset);
  };
  move(matrix.quant.codes);
  move(matrix.quant.scales);
  move(matrix.quant.zeros);
  move(matrix.quant.nested);
  move(matrix.dense.values.data);
  return matrix;
}

}  // namespace

void run_experts(const ExpertsCall& call, Threads& threads) {
  const Kernels& kernels = jmoe::kernels();
  const Assignments grouped = group_by_expert(call);
  const int64_t num_rows = static_cast<int64_t>(grouped.token_of_row.size());
  const int64_t num_active = static_cast<int64_t>(grouped.active.size());
  const int64_t width = call.intermediate_size;
  const int num_threads = threads.num_threads();

  AlignedBuffer x_memory, x_rows_memory, hidden_memory, hidden_rows_memory;
  const float* x = as_float32(kernels, call.x, call.num_tokens * call.hidden_size, x_memory);
  const Activations x_rows(kernels, threads, call.matrices[0], x, call.num_tokens, call.activation_bits,
                           x_rows_memory);
  float* hidden = hidden_memory.floats(num_rows * width);
  std::vector<AlignedBuffer> scratch(num_threads);

  const int64_t rows_of_up = rows_per_part(width * num_active, num_threads);
  const int64_t parts_of_up = (width + rows_of_up - 1) / rows_of_up;
  const int64_t most_rows = [&] {
    int64_t most = 0;
    for (const ActiveExpert& active : grouped.active) most = std::max(most, active.num_rows);
    return most;
  }();
  for (AlignedBuffer& buffer : scratch) {  // here, because a body must not throw
    buffer.get(std::max(2 * most_rows * rows_of_up, num_rows * kMostColumns) * static_cast<int64_t>(sizeof(float)));
  }
  threads.run(num_active * parts_of_up, [&](int64_t part, int thread) {
    const ActiveExpert& active = grouped.active[part / parts_of_up];
    const MatrixView w1 = of_expert(call.matrices[0], active.expert * call.strides[0]);
    const MatrixView w3 = of_expert(call.matrices[1], active.expert * call.strides[1]);
    const int64_t first = part % parts_of_up * rows_of_up;
    const int64_t size = std::min(rows_of_up, width - first);
    float* gate = scratch[thread].floats(2 * active.num_rows * rows_of_up);
    float* up = gate + active.num_rows * rows_of_up;
    const int32_t* tokens = grouped.token_of_row.data() + active.first_row;
    x_rows.multiply(w1, first, size, {tokens, active.num_rows, gate, rows_of_up});
    x_rows.multiply(w3, first, size, {tokens, active.num_rows, up, rows_of_up});
    for (int64_t i = 0; i < active.num_rows; ++i) {
      kernels.swiglu(gate + i * rows_of_up, up + i * rows_of_up, hidden + (active.first_row + i) * width + first,
                     size);
    }
  });

  const Activations hidden_rows(kernels, threads, call.matrices[2], hidden, num_rows, call.activation_bits,
                                hidden_rows_memory);
  std::vector<int32_t> row_ids(num_rows);
  std::iota(row_ids.begin(), row_ids.end(), 0);
  const int64_t columns = std::min(rows_per_part(call.hidden_size, num_threads), kMostColumns);
  const int64_t parts_of_down = (call.hidden_size + columns - 1) / columns;
  threads.run(parts_of_down, [&](int64_t part, int thread) {
    const int64_t first = part * columns;
    const int64_t size = std::min(columns, call.hidden_size - first);
    float* down = scratch[thread].floats(num_rows * kMostColumns);
    for (const ActiveExpert& active : grouped.active) {
      const MatrixView w2 = of_expert(call.matrices[2], active.expert * call.strides[2]);
      hidden_rows.multiply(w2, first, size,
                           {row_ids.data() + active.first_row, active.num_rows, down + active.first_row * columns,
                            columns});
    }
    for (int64_t token = 0; token < call.num_tokens; ++token) {
      float total[kMostColumns] = {};
      for (int64_t k = 0; k < call.top_k; ++k) {
        const int64_t row = grouped.row_of_assignment[token * call.top_k + k];
        if (row < 0) continue;
        const float weight = call.weights[token * call.top_k + k];
        for (int64_t i = 0; i < size; ++i) total[i] += down[row * columns + i] * weight;
      }
      kernels.from_float32(total, call.out, call.x.type, token * call.hidden_size + first, size);
    }
  });
}

}  // namespace jmoe
