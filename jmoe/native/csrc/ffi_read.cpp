// jmoe_read: any array to uint32 [2], a checksum of its bytes: the exclusive or of its words of 64 bits, the low half
// first. The yardstick of benchmarks: nothing reads weights faster.
#include <algorithm>
#include <atomic>

#include "ffi_common.h"
#include "kernels.h"

namespace jmoe {
namespace {

constexpr int64_t kReadBytes = 1024 * 1024;  // of a part, a multiple of 8

ffi::Error read(ffi::ThreadPool pool, ffi::AnyBuffer array, ffi::Result<ffi::AnyBuffer> checksum,
                int64_t num_threads) {
  return guarded("jmoe_read", [&] {
    require_type(*checksum, ffi::DataType::U32, "the result");
    require_shape(*checksum, {2}, "the result");
    require_aligned(checksum->untyped_data(), 4, "the result");
    const char* data = static_cast<const char*>(array.untyped_data());
    const int64_t num_bytes = static_cast<int64_t>(array.size_bytes());
    std::atomic<uint64_t> total{0};
    auto threads = pool_threads(pool, num_threads);
    threads.run((num_bytes + kReadBytes - 1) / kReadBytes, [&](int64_t part, int) {
      const int64_t first = part * kReadBytes;
      total ^= kernels().read_bytes(data + first, std::min(kReadBytes, num_bytes - first));
    });
    uint32_t* out = static_cast<uint32_t*>(checksum->untyped_data());
    out[0] = static_cast<uint32_t>(total);
    out[1] = static_cast<uint32_t>(total >> 32);
  });
}

}  // namespace
}  // namespace jmoe

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(jmoe_read, jmoe::read,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("num_threads"));
#pragma GCC visibility pop
