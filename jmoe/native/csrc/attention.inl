// Attention of some queries to one run of keys.
//
// Queries are taken four, two or one at a time, so that a key or value that was read serves several. What a query gets
// depends on the keys that it sees, and not on the queries beside it: every sum has one order, whatever goes along.
#pragma once

#include <cstdint>
#include <cstring>

#include "dense.inl"
#include "kernels.h"

namespace jmoe::JMOE_ISA {

// Bytes of keys, as far as measured best.
constexpr int64_t kKeysAhead = 2048;

// Head dimensions at a time, in pairs of vectors, that values are added up in.
constexpr int value_pairs(int num_queries) { return (kAccumulators < 16 ? 4 : 8) / num_queries; }

// The first n < kPair columns of a row; the others are zero.
template <FloatType kType>
inline void load_some_weights(const char* p, int64_t n, Floats& first, Floats& second) {
  if constexpr (kType == FloatType::kBFloat16) {
    load_pairs_bf16_some(reinterpret_cast<const uint16_t*>(p), n, first, second);
  } else {
    const float* floats = reinterpret_cast<const float*>(p);
    first = load_some(floats, n < kFloats ? n : kFloats);
    second = n > kFloats ? load_some(floats + kFloats, n - kFloats) : zero();
  }
}

inline void prefetch_row(const char* row, int64_t num_bytes) {
  for (int64_t byte = 0; byte < num_bytes; byte += 64) prefetch_far(row + byte);
}

// Products of kQueries queries, as arranged, with keys [begin, end): that of key i is scores[query * kMaxKeys + i]. If
// is_first, neither keys nor values are in the cache yet.
template <FloatType kType, int kQueries>
inline void multiply_keys(const AttentionTask& task, const float* q, int64_t begin, int64_t end, float* scores,
                          bool is_first) {
  constexpr int kKeys = kFloats / kQueries;
  constexpr int kStreams = kKeys < 4 ? kKeys : 4;
  const int64_t row_bytes = task.head_dim * kItemBytes<kType>;
  // Several sequential streams at the same time are faster than one; see read_bytes.
  const int64_t stream_keys = (end - begin + kStreams - 1) / kStreams;
  for (int64_t i = 0; i < stream_keys; i += kKeys / kStreams) {
    int64_t places[kKeys];
    const char* rows[kKeys];
    const char* values[kKeys];
    for (int key = 0; key < kKeys; ++key) {
      const int64_t of_stream = i + key % (kKeys / kStreams);
      places[key] = begin + key / (kKeys / kStreams) * stream_keys + of_stream;
      if (of_stream >= stream_keys || places[key] >= end) places[key] = begin;
      rows[key] = static_cast<const char*>(task.k) + places[key] * row_bytes;
      values[key] = static_cast<const char*>(task.v) + places[key] * row_bytes;
    }
    Floats acc[kFloats];  // [query, key]
    for (int j = 0; j < kFloats; ++j) acc[j] = zero();
    const float* x = q;
    for (int64_t c = 0; c < task.head_dim; c += kPair, x += kQueries * kPair) {
      const int64_t num_columns = task.head_dim - c;
      for (int key = 0; key < kKeys; ++key) {
        Floats first;
        Floats second;
        const char* p = rows[key] + c * kItemBytes<kType>;
        if (is_first) {
          prefetch_far(values[key] + c * kItemBytes<kType>);
          prefetch_far(p + kKeysAhead);
        }
        if (num_columns >= kPair) {
          load_weights<kType>(p, first, second);
        } else {
          load_some_weights<kType>(p, num_columns, first, second);
        }
        for (int t = 0; t < kQueries; ++t) {
          Floats& sum = acc[t * kKeys + key];
          sum = fma(second, load(x + t * kPair + kFloats), fma(first, load(x + t * kPair), sum));
        }
      }
    }
    float all[kFloats];
    store(all, sums(acc));
    for (int t = 0; t < kQueries; ++t) {
      for (int key = 0; key < kKeys; ++key) scores[t * kMaxKeys + places[key]] = all[t * kKeys + key];
    }
  }
}

// Makes exp(score - max) of the scores of keys [begin, end), which lie within the whole vectors [first, last), and zeros
// of what else there is.
inline void exponentiate(float* scores, int64_t first, int64_t last, int64_t begin, int64_t end, float* max_out,
                         float* total_out) {
  const float nothing = -__builtin_inff();
  for (int64_t i = first; i < begin; ++i) scores[i] = nothing;
  for (int64_t i = end; i < last; ++i) scores[i] = nothing;
  Floats most = broadcast(nothing);
  for (int64_t i = first; i < last; i += kFloats) most = max(most, load(scores + i));
  *max_out = max_of(most);
  const Floats shift = broadcast(*max_out == nothing ? 0.0f : *max_out);
  Floats total = zero();
  for (int64_t i = first; i < last; i += kFloats) {
    const Floats power = exp(sub(load(scores + i), shift));
    store(scores + i, power);
    total = add(total, power);
  }
  *total_out = sum(total);
}

// Adds values of keys [begin, end), times their weights, to kPairs pairs of vectors of kQueries sums. kTail: there are
// num_columns < kPair of them. What will be needed next is at `next`, unless that is null.
template <FloatType kType, int kQueries, int kPairs, bool kTail>
inline void add_columns(const char* values, int64_t row_bytes, int64_t num_columns, const float* weights,
                        int64_t begin, int64_t end, float* sums, int64_t stride, const char* next) {
  static_assert(!kTail || kPairs == 1);
  Floats acc[kQueries][2 * kPairs];
  for (int t = 0; t < kQueries; ++t) {
    for (int j = 0; j < 2 * kPairs; ++j) acc[t][j] = load(sums + t * stride + j * kFloats);
  }
  for (int64_t i = begin; i < end; ++i) {
    if (next != nullptr) prefetch_row(next + i * row_bytes, row_bytes);
    Floats weight[kQueries];
    for (int t = 0; t < kQueries; ++t) weight[t] = broadcast(weights[t * kMaxKeys + i]);
    for (int j = 0; j < kPairs; ++j) {
      Floats first;
      Floats second;
      const char* p = values + i * row_bytes + j * kPair * kItemBytes<kType>;
      if constexpr (kTail) {
        load_some_weights<kType>(p, num_columns, first, second);
      } else {
        load_weights<kType>(p, first, second);
      }
      for (int t = 0; t < kQueries; ++t) {
        acc[t][2 * j] = fma(weight[t], first, acc[t][2 * j]);
        acc[t][2 * j + 1] = fma(weight[t], second, acc[t][2 * j + 1]);
      }
    }
  }
  for (int t = 0; t < kQueries; ++t) {
    for (int j = 0; j < 2 * kPairs; ++j) store(sums + t * stride + j * kFloats, acc[t][j]);
  }
}

template <FloatType kType, int kQueries>
inline void add_values(const AttentionTask& task, const float* weights, int64_t begin, int64_t end, float* sums,
                       int64_t stride, const char* next) {
  constexpr int kPairs = value_pairs(kQueries);
  if (begin >= end) return;
  const int64_t row_bytes = task.head_dim * kItemBytes<kType>;
  const char* values = static_cast<const char*>(task.v);
  int64_t c = 0;
  for (; c + kPairs * kPair <= task.head_dim; c += kPairs * kPair) {
    add_columns<kType, kQueries, kPairs, false>(values + c * kItemBytes<kType>, row_bytes, kPair, weights, begin, end,
                                                sums + c, stride, c == 0 ? next : nullptr);
  }
  for (; c + kPair <= task.head_dim; c += kPair) {
    add_columns<kType, kQueries, 1, false>(values + c * kItemBytes<kType>, row_bytes, kPair, weights, begin, end,
                                           sums + c, stride, c == 0 ? next : nullptr);
  }
  if (c < task.head_dim) {
    add_columns<kType, kQueries, 1, true>(values + c * kItemBytes<kType>, row_bytes, task.head_dim - c, weights, begin,
                                          end, sums + c, stride, c == 0 ? next : nullptr);
  }
}

// Undoes what load_weights does to the order of columns.
template <FloatType kType>
inline void store_columns(const float* sums, int64_t num_columns, float* out) {
  for (int64_t c = 0; c < num_columns; c += kPair) {
    const Floats first = load(sums + c);
    const Floats second = load(sums + c + kFloats);
    float some[kPair];
    float* to = c + kPair <= num_columns ? out + c : some;
    if constexpr (kType == FloatType::kBFloat16) {
      store_pairs(to, first, second);
    } else {
      store(to, first);
      store(to + kFloats, second);
    }
    if (to == some) std::memcpy(out + c, some, static_cast<size_t>(num_columns - c) * sizeof(float));
  }
}

template <FloatType kType, int kQueries>
inline void attend_queries(const AttentionTask& task, int64_t first_query) {
  constexpr int64_t kSpace = kMaxHeadDim + kPair;
  const int64_t* begin = task.first_key + first_query;
  const int64_t* end = task.end_key + first_query;
  int64_t first_begin = begin[0];
  int64_t last_begin = begin[0];
  int64_t first_end = end[0];
  int64_t last_end = end[0];
  for (int t = 1; t < kQueries; ++t) {
    first_begin = begin[t] < first_begin ? begin[t] : first_begin;
    last_begin = begin[t] > last_begin ? begin[t] : last_begin;
    first_end = end[t] < first_end ? end[t] : first_end;
    last_end = end[t] > last_end ? end[t] : last_end;
  }

  alignas(64) float q[kQueries * kSpace];
  alignas(64) float weights[kQueries * kMaxKeys];
  alignas(64) float totals[kQueries * kSpace];
  const float* rows[kQueries];
  for (int t = 0; t < kQueries; ++t) rows[t] = task.q + (first_query + t) * task.head_dim;
  arrange<kType>(rows, kQueries, 0, task.head_dim, q);
  multiply_keys<kType, kQueries>(task, q, first_begin, last_end, weights, first_query == 0);
  const int64_t first = first_begin / kFloats * kFloats;
  const int64_t last = (last_end + kFloats - 1) / kFloats * kFloats;
  for (int t = 0; t < kQueries; ++t) {
    exponentiate(weights + t * kMaxKeys, first, last, begin[t], end[t], task.max + first_query + t,
                 task.total + first_query + t);
  }

  // Keys that only some of the queries see count for those only, not even with a weight of zero: they may be NaN.
  const int64_t stride = (task.head_dim + kPair - 1) / kPair * kPair;
  std::memset(totals, 0, static_cast<size_t>(kQueries * stride) * sizeof(float));
  const bool shared = last_begin < first_end;
  // Most likely the next run of keys follows.
  const char* next = nullptr;
  if (first_query == 0 && task.end_key[task.num_queries - 1] == kMaxKeys) {
    next = static_cast<const char*>(task.k) + kMaxKeys * task.head_dim * kItemBytes<kType>;
  }
  if (kQueries > 1 && shared) {
    for (int t = 0; t < kQueries; ++t) {
      add_values<kType, 1>(task, weights + t * kMaxKeys, begin[t], last_begin, totals + t * stride, stride, nullptr);
    }
    add_values<kType, kQueries>(task, weights, last_begin, first_end, totals, stride, next);
  }
  for (int t = 0; t < kQueries; ++t) {
    const int64_t rest = kQueries > 1 && shared ? first_end : begin[t];
    add_values<kType, 1>(task, weights + t * kMaxKeys, rest, end[t], totals + t * stride, stride,
                        kQueries == 1 ? next : nullptr);
    store_columns<kType>(totals + t * stride, task.head_dim, task.out + (first_query + t) * task.head_dim);
  }
}

template <FloatType kType>
inline void typed_attend(const AttentionTask& task) {
  int64_t query = 0;
  for (; query + 4 <= task.num_queries; query += 4) attend_queries<kType, 4>(task, query);
  if (query + 2 <= task.num_queries) {
    attend_queries<kType, 2>(task, query);
    query += 2;
  }
  if (query < task.num_queries) attend_queries<kType, 1>(task, query);
}

inline void attend(const AttentionTask& task) {
  if (task.type == FloatType::kBFloat16) {
    typed_attend<FloatType::kBFloat16>(task);
  } else {
    typed_attend<FloatType::kFloat32>(task);
  }
}

}  // namespace jmoe::JMOE_ISA
