// Calls kernels with arrays that end, or begin, at memory that no process may touch, and with results between
// sentinels: one byte read or written beside an array is a crash or a failed check here, and never luck.
//
//   guards LIBRARY ISA SEED NUM_ROUNDS
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using jmoe::DenseView;
using jmoe::FloatType;
using jmoe::FloatView;
using jmoe::Kernels;
using jmoe::QuantRows;
using jmoe::QuantView;
using jmoe::Selection;

std::string what;  // is being done: what to say if it goes wrong

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "%s: %s\n", what.c_str(), message.c_str());
  std::exit(1);
}

// Reached where a kernel touches a guard.
void on_signal(int) {
  const std::string message = what + ": touched memory beside an array\n";
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, message.data(), message.size());
  _exit(1);
}

std::mt19937_64 generator;

int64_t random_int(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
float random_normal() { return std::normal_distribution<float>()(generator); }

enum class Place { kEnd, kBegin };  // which end of an array is at memory that must not be touched

// num_bytes between two inaccessible pages, next to one of them.
class Guarded {
 public:
  Guarded(int64_t num_bytes, Place place, int64_t alignment = 1) : num_bytes_(num_bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t inner = (num_bytes + page - 1) / page * page;
    mapped_bytes_ = inner + 2 * page;
    mapped_ = static_cast<uint8_t*>(mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                                         -1, 0));
    if (mapped_ == MAP_FAILED) fail("no memory");
    if (mprotect(mapped_, page, PROT_NONE) || mprotect(mapped_ + page + inner, page, PROT_NONE)) fail("no guards");
    const int64_t gap = place == Place::kEnd ? (inner - num_bytes) / alignment * alignment : 0;
    data_ = mapped_ + page + gap;
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(mapped_, mapped_bytes_); }

  template <typename T = uint8_t>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  int64_t num_bytes_;
  int64_t mapped_bytes_;
  uint8_t* mapped_;
  uint8_t* data_;
};

using Memory = std::unique_ptr<Guarded>;

Memory copy_of(const void* data, size_t num_bytes, Place place) {
  auto memory = std::make_unique<Guarded>(static_cast<int64_t>(num_bytes), place);
  if (num_bytes > 0) std::memcpy(memory->as(), data, num_bytes);
  return memory;
}

template <typename T>
Memory copy_of(const std::vector<T>& values, Place place) {
  return copy_of(values.data(), values.size() * sizeof(T), place);
}

constexpr uint32_t kSentinel = 0x7fc5a5a5;  // a NaN that no kernel makes

// Rows of floats of which a kernel fills some columns: all others must stay as they are.
class Results {
 public:
  Results(int64_t num_rows, int64_t stride, int64_t num_columns, Place place)
      : num_rows_(num_rows), stride_(stride), num_columns_(num_columns),
        memory_(num_rows > 0 ? 4 * ((num_rows - 1) * stride + num_columns) : 0, place) {
    for (int64_t i = 0; i < memory_.num_bytes() / 4; ++i) memory_.as<uint32_t>()[i] = kSentinel;
  }

  float* data() const { return memory_.as<float>(); }

  // The columns of all rows, once more without what lies between.
  std::vector<uint32_t> check() const {
    std::vector<uint32_t> values;
    for (int64_t i = 0; i < memory_.num_bytes() / 4; ++i) {
      const bool is_result = i % stride_ < num_columns_;
      const uint32_t value = memory_.as<uint32_t>()[i];
      if (is_result && value == kSentinel) fail("a result is missing: " + std::to_string(i));
      if (!is_result && value != kSentinel) fail("written beside the results: " + std::to_string(i));
      if (is_result) values.push_back(value);
    }
    return values;
  }

 private:
  int64_t num_rows_, stride_, num_columns_;
  Guarded memory_;
};

std::vector<float> random_floats(int64_t n) {
  std::vector<float> values(n);
  for (float& value : values) value = random_normal();
  return values;
}

std::vector<uint16_t> to_bfloat16(const std::vector<float>& values) {
  std::vector<uint16_t> halves;
  for (float value : values) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    halves.push_back(static_cast<uint16_t>(bits >> 16));
  }
  return halves;
}

Memory float_memory(const std::vector<float>& values, FloatType type, Place place) {
  return type == FloatType::kFloat32 ? copy_of(values, place) : copy_of(to_bfloat16(values), place);
}

FloatType random_type() { return random_int(0, 1) ? FloatType::kFloat32 : FloatType::kBFloat16; }

