// jmoe_attend: q [B, L, H, P], k and v [B, G, M, P], start_B [B] to [B, L, H, P] in the type of q. See attention.h.
#include "attention.h"
#include "ffi_common.h"

namespace jmoe {
namespace {

ffi::Error attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer start_B,
                  ffi::Result<ffi::AnyBuffer> out, int64_t window, int64_t num_threads) {
  return guarded("jmoe_attend", [&] {
    require_rank(q, 4, "q");
    require_rank(k, 4, "k");
    const auto q_shape = q.dimensions();
    const auto k_shape = k.dimensions();
    const int64_t B = q_shape[0], L = q_shape[1], H = q_shape[2], P = q_shape[3];
    const int64_t G = k_shape[1], M = k_shape[2];
    require_shape(k, {B, G, M, P}, "k");
    require_shape(v, {B, G, M, P}, "v");
    require_type(v, k.element_type(), "v");
    require_type(start_B, ffi::DataType::S32, "start_B");
    require_shape(start_B, {B}, "start_B");
    require_aligned(start_B.untyped_data(), 4, "start_B");
    require_type(*out, q.element_type(), "the result");
    require_shape(*out, {B, L, H, P}, "the result");
    require(H == 0 || (G > 0 && H % G == 0), "the key-value heads do not divide the query heads");
    require(P <= kMaxHeadDim, "the head dimension is above 1024");
    require(window >= 0, "window is negative");
    const AttentionCall call = {B, L, H, P, G, M, float_view(q, "q"), float_view(k, "k"), float_view(v, "v"),
                                static_cast<const int32_t*>(start_B.untyped_data()), window, out->untyped_data()};
    require_aligned(call.out, static_cast<size_t>(size_of(call.q.type)), "the result");
    auto threads = pool_threads(pool, num_threads);
    attend_all(kernels(), threads, call);
  });
}

}  // namespace
}  // namespace jmoe

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(jmoe_attend, jmoe::attend,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("num_threads"));
#pragma GCC visibility pop
