// Work in parts on several threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

namespace jmoe {

// Runs body(part, thread) for every part in [0, num_parts), and returns when all are done. `thread` is
// in [0, num_threads()), and two bodies that run at the same time have different ones: scratch memory
// goes by it. Which thread gets which part is left to chance: no result may depend on it.
class Threads {
 public:
  using Body = std::function<void(int64_t part, int thread)>;

  virtual ~Threads() = default;
  virtual int num_threads() const = 0;
  virtual void run(int64_t num_parts, const Body& body) = 0;
};

// The calling thread, and tasks that `schedule` hands to a pool which may be busy, or start them late or one
// after another. The caller works on parts until none is left and then waits for started parts only,
// never for a task that did not start: so there is no deadlock however busy the pool is.
template <typename Schedule>
class PoolThreads final : public Threads {
 public:
  PoolThreads(Schedule schedule, int num_threads)
      : schedule_(std::move(schedule)), num_threads_(num_threads) {}

  int num_threads() const override { return num_threads_; }

  void run(int64_t num_parts, const Body& body) override {
    const int64_t num_tasks = num_parts < num_threads_ ? num_parts : num_threads_;
    if (num_tasks <= 1) {
      for (int64_t part = 0; part < num_parts; ++part) body(part, 0);
      return;
    }
    // Shared: a task that starts after the end finds that no part is left, and touches nothing else.
    auto job = std::make_shared<Job>(num_parts, &body);
    for (int64_t task = 1; task < num_tasks; ++task) {
      schedule_([job, task] { job->work(static_cast<int>(task)); });
    }
    job->work(0);
    job->wait();
  }

 private:
  struct Job {
    Job(int64_t num_parts, const Body* body) : num_parts(num_parts), body(body) {}

    void work(int thread) {
      int64_t done = 0;
      for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < num_parts; ++done) {
        (*body)(part, thread);
      }
      if (done == 0) return;
      if (num_done.fetch_add(done, std::memory_order_acq_rel) + done == num_parts) {
        std::lock_guard<std::mutex> lock(mutex);
        finished = true;
        changed.notify_all();
      }
    }

    void wait() {
      // Parts are short, and waking up is not.
      for (int spin = 0; spin < kSpins; ++spin) {
        if (num_done.load(std::memory_order_acquire) == num_parts) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
      std::unique_lock<std::mutex> lock(mutex);
      changed.wait(lock, [this] { return finished; });
    }

    static constexpr int kSpins = 20000;
    const int64_t num_parts;
    const Body* const body;  // valid until the last part is done
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> num_done{0};
    std::mutex mutex;
    std::condition_variable changed;
    bool finished = false;
  };

  Schedule schedule_;
  int num_threads_;
};

}  // namespace jmoe