template <typename T>
void require_equal(const std::vector<T>& a, const std::vector<T>& b, const char* message) {
  if (a != b) fail(message);
}

// Runs a call with all arrays at inaccessible memory behind them, then before them: twice the same, bit by bit.
template <typename Call>
auto with_guards(Call call) {
  const auto behind = call(Place::kEnd);
  require_equal(behind, call(Place::kBegin), "other results at another place");
  return behind;
}

// Calls `one` for runs of neighbours in [0, num): a kernel's results do not depend on how its work is split.
void in_pieces(int64_t num, const std::function<void(int64_t first, int64_t size)>& one) {
  for (int64_t first = 0; first < num;) {
    const int64_t size = random_int(1, num - first);
    one(first, size);
    first += size;
  }
}

std::string words(std::initializer_list<std::pair<const char*, int64_t>> parts) {
  std::string text;
  for (const auto& [name, value] : parts) {
    text += std::string(text.empty() ? "" : ", ") + name + " " + std::to_string(value);
  }
  return text;
}

// Which rows of x to multiply: all in order, or some of them in any order.
struct Selected {
  std::vector<int32_t> index;
  int64_t num_rows;
  bool all;
};

Selected select_rows(int64_t num_x_rows) {
  Selected selected{{}, num_x_rows, random_int(0, 1) == 0};
  if (!selected.all) {
    selected.num_rows = random_int(0, 2 * num_x_rows);
    for (int64_t i = 0; i < selected.num_rows; ++i) {
      selected.index.push_back(static_cast<int32_t>(random_int(0, num_x_rows - 1)));
    }
  }
  return selected;
}

// Few numbers mostly, sometimes many.
int64_t random_size(int64_t small, int64_t large) { return random_int(1, random_int(0, 4) == 0 ? large : small); }

void check_quant(const Kernels& kernels) {
  constexpr int kBits[] = {2, 3, 4, 8};
  QuantView w{};
  w.bits = kBits[random_int(0, 3)];
  w.group_size = 1 << random_int(w.bits == 3 ? 5 : 4, 8);
  const int64_t groups = random_int(0, 9) == 0 ? random_int(256, 300) : random_size(5, 40);
  w.rows = random_size(9, 70);
  w.columns = groups * w.group_size;
  const bool nested = random_int(0, 1), symmetric = random_int(0, 1);
  if (nested) {
    do {
      w.num_nested = static_cast<int32_t>(random_int(1, groups));
    } while (groups % w.num_nested != 0);
    w.nested_size = static_cast<int32_t>(groups / w.num_nested);
  }
  const int bits = 8 * static_cast<int>(random_int(1, 3));
  const int64_t num_x_rows = random_size(6, 20), x_stride = w.columns + random_int(0, 20);
  const Selected selected = select_rows(num_x_rows);
  const int64_t first_row = random_int(0, w.rows - 1), num_rows = random_int(1, w.rows - first_row);
  const int64_t stride = num_rows + random_int(0, 5);
  what = std::string(kernels.name) + " quant: " +
         words({{"bits", w.bits}, {"group_size", w.group_size}, {"rows", w.rows}, {"groups", groups},
                {"num_nested", w.num_nested}, {"symmetric", symmetric}, {"activation bits", bits},
                {"rows of x", num_x_rows}, {"selected", selected.all ? -1 : selected.num_rows},
                {"first row", first_row}, {"num_rows", num_rows}, {"stride", stride}});

  std::vector<uint8_t> codes(w.rows * w.row_bytes());
  for (uint8_t& code : codes) code = static_cast<uint8_t>(random_int(0, 255));
  std::vector<uint8_t> nested_parameters(w.rows * groups);
  for (uint8_t& code : nested_parameters) code = static_cast<uint8_t>(random_int(0, 255));
  const std::vector<uint16_t> parameters = to_bfloat16(random_floats(w.rows * groups));
  const std::vector<float> second = random_floats(w.rows * w.num_nested * (symmetric ? 2 : 4));
  const std::vector<float> x = random_floats((num_x_rows - 1) * x_stride + w.columns);

  const auto results = [&](Place place, bool split) {
    const auto parameter = [&] { return nested ? copy_of(nested_parameters, place) : copy_of(parameters, place); };
    const Memory codes_memory = copy_of(codes, place), scales = parameter(), zeros = parameter();
    const Memory second_memory = copy_of(second, place), x_memory = copy_of(x, place);
    const Memory index = copy_of(selected.index, place);
    QuantView view = w;
    view.codes = codes_memory->as();
    view.scales = scales->as();
    view.zeros = symmetric ? nullptr : zeros->as();
    view.nested = nested ? second_memory->as<float>() : nullptr;

    QuantView like = view;  // the form of activations depends on the format only
    like.codes = nullptr, like.scales = nullptr, like.zeros = nullptr, like.nested = nullptr;
    const Guarded rows_memory(kernels.quant_rows_bytes(like, num_x_rows, bits), place, 64);
    std::memset(rows_memory.as(), 0xff, rows_memory.num_bytes());
    QuantRows* rows = kernels.make_quant_rows(like, num_x_rows, bits, rows_memory.as());
    const auto quantize = [&](int64_t first, int64_t size) {
      kernels.quantize_rows(rows, x_memory->as<float>(), x_stride, first, size);
    };
    Results y(selected.num_rows, stride, num_rows, place);
    const auto multiply = [&](int64_t first, int64_t size) {
      kernels.quant_product(view, first_row + first, size, rows,
                            {selected.all ? nullptr : index->as<int32_t>(), selected.num_rows, y.data() + first,
                             stride});
    };
    if (split) {
      in_pieces(num_x_rows, quantize);
      in_pieces(num_rows, multiply);
    } else {
      quantize(0, num_x_rows);
      multiply(0, num_rows);
    }
    return y.check();
  };
  const auto whole = with_guards([&](Place place) { return results(place, false); });
  require_equal(whole, results(Place::kEnd, true), "other results in pieces");
}

