// Attention over a cache, split over threads.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "parallel.h"

namespace jmoe {

// Dimensions are named as in jmoe/shapes.py. Query head h reads key-value head h / (H / G).
struct AttentionCall {
  int64_t B, L, H, P, G, M;
  FloatView q;  // [B, L, H, P]
  FloatView k;  // [B, G, M, P]
  FloatView v;  // like k
  const int32_t* start_B;  // query l of sequence b has position start_B[b] + l
  int64_t window;          // a query sees this many keys up to its own position; 0: all
  void* out;               // like q
};

// Softmax attention, scores and sums in float32. A query that sees no key gets zeros. Keys are taken in runs that begin
// at multiples of kMaxKeys, and what the runs gave is combined in their order: so a query's result depends neither on
// the number of threads nor on the other queries. P is at most kMaxHeadDim.
void attend_all(const Kernels& kernels, Threads& threads, const AttentionCall& call);

}  // namespace jmoe
