// Memory to work in. A buffer keeps what it has, so that every part of a call can ask for it and only the first one
// allocates; who makes the buffer decides for how long.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace jmoe {

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer() { std::free(data_); }

  // At least num_bytes, aligned to 64; what was there is lost.
  void* get(int64_t num_bytes) {
    if (num_bytes > size_) {
      std::free(data_);
      size_ = 0;
      const size_t rounded = (static_cast<size_t>(num_bytes) + 63) / 64 * 64;
      data_ = std::aligned_alloc(64, rounded);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = static_cast<int64_t>(rounded);
    }
    return data_;
  }

  float* floats(int64_t n) { return static_cast<float*>(get(n * static_cast<int64_t>(sizeof(float)))); }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace jmoe
