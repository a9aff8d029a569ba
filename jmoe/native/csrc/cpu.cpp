// Which kernels to use: looked up once, from what the processor says.
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "export.h"
#include "kernels.h"

namespace jmoe {

extern const Kernels kernels_portable;
#ifdef JMOE_HAVE_AVX2
extern const Kernels kernels_avx2;
#endif
#ifdef JMOE_HAVE_AVX512
extern const Kernels kernels_avx512;
#endif
#ifdef JMOE_HAVE_VNNI
extern const Kernels kernels_vnni;
#endif

namespace {

std::vector<const Kernels*> find_supported() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  // These ask the operating system, too, whether it saves the registers.
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  [[maybe_unused]] const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef JMOE_HAVE_VNNI
  if (avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back(&kernels_vnni);
#endif
#ifdef JMOE_HAVE_AVX512
  if (avx512) found.push_back(&kernels_avx512);
#endif
#ifdef JMOE_HAVE_AVX2
  if (avx2) found.push_back(&kernels_avx2);
#endif
#endif
  found.push_back(&kernels_portable);
  return found;
}

const std::vector<const Kernels*>& supported() {
  static const std::vector<const Kernels*> found = find_supported();
  return found;
}

// The kernels of an instruction set, or null if there are none here.
const Kernels* find(const char* name) {
  for (const Kernels* kernels : supported()) {
    if (std::strcmp(kernels->name, name) == 0) return kernels;
  }
  return nullptr;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{supported().front()};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace jmoe

// Counts up whenever an operation's arguments change: library.py has the same number.
JMOE_EXPORT int jmoe_abi_version() { return 1; }

// Comma-separated, the best one first.
JMOE_EXPORT const char* jmoe_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const jmoe::Kernels* kernels : jmoe::supported()) {
      joined += (joined.empty() ? "" : ",") + std::string(kernels->name);
    }
    return joined;
  }();
  return names.c_str();
}

JMOE_EXPORT const char* jmoe_isa() { return jmoe::kernels().name; }

JMOE_EXPORT int jmoe_set_isa(const char* name) {
  const jmoe::Kernels* found = jmoe::find(name);
  if (found == nullptr) return 1;
  jmoe::chosen().store(found, std::memory_order_relaxed);
  return 0;
}

// The table, a const jmoe::Kernels*, of an instruction set that jmoe_isas() names, else null: for tests of kernels
// without XLA (tests/native/guards.cpp).
JMOE_EXPORT const void* jmoe_kernels_of(const char* isa) { return jmoe::find(isa); }
