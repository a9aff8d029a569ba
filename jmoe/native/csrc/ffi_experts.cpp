// jmoe_experts: the chosen experts of every token, read from blobs as quant/layout.py lays them out.
//
// x [T, D] (float32 or bfloat16), expert_ids s32 [T, K], weights f32 [T, K], valid pred [T], blobs [E, items] of uint8,
// bfloat16 or float32; out [T, D] like x. Attribute `layout`: for w1, w3 and w2 eight numbers each: bits (0: floats of
// the blobs' type), group size, symmetric, nested groups of a row (0: not nested), and the offsets in bytes of codes
// (or values), scales, zeros, nested.
//
// jmoe_experts_of_arrays: the same with plain weights w1, w3 [E, F, D] and w2 [E, D, F], bfloat16 or float32.
#include "experts.h"
#include "ffi_common.h"
#include "matrix_arguments.h"

namespace jmoe {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 31;  // of any dimension: products of two fit into 64 bits

// Checks that [offset, offset + num_bytes) lies in the blob; returns where it is in the first one.
const uint8_t* part(const uint8_t* blobs, int64_t blob_bytes, int64_t offset, int64_t num_bytes, int64_t alignment,
                    const char* name) {
  if (offset < 0 || num_bytes < 0 || offset > blob_bytes || num_bytes > blob_bytes - offset) {
    fail(std::string(name) + " lie outside of the blob");
  }
  if (offset % alignment != 0) fail(std::string(name) + " are misaligned in the blob");
  return blobs + offset;
}

MatrixView matrix_in_blob(const int64_t* layout, int64_t rows, int64_t columns, const uint8_t* blobs,
                          int64_t blob_bytes, ffi::DataType type) {
  const int64_t bits = layout[0], num_nested = layout[3];
  const int64_t* offsets = layout + 4;
  MatrixView matrix{};
  if (bits == 0) {
    require(type == ffi::DataType::BF16 || type == ffi::DataType::F32, "plain experts are not floats");
    const FloatType values = type == ffi::DataType::BF16 ? FloatType::kBFloat16 : FloatType::kFloat32;
    const int64_t size = size_of(values);
    matrix.dense = {rows, columns,
                    {part(blobs, blob_bytes, offsets[0], rows * columns * size, size, "values"), values}};
    return matrix;
  }
  require(type == ffi::DataType::U8, "blobs of few bits are not uint8");
  const QuantFormat format = check_format(bits, layout[1], layout[2], num_nested != 0, columns);
  check_num_nested(format, num_nested);
  const auto at = [&](int which, int64_t items_of_row, ffi::DataType item, const char* name) {
    const int64_t size = static_cast<int64_t>(ffi::ByteWidth(item));
    return part(blobs, blob_bytes, offsets[which], rows * items_of_row * size, size, name);
  };
  QuantArrays arrays{};
  arrays.codes = at(0, format.code_bytes(), ffi::DataType::U8, "codes");
  arrays.scales = at(1, format.num_groups(), format.parameter_type(), "scales");
  if (!format.symmetric) arrays.zeros = at(2, format.num_groups(), format.parameter_type(), "zeros");
  if (format.nested) arrays.nested = at(3, num_nested * format.nested_width(), ffi::DataType::F32, "nested");
  matrix.quant = quant_view(format, rows, num_nested, arrays);
  return matrix;
}

// Checks everything but the weights.
ExpertsCall check_call(ffi::AnyBuffer x, ffi::AnyBuffer expert_ids, ffi::AnyBuffer weights, ffi::AnyBuffer valid,
                       ffi::AnyBuffer out, int64_t num_experts, int64_t hidden_size, int64_t intermediate_size) {
  require_rank(x, 2, "x");
  ExpertsCall call{};
  call.num_tokens = x.dimensions()[0];
  call.num_experts = num_experts;
  call.hidden_size = hidden_size;
  call.intermediate_size = intermediate_size;
  require(0 < num_experts && num_experts < kMaxSize, "there is no expert");
  require(0 < hidden_size && hidden_size < kMaxSize, "hidden_size is out of range");
  require(0 < intermediate_size && intermediate_size < kMaxSize, "intermediate_size is out of range");
  call.x = float_view(x, "x");
  require_shape(x, {call.num_tokens, hidden_size}, "x");
  require_type(expert_ids, ffi::DataType::S32, "expert_ids");
  require_rank(expert_ids, 2, "expert_ids");
  call.top_k = expert_ids.dimensions()[1];
  require_shape(expert_ids, {call.num_tokens, call.top_k}, "expert_ids");
  require_aligned(expert_ids.untyped_data(), 4, "expert_ids");
  call.expert_ids = expert_ids.typed_data<int32_t>();
  require_type(weights, ffi::DataType::F32, "weights");
  require_shape(weights, {call.num_tokens, call.top_k}, "weights");
  require_aligned(weights.untyped_data(), 4, "weights");
  call.weights = weights.typed_data<float>();
  require_type(valid, ffi::DataType::PRED, "valid");
  require_shape(valid, {call.num_tokens}, "valid");
  call.valid = static_cast<const uint8_t*>(valid.untyped_data());
  if (out.element_type() != x.element_type()) fail("the result has not the type of x");
  require_shape(out, {call.num_tokens, hidden_size}, "the result");
  float_view(out, "the result");
  call.out = out.untyped_data();
  return call;
}

void run(const ExpertsCall& call, ffi::ThreadPool& pool, int64_t num_threads) {
  auto threads = pool_threads(pool, num_threads);
  if (call.num_tokens > 0) run_experts(call, threads);
}

ffi::Error experts(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer expert_ids, ffi::AnyBuffer weights,
                   ffi::AnyBuffer valid, ffi::AnyBuffer blobs, ffi::Result<ffi::AnyBuffer> out,
                   ffi::Span<const int64_t> layout, int64_t hidden_size, int64_t intermediate_size,
                   int64_t activation_bits, int64_t num_threads) {
  return guarded("jmoe_experts", [&] {
    require_rank(blobs, 2, "blobs");
    ExpertsCall call = check_call(x, expert_ids, weights, valid, *out, blobs.dimensions()[0], hidden_size,
                                  intermediate_size);
    const ffi::DataType type = blobs.element_type();
    require(type == ffi::DataType::U8 || type == ffi::DataType::BF16 || type == ffi::DataType::F32,
            "blobs are not uint8, bfloat16 or float32");
    require_aligned(blobs.untyped_data(), 4, "blobs");
    const int64_t blob_bytes = blobs.dimensions()[1] * static_cast<int64_t>(ffi::ByteWidth(type));
    require(blob_bytes % 4 == 0, "blobs are not a multiple of four bytes");
    check_activation_bits(activation_bits);
    call.activation_bits = static_cast<int>(activation_bits);
    require(layout.size() == 24, "the layout does not have 24 numbers");
    for (int i = 0; i < 3; ++i) {
      const int64_t rows = i == 2 ? hidden_size : intermediate_size;
      const int64_t columns = i == 2 ? intermediate_size : hidden_size;
      call.matrices[i] = matrix_in_blob(layout.begin() + 8 * i, rows, columns,
                                        static_cast<const uint8_t*>(blobs.untyped_data()), blob_bytes, type);
      call.strides[i] = blob_bytes;
    }
    for (int i = 0; i < 2; ++i) require(layout[i] == layout[8 + i], "w1 and w3 are not of one format");
    run(call, pool, num_threads);
  });
}

ffi::Error experts_of_arrays(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer expert_ids, ffi::AnyBuffer weights,
                             ffi::AnyBuffer valid, ffi::AnyBuffer w1, ffi::AnyBuffer w3, ffi::AnyBuffer w2,
                             ffi::Result<ffi::AnyBuffer> out, int64_t num_threads) {
  return guarded("jmoe_experts_of_arrays", [&] {
    require_rank(w1, 3, "w1");
    const int64_t num_experts = w1.dimensions()[0], width = w1.dimensions()[1], hidden = w1.dimensions()[2];
    ExpertsCall call = check_call(x, expert_ids, weights, valid, *out, num_experts, hidden, width);
    require_shape(w3, {num_experts, width, hidden}, "w3");
    require_shape(w2, {num_experts, hidden, width}, "w2");
    call.activation_bits = 24;  // of no effect
    const FloatView values[3] = {float_view(w1, "w1"), float_view(w3, "w3"), float_view(w2, "w2")};
    for (int i = 0; i < 3; ++i) {
      require(values[i].type == values[0].type, "the weights are not of one type");
      call.matrices[i].dense = i == 2 ? DenseView{hidden, width, values[i]} : DenseView{width, hidden, values[i]};
      call.strides[i] = width * hidden * size_of(values[i].type);
    }
    run(call, pool, num_threads);
  });
}

}  // namespace
}  // namespace jmoe

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(jmoe_experts, jmoe::experts,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<xla::ffi::Span<const int64_t>>("layout")
                                  .Attr<int64_t>("hidden_size")
                                  .Attr<int64_t>("intermediate_size")
                                  .Attr<int64_t>("activation_bits")
                                  .Attr<int64_t>("num_threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jmoe_experts_of_arrays, jmoe::experts_of_arrays,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("num_threads"));
#pragma GCC visibility pop
