// jmoe_linear: x [R, K] (float32 or bfloat16) times a matrix [N, K], as float32 [R, N].
//
// The matrix is one array of floats (attribute bits is 0), or the arrays of quant/quant_array.py in the order of its
// PART_NAMES: codes, scales, zeros unless symmetric, nested if nested.
#include <algorithm>

#include "ffi_common.h"
#include "matrix_arguments.h"
#include "products.h"

namespace jmoe {
namespace {

struct Format {
  int64_t bits, group_size, symmetric, nested;
};

MatrixView matrix_of(ffi::RemainingArgs args, const Format& format, int64_t columns) {
  size_t next = 1;
  const auto take = [&](const char* name) {
    if (next > args.size()) fail(std::string(name) + " is missing");
    auto buffer = args.get<ffi::AnyBuffer>(next++ - 1);
    if (!buffer.has_value()) fail(std::string(name) + " cannot be read");
    return *buffer;
  };
  MatrixView matrix{};
  if (format.bits == 0) {
    const ffi::AnyBuffer values = take("the matrix");
    require_rank(values, 2, "the matrix");
    if (values.dimensions()[1] != columns) fail("the matrix has the wrong number of columns: " + describe(values));
    matrix.dense = {values.dimensions()[0], columns, float_view(values, "the matrix")};
  } else {
    const QuantFormat checked =
        check_format(format.bits, format.group_size, format.symmetric, format.nested, columns);
    const ffi::AnyBuffer codes = take("codes");
    require_type(codes, ffi::DataType::U8, "codes");
    require_rank(codes, 2, "codes");
    const int64_t rows = codes.dimensions()[0];
    require_shape(codes, {rows, checked.code_bytes()}, "codes");
    const auto parameter = [&](const char* name) {
      const ffi::AnyBuffer buffer = take(name);
      require_type(buffer, checked.parameter_type(), name);
      require_shape(buffer, {rows, checked.num_groups()}, name);
      require_aligned(buffer.untyped_data(), ffi::ByteWidth(checked.parameter_type()), name);
      return buffer.untyped_data();
    };
    QuantArrays arrays{};
    arrays.codes = codes.untyped_data();
    arrays.scales = parameter("scales");
    if (!checked.symmetric) arrays.zeros = parameter("zeros");
    int64_t num_nested = 0;
    if (checked.nested) {
      const ffi::AnyBuffer nested = take("nested");
      require_type(nested, ffi::DataType::F32, "nested");
      require_rank(nested, 3, "nested");
      num_nested = nested.dimensions()[1];
      require_shape(nested, {rows, num_nested, checked.nested_width()}, "nested");
      require_aligned(nested.untyped_data(), 4, "nested");
      arrays.nested = nested.untyped_data();
    }
    check_num_nested(checked, num_nested);
    matrix.quant = quant_view(checked, rows, num_nested, arrays);
  }
  require(next == args.size() + 1, "there are more arrays than the format has");
  return matrix;
}

ffi::Error linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> y,
                  int64_t bits, int64_t group_size, int64_t symmetric, int64_t nested, int64_t activation_bits,
                  int64_t num_threads) {
  return guarded("jmoe_linear", [&] {
    require_rank(x, 2, "x");
    const int64_t num_rows = x.dimensions()[0], columns = x.dimensions()[1];
    const FloatView x_view = float_view(x, "x");
    require(columns > 0, "x has no columns");
    check_activation_bits(activation_bits);
    const MatrixView w = matrix_of(args, {bits, group_size, symmetric, nested}, columns);
    require_type(*y, ffi::DataType::F32, "the result");
    require_shape(*y, {num_rows, w.rows()}, "the result");
    require_aligned(y->untyped_data(), 4, "the result");
    if (num_rows == 0 || w.rows() == 0) return;

    auto threads = pool_threads(pool, num_threads);
    AlignedBuffer x_memory, rows_memory;
    const float* floats = as_float32(kernels(), x_view, num_rows * columns, x_memory);
    const Activations rows(kernels(), threads, w, floats, num_rows, static_cast<int>(activation_bits), rows_memory);
    const int64_t part_rows = rows_per_part(w.rows(), threads.num_threads());
    float* out = y->typed_data<float>();
    threads.run((w.rows() + part_rows - 1) / part_rows, [&](int64_t part, int) {
      const int64_t first = part * part_rows;
      rows.multiply(w, first, std::min(part_rows, w.rows() - first), {nullptr, num_rows, out + first, w.rows()});
    });
  });
}

}  // namespace
}  // namespace jmoe

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(jmoe_linear, jmoe::linear,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<int64_t>("symmetric")
                                  .Attr<int64_t>("nested")
                                  .Attr<int64_t>("activation_bits")
                                  .Attr<int64_t>("num_threads"));
#pragma GCC visibility pop
