// The experts of a layer, for tokens that each chose a few of them.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "products.h"

namespace jmoe {

struct ExpertsCall {
  int64_t num_tokens;
  int64_t top_k;
  int64_t num_experts;
  int64_t hidden_size;
  int64_t intermediate_size;
  FloatView x;               // [num_tokens, hidden_size]
  const int32_t* expert_ids;  // [num_tokens, top_k]; ids that no expert has count as no expert
  const float* weights;       // [num_tokens, top_k]
  const uint8_t* valid;       // [num_tokens]: others come out as zeros
  MatrixView matrices[3];  // w1, w3, w2 of expert 0; w1 and w3 are of one format
  int64_t strides[3];      // of each matrix, in bytes from one expert to the next
  int activation_bits;
  void* out;  // like x
};

// out = sum over k of weights * w2(silu(w1 x) * (w3 x)), added up in float32 in the order of k. The same bits for every
// number of threads.
void run_experts(const ExpertsCall& call, Threads& threads);

}  // namespace jmoe
