#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "scratch.h"

namespace jmoe {
namespace {

// Queries that share what is read of keys and values.
constexpr int64_t kBlockQueries = 64;
// Of a thread's part, when keys are split: enough to be worth its while.
constexpr int64_t kPartBytes = 256 * 1024;
constexpr int64_t kMaxSplitFloats = 16 * 1024 * 1024;

// Attention over some keys, not divided by the total yet: [num_queries, P], and for each query the highest score and
// the sum of exp(score - highest).
struct Partial {
  float* out;
  float* max;
  float* total;

  static int64_t num_floats(int64_t num_queries, int64_t P) { return num_queries * (P + 2); }

  Partial(float* memory, int64_t num_queries, int64_t P)
      : out(memory), max(memory + num_queries * P), total(max + num_queries) {}

  void clear(int64_t num_queries) {
    std::fill_n(max, num_queries, -std::numeric_limits<float>::infinity());
    std::fill_n(total, num_queries, 0.0f);
  }

  // Adds what later keys gave.
  void add(const Partial& later, int64_t num_queries, int64_t P) {
    for (int64_t i = 0; i < num_queries; ++i) {
      if (later.total[i] == 0.0f) continue;
      float* sums = out + i * P;
      const float* others = later.out + i * P;
      if (total[i] == 0.0f) {
        std::copy_n(others, P, sums);
        max[i] = later.max[i];
        total[i] = later.total[i];
        continue;
      }
      const float most = std::max(max[i], later.max[i]);
      const float scale = std::exp(max[i] - most);
      const float other_scale = std::exp(later.max[i] - most);
      for (int64_t p = 0; p < P; ++p) sums[p] = sums[p] * scale + others[p] * other_scale;
      total[i] = total[i] * scale + later.total[i] * other_scale;
      max[i] = most;
    }
  }
};

// Neighbouring queries of one sequence that read one key-value head.
struct Block {
  int64_t b, g;
  int64_t first_l, num_l;
  int64_t first_run, end_run;
  int64_t first_partial;  // when its keys are split
};

class Attention {
 public:
  Attention(const Kernels& kernels, const AttentionCall& call)
      : kernels_(kernels), call_(call), heads_(call.H / call.G), item_(size_of(call.k.type)) {
    // More would overflow; and no cache is as long.
    window_ = std::min<int64_t>(call.window, int64_t{1} << 40);
    const int64_t most_l = std::max<int64_t>(1, kBlockQueries / heads_);
    block_l_ = std::min(most_l, call.L);
    // The last positions first: they have the most to do.
    for (int64_t end = call.L; end > 0; end -= block_l_) {
      const int64_t first = std::max<int64_t>(0, end - block_l_);
      for (int64_t b = 0; b < call.B; ++b) {
        for (int64_t g = 0; g < call.G; ++g) blocks_.push_back(make_block(b, g, first, end - first));
      }
    }
  }

  void run(Threads& threads) {
    int64_t num_runs = 0;
    int64_t longest = 0;
    for (Block& block : blocks_) {
      block.first_partial = num_runs;
      num_runs += block.end_run - block.first_run;
      longest = std::max(longest, block.end_run - block.first_run);
    }
    const int64_t num_blocks = static_cast<int64_t>(blocks_.size());
    const int64_t run_bytes = 2 * kMaxKeys * call_.P * item_;
    const bool is_small = num_runs * run_bytes <= kPartBytes && num_blocks * most_queries() <= kBlockQueries;
    const bool is_split = !is_small && threads.num_threads() > 1 && longest > 1 &&
                          num_blocks < 4 * threads.num_threads() && num_runs * partial_floats() <= kMaxSplitFloats;
    // What a call needs is kept for the next one of the same thread.
    thread_local AlignedBuffer memory;
    const int64_t block_floats = round_up(most_queries() * call_.P + 2 * partial_floats());
    const int num_threads = is_small ? 1 : threads.num_threads();
    const int64_t split_floats = is_split ? num_runs * partial_floats() : 0;
    scratch_ = memory.floats(num_threads * block_floats + split_floats);
    scratch_stride_ = block_floats;
    partials_ = scratch_ + num_threads * block_floats;

    if (is_small) {
      for (const Block& block : blocks_) whole_block(block, 0);
    } else if (is_split) {
      run_split(threads, num_runs, std::max<int64_t>(1, kPartBytes / run_bytes));
    } else {
      threads.run(num_blocks, [this](int64_t part, int thread) { whole_block(blocks_[part], thread); });
    }
  }

 private:
  struct Part {
    const Block* block;
    int64_t first_run, end_run;
  };

  // A cache line's worth of floats apart: threads shall not write to the same one.
  static int64_t round_up(int64_t num_floats) { return (num_floats + 15) / 16 * 16; }

  int64_t most_queries() const { return block_l_ * heads_; }
  int64_t partial_floats() const { return round_up(Partial::num_floats(most_queries(), call_.P)); }

  // Keys [first, second) are what query l of sequence b sees.
  std::pair<int64_t, int64_t> visible_keys(int64_t b, int64_t l) const {
    const int64_t position = call_.start_B[b] + l;
    const int64_t end = std::clamp<int64_t>(position + 1, 0, call_.M);
    const int64_t first = window_ > 0 ? std::clamp<int64_t>(position - window_ + 1, 0, end) : 0;
    return {first, end};
  }

  Block make_block(int64_t b, int64_t g, int64_t first_l, int64_t num_l) const {
    const int64_t first = visible_keys(b, first_l).first;
    const int64_t end = visible_keys(b, first_l + num_l - 1).second;
    const int64_t first_run = first / kMaxKeys;
    return {b, g, first_l, num_l, first_run, std::max(first_run, (end + kMaxKeys - 1) / kMaxKeys), 0};
  }

