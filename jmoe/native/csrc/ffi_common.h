// What the FFI handlers share: every argument of a call is checked before a kernel sees it, so that wrong ones are an
// error of the program that made the call, and never a crash.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <new>
#include <string>
#include <utility>

#include "export.h"
#include "parallel.h"
#include "views.h"
#include "xla/ffi/api/ffi.h"

namespace jmoe {

namespace ffi = xla::ffi;

// Thrown by checks; guarded() turns it into ffi::Error.
struct InvalidCall {
  std::string message;
};

[[noreturn]] inline void fail(std::string message) { throw InvalidCall{std::move(message)}; }

inline void require(bool ok, const char* message) {
  if (!ok) fail(message);
}

inline std::string describe(const ffi::AnyBuffer& buffer) {
  std::string text = "type " + std::to_string(static_cast<int>(buffer.element_type())) + " [";
  for (size_t i = 0; i < buffer.dimensions().size(); ++i) {
    text += (i ? ", " : "") + std::to_string(buffer.dimensions()[i]);
  }
  return text + "]";
}

inline void require_type(const ffi::AnyBuffer& buffer, ffi::DataType type, const char* name) {
  if (buffer.element_type() != type) fail(std::string(name) + " has the wrong type: " + describe(buffer));
}

inline void require_rank(const ffi::AnyBuffer& buffer, size_t rank, const char* name) {
  if (buffer.dimensions().size() != rank) fail(std::string(name) + " has the wrong rank: " + describe(buffer));
}

inline void require_shape(const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> shape, const char* name) {
  require_rank(buffer, shape.size(), name);
  size_t i = 0;
  for (int64_t size : shape) {
    if (buffer.dimensions()[i++] != size) fail(std::string(name) + " has the wrong shape: " + describe(buffer));
  }
}

inline void require_aligned(const void* data, size_t alignment, const char* name) {
  if (reinterpret_cast<uintptr_t>(data) % alignment != 0) fail(std::string(name) + " is misaligned");
}

// bfloat16 or float32, else an error.
inline FloatView float_view(const ffi::AnyBuffer& buffer, const char* name) {
  FloatType type = FloatType::kFloat32;
  if (buffer.element_type() == ffi::DataType::BF16) {
    type = FloatType::kBFloat16;
  } else {
    require_type(buffer, ffi::DataType::F32, name);
  }
  require_aligned(buffer.untyped_data(), static_cast<size_t>(size_of(type)), name);
  return {buffer.untyped_data(), type};
}

// The threads of XLA's own pool, at most max_threads of them with the caller's (0: all).
inline auto pool_threads(ffi::ThreadPool& pool, int64_t max_threads) {
  require(max_threads >= 0, "num_threads is negative");
  int64_t num_threads = pool.num_threads() > 0 ? pool.num_threads() : 1;
  if (max_threads > 0) num_threads = max_threads;
  if (num_threads > 1024) num_threads = 1024;
  auto schedule = [&pool](auto task) { pool.Schedule(std::move(task)); };
  return PoolThreads<decltype(schedule)>(schedule, static_cast<int>(num_threads));
}

// Runs a handler's body; bad calls and lack of memory become errors of the call.
template <typename Body>
ffi::Error guarded(const char* name, Body body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const InvalidCall& call) {
    return ffi::Error::InvalidArgument(std::string(name) + ": " + call.message);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string(name) + ": no memory for scratch space");
  }
}

}  // namespace jmoe