void check_dense(const Kernels& kernels) {
  const FloatType type = random_type();
  const int64_t rows = random_size(9, 70);
  const int64_t columns = random_int(0, 9) == 0 ? random_int(2000, 5000) : random_int(1, 150);
  const int64_t num_x_rows = random_size(6, 40), x_stride = columns + random_int(0, 20);
  const Selected selected = select_rows(num_x_rows);
  const int64_t first_row = random_int(0, rows - 1), num_rows = random_int(1, rows - first_row);
  const int64_t stride = num_rows + random_int(0, 5);
  what = std::string(kernels.name) + " dense: " +
         words({{"type", static_cast<int>(type)}, {"rows", rows}, {"columns", columns}, {"rows of x", num_x_rows},
                {"selected", selected.all ? -1 : selected.num_rows}, {"first row", first_row},
                {"num_rows", num_rows}, {"stride", stride}});
  const std::vector<float> w = random_floats(rows * columns);
  const std::vector<float> x = random_floats((num_x_rows - 1) * x_stride + columns);
  const auto results = [&](Place place, bool split) {
    const Memory w_memory = float_memory(w, type, place), x_memory = copy_of(x, place);
    const Memory index = copy_of(selected.index, place);
    const DenseView view{rows, columns, {w_memory->as(), type}};
    Results y(selected.num_rows, stride, num_rows, place);
    const auto multiply = [&](int64_t first, int64_t size) {
      kernels.dense_product(view, first_row + first, size, x_memory->as<float>(), x_stride,
                            {selected.all ? nullptr : index->as<int32_t>(), selected.num_rows, y.data() + first,
                             stride});
    };
    if (split) {
      in_pieces(num_rows, multiply);
    } else {
      multiply(0, num_rows);
    }
    return y.check();
  };
  const auto whole = with_guards([&](Place place) { return results(place, false); });
  require_equal(whole, results(Place::kEnd, true), "other results in pieces");
}

void check_swiglu(const Kernels& kernels) {
  const int64_t n = random_int(0, 100);
  what = std::string(kernels.name) + " swiglu: " + words({{"n", n}});
  const std::vector<float> gate = random_floats(n), up = random_floats(n);
  const auto apart = with_guards([&](Place place) {
    const Memory gate_memory = copy_of(gate, place), up_memory = copy_of(up, place);
    const Results y(n > 0, n + 1, n, place);
    kernels.swiglu(gate_memory->as<float>(), up_memory->as<float>(), y.data(), n);
    return y.check();
  });
  const auto in_place = with_guards([&](Place place) {
    const Memory gate_memory = copy_of(gate, place), up_memory = copy_of(up, place);
    kernels.swiglu(gate_memory->as<float>(), up_memory->as<float>(), gate_memory->as<float>(), n);
    return std::vector<uint32_t>(gate_memory->as<uint32_t>(), gate_memory->as<uint32_t>() + n);
  });
  require_equal(apart, in_place, "other results in place");
}

