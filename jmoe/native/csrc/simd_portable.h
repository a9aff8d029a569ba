// Vectors as arrays: for any machine. Compilers make NEON of these loops on ARM.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define JMOE_VECTORS_ARE_ARRAYS

namespace jmoe::JMOE_ISA {

constexpr int kFloats = 8;
constexpr int kBytes = 4 * kFloats;

// Accumulators that leave registers for operands: of 4 floats on ARM as on x86, which has half as many.
#if defined(__aarch64__)
constexpr int kAccumulators = 12;
#else
constexpr int kAccumulators = 4;
#endif

struct Floats {
  float lane[kFloats];
};
struct Ints {  // int32 lanes, or bytes
  int32_t lane[kFloats];
};

template <typename F>
inline Floats each_float(F f) {
  Floats r;
  for (int i = 0; i < kFloats; ++i) r.lane[i] = f(i);
  return r;
}
template <typename F>
inline Ints each_int(F f) {
  Ints r;
  for (int i = 0; i < kFloats; ++i) r.lane[i] = f(i);
  return r;
}

inline Floats broadcast(float x) {
  return each_float([&](int) { return x; });
}
inline Floats zero() { return broadcast(0.0f); }
inline Floats load(const float* p) {
  return each_float([&](int i) { return p[i]; });
}
inline void store(float* p, Floats x) { std::memcpy(p, x.lane, sizeof(x.lane)); }
inline Floats add(Floats a, Floats b) {
  return each_float([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Floats sub(Floats a, Floats b) {
  return each_float([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Floats mul(Floats a, Floats b) {
  return each_float([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Floats div(Floats a, Floats b) {
  return each_float([&](int i) { return a.lane[i] / b.lane[i]; });
}
// The second operand if one is NaN.
inline Floats max(Floats a, Floats b) {
  return each_float([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Floats min(Floats a, Floats b) {
  return each_float([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Floats abs(Floats a) {
  return each_float([&](int i) { return std::fabs(a.lane[i]); });
}
// a * b + c; rounded twice where the machine has no other way.
inline Floats fma(Floats a, Floats b, Floats c) {
  return each_float([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline float sum(Floats a) {
  for (int step = kFloats / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) a.lane[i] += a.lane[i + step];
  }
  return a.lane[0];
}
inline float max_of(Floats a) {
  float r = a.lane[0];
  for (int i = 1; i < kFloats; ++i) r = a.lane[i] > r ? a.lane[i] : r;
  return r;
}
// Lane i is lane index[i] of a, modulo the number of lanes.
inline Floats permute(Floats a, Ints index) {
  return each_float([&](int i) { return a.lane[index.lane[i] & (kFloats - 1)]; });
}

inline Floats load_u8(const uint8_t* p) {
  return each_float([&](int i) { return static_cast<float>(p[i]); });
}
inline Floats load_bf16(const uint16_t* p) {
  Ints bits = each_int([&](int i) {
    uint16_t half;
    std::memcpy(&half, p + i, sizeof(half));
    return static_cast<int32_t>(static_cast<uint32_t>(half) << 16);
  });
  Floats r;
  std::memcpy(&r, &bits, sizeof(r));
  return r;
}

// The first n <= kFloats lanes: the others are zero, or stay unwritten.
inline Floats broadcast_some(float x, int64_t n) {
  return each_float([&](int i) { return i < n ? x : 0.0f; });
}
inline Floats load_some(const float* p, int64_t n) {
  return each_float([&](int i) { return i < n ? p[i] : 0.0f; });
}
inline void store_some(float* p, Floats x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = x.lane[i];
}
inline Floats load_u8_some(const uint8_t* p, int64_t n) {
  uint8_t bytes[kFloats] = {};
  for (int64_t i = 0; i < n; ++i) bytes[i] = p[i];
  return load_u8(bytes);
}
inline Floats load_bf16_some(const uint16_t* p, int64_t n) {
  uint16_t halves[kFloats] = {};
  for (int64_t i = 0; i < n; ++i) halves[i] = p[i];
  return load_bf16(halves);
}
// Of 2 * kFloats neighbours, those with even and those with odd places.
inline void load_pairs(const float* p, Floats& even, Floats& odd) {
  even = each_float([&](int i) { return p[2 * i]; });
  odd = each_float([&](int i) { return p[2 * i + 1]; });
}
inline void load_pairs_bf16(const uint16_t* p, Floats& even, Floats& odd) {
  float all[2 * kFloats];
  store(all, load_bf16(p));
  store(all + kFloats, load_bf16(p + kFloats));
  load_pairs(all, even, odd);
}
inline void load_pairs_bf16_some(const uint16_t* p, int64_t n, Floats& even, Floats& odd) {  // n < 2 * kFloats
  uint16_t halves[2 * kFloats] = {};
  for (int64_t i = 0; i < n; ++i) halves[i] = p[i];
  load_pairs_bf16(halves, even, odd);
}
inline void store_pairs(float* p, Floats even, Floats odd) {
  for (int i = 0; i < kFloats; ++i) {
    p[2 * i] = even.lane[i];
    p[2 * i + 1] = odd.lane[i];
  }
}
inline Ints bits_of(Floats a) {
  Ints r;
  std::memcpy(&r, &a, sizeof(r));
  return r;
}
inline Floats from_bits(Ints a) {
  Floats r;
  std::memcpy(&r, &a, sizeof(r));
  return r;
}
// To the nearest bfloat16, ties to even; NaN stays NaN.
inline void store_bf16_some(uint16_t* p, Floats a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &a.lane[i], sizeof(bits));
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    bits = nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
    p[i] = static_cast<uint16_t>(bits >> 16);
  }
}
inline void store_bf16(uint16_t* p, Floats a) { store_bf16_some(p, a, kFloats); }

inline Ints broadcast_int(int32_t x) {
  return each_int([&](int) { return x; });
}
inline Ints zero_ints() { return broadcast_int(0); }
inline Ints load_ints(const void* p) {
  Ints r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
// The first n < kBytes bytes, and zeros; reads no other.
inline Ints load_bytes_some(const void* p, int64_t n) {
  uint8_t bytes[kBytes] = {};
  const uint8_t* from = static_cast<const uint8_t*>(p);
  for (int64_t i = 0; i < n; ++i) bytes[i] = from[i];
  return load_ints(bytes);
}
inline void store_ints(void* p, Ints x) { std::memcpy(p, &x, sizeof(x)); }
inline Ints bit_and(Ints a, Ints b) {
  return each_int([&](int i) { return a.lane[i] & b.lane[i]; });
}
inline Ints bit_or(Ints a, Ints b) {
  return each_int([&](int i) { return a.lane[i] | b.lane[i]; });
}
inline Ints bit_xor(Ints a, Ints b) {
  return each_int([&](int i) { return a.lane[i] ^ b.lane[i]; });
}
inline Ints add_ints(Ints a, Ints b) {
  return each_int([&](int i) { return a.lane[i] + b.lane[i]; });
}
template <int kBits>
inline Ints shift_left(Ints a) {  // int32 lanes
  return each_int([&](int i) {
    return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) << kBits);
  });
}
// Of int32 lanes, rounding down.
template <int kBits>
inline Ints shift_right(Ints a) {
  return each_int([&](int i) { return a.lane[i] >> kBits; });
}
// Of lanes of 16 bits: bits of one byte reach the next one, and must be masked.
template <int kBits>
inline Ints shift_right_16(Ints a) {
  return each_int([&](int i) {
    const uint32_t x = static_cast<uint32_t>(a.lane[i]);
    return static_cast<int32_t>(((x >> 16) >> kBits) << 16 | (x & 0xffffu) >> kBits);
  });
}
inline Floats to_floats(Ints a) {
  return each_float([&](int i) { return static_cast<float>(a.lane[i]); });
}
// Nearest, ties to even. |a| < 2^31.
inline Ints to_ints(Floats a) {
  return each_int([&](int i) {  // of NaN a conversion may be anything, and is 0 here
    return std::fabs(a.lane[i]) < 2147483648.0f ? static_cast<int32_t>(std::nearbyintf(a.lane[i])) : 0;
  });
}
// The lowest byte of every int32 lane.
inline void store_low_bytes(int8_t* p, Ints a) {
  for (int i = 0; i < kFloats; ++i) p[i] = static_cast<int8_t>(a.lane[i]);
}

// acc + sum of four products u8 * s8 in every int32 lane. kSmall: u8 < 128.
template <bool kSmall>
inline Ints dot(Ints acc, Ints u8, Ints s8) {
  uint8_t u[kBytes];
  int8_t s[kBytes];
  std::memcpy(u, &u8, sizeof(u));
  std::memcpy(s, &s8, sizeof(s));
  return each_int([&](int i) {
    int32_t total = acc.lane[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) total += int32_t{u[j]} * int32_t{s[j]};
    return total;
  });
}

// Lane i is the sum of row i, added up in the same order for every i.
inline Floats sums(const Floats (&row)[kFloats]) {
  return each_float([&](int i) { return sum(row[i]); });
}

// Lane j of row i becomes lane i of row j.
inline void transpose(Ints (&row)[kFloats]) {
  for (int i = 0; i < kFloats; ++i) {
    for (int j = i + 1; j < kFloats; ++j) {
      const int32_t lane = row[i].lane[j];
      row[i].lane[j] = row[j].lane[i];
      row[j].lane[i] = lane;
    }
  }
}

inline Ints in_register(Ints a) { return a; }

inline void prefetch(const void* p) { __builtin_prefetch(p); }
// Into the second cache, and not into the first: for what is needed later.
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace jmoe::JMOE_ISA