  Partial partial(int64_t index) const {
    return Partial(partials_ + index * partial_floats(), most_queries(), call_.P);
  }

  // The queries of a block in float32, in the order [l, head], scaled.
  void read_queries(const Block& block, float* q) const {
    const int64_t n = heads_ * call_.P;
    for (int64_t l = 0; l < block.num_l; ++l) {
      kernels_.to_float32(call_.q, first_item(block, l), q + l * n, n);
    }
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(call_.P)));
    for (int64_t i = 0; i < block.num_l * n; ++i) q[i] *= scale;
  }

  // Of the block's heads in q and out.
  int64_t first_item(const Block& block, int64_t l) const {
    return ((block.b * call_.L + block.first_l + l) * call_.H + block.g * heads_) * call_.P;
  }

  void attend_run(const Block& block, const float* q, int64_t run, const Partial& to) const {
    const int64_t first_key = run * kMaxKeys;
    const int64_t num_keys = std::min(kMaxKeys, call_.M - first_key);
    int64_t first[kBlockQueries];
    int64_t end[kBlockQueries];
    // All heads of a position see the same keys; there may be more heads than a kernel is given at a time.
    const int64_t num_queries = block.num_l * heads_;
    const int64_t offset = ((block.b * call_.G + block.g) * call_.M + first_key) * call_.P * item_;
    for (int64_t done = 0; done < num_queries; done += kBlockQueries) {
      const int64_t n = std::min(kBlockQueries, num_queries - done);
      for (int64_t i = 0; i < n; ++i) {
        const auto [key, end_key] = visible_keys(block.b, block.first_l + (done + i) / heads_);
        first[i] = std::clamp<int64_t>(key - first_key, 0, num_keys);
        end[i] = std::clamp<int64_t>(end_key - first_key, first[i], num_keys);
      }
      kernels_.attend({q + done * call_.P, n, call_.P, static_cast<const char*>(call_.k.data) + offset,
                       static_cast<const char*>(call_.v.data) + offset, call_.k.type, first, end, num_keys,
                       to.out + done * call_.P, to.max + done, to.total + done});
    }
  }

  void write_out(const Block& block, const Partial& sums) const {
    const int64_t n = heads_ * call_.P;
    for (int64_t i = 0; i < block.num_l * heads_; ++i) {
      float* row = sums.out + i * call_.P;
      if (sums.total[i] == 0.0f) {
        std::fill_n(row, call_.P, 0.0f);
      } else {
        for (int64_t p = 0; p < call_.P; ++p) row[p] /= sums.total[i];
      }
    }
    for (int64_t l = 0; l < block.num_l; ++l) {
      kernels_.from_float32(sums.out + l * n, call_.out, call_.q.type, first_item(block, l), n);
    }
  }

  void whole_block(const Block& block, int thread) const {
    float* q = scratch_ + thread * scratch_stride_;
    const int64_t num_queries = block.num_l * heads_;
    Partial sums(q + most_queries() * call_.P, most_queries(), call_.P);
    Partial one_run(sums.out + partial_floats(), most_queries(), call_.P);
    read_queries(block, q);
    sums.clear(num_queries);
    for (int64_t run = block.first_run; run < block.end_run; ++run) {
      attend_run(block, q, run, one_run);
      sums.add(one_run, num_queries, call_.P);
    }
    write_out(block, sums);
  }

  void run_split(Threads& threads, int64_t num_runs, int64_t least_runs) {
    const int64_t wanted = num_runs / (8 * threads.num_threads());
    const int64_t runs_each = std::max(least_runs, wanted);
    std::vector<Part> parts;
    for (const Block& block : blocks_) {
      for (int64_t run = block.first_run; run < block.end_run; run += runs_each) {
        parts.push_back({&block, run, std::min(run + runs_each, block.end_run)});
      }
    }
    threads.run(static_cast<int64_t>(parts.size()), [&](int64_t i, int thread) {
      const Part& part = parts[i];
      float* q = scratch_ + thread * scratch_stride_;
      read_queries(*part.block, q);
      for (int64_t run = part.first_run; run < part.end_run; ++run) {
        attend_run(*part.block, q, run, partial(part.block->first_partial + run - part.block->first_run));
      }
    });
    threads.run(static_cast<int64_t>(blocks_.size()), [&](int64_t i, int thread) {
      const Block& block = blocks_[i];
      const int64_t num_queries = block.num_l * heads_;
      Partial sums(scratch_ + thread * scratch_stride_, most_queries(), call_.P);
      sums.clear(num_queries);
      for (int64_t run = block.first_run; run < block.end_run; ++run) {
        sums.add(partial(block.first_partial + run - block.first_run), num_queries, call_.P);
      }
      write_out(block, sums);
    });
  }

  const Kernels& kernels_;
  const AttentionCall& call_;
  const int64_t heads_;  // of queries, that read one key-value head
  const int64_t item_;
  int64_t window_;
  int64_t block_l_;
  std::vector<Block> blocks_;
  float* scratch_ = nullptr;
  int64_t scratch_stride_ = 0;
  float* partials_ = nullptr;
};

}  // namespace

void attend_all(const Kernels& kernels, Threads& threads, const AttentionCall& call) {
  if (call.B == 0 || call.L == 0 || call.H == 0 || call.P == 0) return;
  Attention(kernels, call).run(threads);
}

}  // namespace jmoe