void check_conversions(const Kernels& kernels) {
  const FloatType type = random_type();
  const int64_t first = random_int(0, 40), n = random_int(0, 100);
  what = std::string(kernels.name) + " conversions: " +
         words({{"type", static_cast<int>(type)}, {"first", first}, {"n", n}});
  const std::vector<float> values = random_floats(first + n);
  const auto floats = with_guards([&](Place place) {
    const Memory from = float_memory(values, type, place);
    const Results y(n > 0, n + 1, n, place);
    kernels.to_float32({from->as(), type}, first, y.data(), n);
    return y.check();
  });
  const auto back = with_guards([&](Place place) {
    const Memory from = copy_of(floats, place);
    const Guarded to((first + n) * jmoe::size_of(type), place);
    std::memset(to.as(), 0xa5, to.num_bytes());
    kernels.from_float32(from->as<float>(), to.as(), type, first, n);
    return std::vector<uint8_t>(to.as(), to.as() + to.num_bytes());
  });
  const Memory expected = float_memory(values, type, Place::kEnd);
  const int64_t first_byte = first * jmoe::size_of(type);
  for (int64_t i = 0; i < static_cast<int64_t>(back.size()); ++i) {
    if (back[i] != (i < first_byte ? 0xa5 : expected->as()[i])) fail("wrong at byte " + std::to_string(i));
  }
}

void check_attend(const Kernels& kernels) {
  const FloatType type = random_type();
  const int64_t num_queries = random_size(6, 20), head_dim = random_int(1, 140), num_keys = random_size(10, 200);
  what = std::string(kernels.name) + " attend: " +
         words({{"type", static_cast<int>(type)}, {"queries", num_queries}, {"head_dim", head_dim},
                {"keys", num_keys}});
  std::vector<int64_t> first_key, end_key;
  for (int64_t i = 0; i < num_queries; ++i) {
    first_key.push_back(random_int(0, num_keys));
    end_key.push_back(random_int(first_key.back(), num_keys));
  }
  const std::vector<float> q = random_floats(num_queries * head_dim);
  const std::vector<float> k = random_floats(num_keys * head_dim), v = random_floats(num_keys * head_dim);
  with_guards([&](Place place) {
    const Memory q_memory = copy_of(q, place), k_memory = float_memory(k, type, place);
    const Memory v_memory = float_memory(v, type, place);
    const Memory first = copy_of(first_key, place), end = copy_of(end_key, place);
    const Results out(num_queries, head_dim, head_dim, place), max(num_queries, 1, 1, place);
    const Results total(num_queries, 1, 1, place);
    kernels.attend({q_memory->as<float>(), num_queries, head_dim, k_memory->as(), v_memory->as(), type,
                    first->as<int64_t>(), end->as<int64_t>(), num_keys, out.data(), max.data(), total.data()});
    std::vector<uint32_t> all = out.check();
    for (const Results* more : {&max, &total}) {
      for (uint32_t value : more->check()) all.push_back(value);
    }
    return all;
  });
}

void check_read_bytes(const Kernels& kernels) {
  const int64_t n = random_int(0, random_int(0, 3) == 0 ? 20000 : 600);
  what = std::string(kernels.name) + " read_bytes: " + words({{"n", n}});
  std::vector<uint8_t> bytes(n);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random_int(0, 255));
  std::vector<uint64_t> expected(1, 0);
  for (int64_t i = 0; i < n; ++i) expected[0] ^= uint64_t{bytes[i]} << i % 8 * 8;
  const auto read = with_guards([&](Place place) {
    const Memory memory = copy_of(bytes, place);
    return std::vector<uint64_t>{kernels.read_bytes(memory->as(), n)};
  });
  require_equal(read, expected, "another sum of all words");
}

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (library == nullptr) fail(dlerror());
  const auto kernels_of =
      reinterpret_cast<const void* (*)(const char*)>(dlsym(library, "jmoe_kernels_of"));
  if (kernels_of == nullptr) fail("the library has no jmoe_kernels_of");
  const auto* kernels = static_cast<const Kernels*>(kernels_of(arguments[2]));
  if (kernels == nullptr) fail(std::string("no instruction set ") + arguments[2]);
  std::signal(SIGSEGV, on_signal);
  std::signal(SIGBUS, on_signal);
  generator.seed(std::atoll(arguments[3]));
  const int64_t num_rounds = std::atoll(arguments[4]);
  for (int64_t i = 0; i < num_rounds; ++i) {
    for (auto* check : {check_quant, check_dense, check_swiglu, check_conversions, check_attend, check_read_bytes}) {
      check(*kernels);
    }
  }
  std::printf("%lld rounds\n", static_cast<long long>(num_rounds));
}
