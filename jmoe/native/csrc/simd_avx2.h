// Vectors of 256 bits.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace jmoe::JMOE_ISA {

constexpr int kFloats = 8;
constexpr int kBytes = 4 * kFloats;

// Accumulators that leave registers for operands.
constexpr int kAccumulators = 12;

using Floats = __m256;
using Ints = __m256i;  // int32 lanes, or bytes

inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats broadcast(float x) { return _mm256_set1_ps(x); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
// The second operand if one is NaN.
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats abs(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
// a * b + c, rounded once.
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Floats a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float max_of(Floats a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
// Lane i is lane index[i] of a, modulo the number of lanes.
inline Floats permute(Floats a, Ints index) { return _mm256_permutevar8x32_ps(a, index); }

inline Floats load_u8(const uint8_t* p) {
  int64_t bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes)));
}
inline Floats load_bf16(const uint16_t* p) {
  __m128i halves;
  std::memcpy(&halves, p, sizeof(halves));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// The first n <= kFloats lanes: the others are zero, or stay unwritten.
inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Floats broadcast_some(float x, int64_t n) {
  return _mm256_and_ps(_mm256_castsi256_ps(first_lanes(n)), broadcast(x));
}
inline Floats load_some(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline void store_some(float* p, Floats x, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), x); }
// Put together in registers: what was just written in pieces cannot be read as a whole at once.
inline Floats load_u8_some(const uint8_t* p, int64_t n) {
  uint64_t bytes = 0;
  for (int64_t i = n - 1; i >= 0; --i) bytes = bytes << 8 | p[i];
  return load_u8(reinterpret_cast<const uint8_t*>(&bytes));
}
inline Floats load_bf16_some(const uint16_t* p, int64_t n) {
  uint64_t halves[2] = {};
  for (int64_t i = n - 1; i >= 4; --i) halves[1] = halves[1] << 16 | p[i];
  for (int64_t i = (n < 4 ? n : 4) - 1; i >= 0; --i) halves[0] = halves[0] << 16 | p[i];
  const __m128i all = _mm_set_epi64x(static_cast<int64_t>(halves[1]), static_cast<int64_t>(halves[0]));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(all), 16));
}
// Of 2 * kFloats neighbours, those with even and those with odd places.
inline void load_pairs_bf16(const uint16_t* p, Floats& even, Floats& odd) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}
inline void load_pairs(const float* p, Floats& even, Floats& odd) {
  const __m256i places = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
  const __m256 a = _mm256_loadu_ps(p);
  const __m256 b = _mm256_loadu_ps(p + kFloats);
  even = _mm256_permutevar8x32_ps(_mm256_shuffle_ps(a, b, 0x88), places);
  odd = _mm256_permutevar8x32_ps(_mm256_shuffle_ps(a, b, 0xdd), places);
}
inline void load_pairs_bf16_some(const uint16_t* p, int64_t n, Floats& even, Floats& odd) {  // n < 2 * kFloats
  uint16_t halves[2 * kFloats] = {};
  for (int64_t i = 0; i < n; ++i) halves[i] = p[i];
  load_pairs_bf16(halves, even, odd);
}
inline void store_pairs(float* p, Floats even, Floats odd) {
  const __m256 a = _mm256_unpacklo_ps(even, odd);
  const __m256 b = _mm256_unpackhi_ps(even, odd);
  _mm256_storeu_ps(p, _mm256_permute2f128_ps(a, b, 0x20));
  _mm256_storeu_ps(p + kFloats, _mm256_permute2f128_ps(a, b, 0x31));
}
inline Ints bits_of(Floats a) { return _mm256_castps_si256(a); }
inline Floats from_bits(Ints a) { return _mm256_castsi256_ps(a); }
// To the nearest bfloat16, ties to even; NaN stays NaN.
inline __m128i to_bf16(Floats a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i halves = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}
inline void store_bf16(uint16_t* p, Floats a) {
  const __m128i halves = to_bf16(a);
  std::memcpy(p, &halves, sizeof(halves));
}
inline void store_bf16_some(uint16_t* p, Floats a, int64_t n) {
  uint16_t halves[kFloats];
  store_bf16(halves, a);
  for (int64_t i = 0; i < n; ++i) p[i] = halves[i];
}

inline Ints zero_ints() { return _mm256_setzero_si256(); }
inline Ints load_ints(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
// The first n < kBytes bytes, and zeros; reads no other.
inline Ints load_bytes_some(const void* p, int64_t n) {
  uint8_t bytes[kBytes] = {};
  const uint8_t* from = static_cast<const uint8_t*>(p);
  for (int64_t i = 0; i < n; ++i) bytes[i] = from[i];
  return load_ints(bytes);
}
inline void store_ints(void* p, Ints x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline Ints broadcast_int(int32_t x) { return _mm256_set1_epi32(x); }
inline Ints bit_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
inline Ints bit_or(Ints a, Ints b) { return _mm256_or_si256(a, b); }
inline Ints bit_xor(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
inline Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
template <int kBits>
inline Ints shift_left(Ints a) {  // int32 lanes
  return _mm256_slli_epi32(a, kBits);
}
// Of int32 lanes, rounding down.
template <int kBits>
inline Ints shift_right(Ints a) {
  return _mm256_srai_epi32(a, kBits);
}
// Of lanes of 16 bits: bits of one byte reach the next one, and must be masked.
template <int kBits>
inline Ints shift_right_16(Ints a) {
  return _mm256_srli_epi16(a, kBits);
}
inline Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
// Nearest, ties to even. |a| < 2^31.
inline Ints to_ints(Floats a) { return _mm256_cvtps_epi32(a); }
// The lowest byte of every int32 lane.
inline void store_low_bytes(int8_t* p, Ints a) {
  int32_t lanes[kFloats];
  store_ints(lanes, a);
  for (int i = 0; i < kFloats; ++i) p[i] = static_cast<int8_t>(lanes[i]);
}

// acc + sum of four products u8 * s8 in every int32 lane. kSmall: u8 < 128.
template <bool kSmall>
inline Ints dot(Ints acc, Ints u8, Ints s8) {
  if constexpr (kSmall) {
    const Ints pairs = _mm256_maddubs_epi16(u8, s8);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  } else {  // pairs would not fit into 16 bits
    const Ints even = _mm256_madd_epi16(_mm256_and_si256(u8, _mm256_set1_epi16(255)),
                                        _mm256_srai_epi16(_mm256_slli_epi16(s8, 8), 8));
    const Ints odd = _mm256_madd_epi16(_mm256_srli_epi16(u8, 8), _mm256_srai_epi16(s8, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
  }
}

// Lane i is the sum of row i, added up in the same order for every i.
inline Floats sums(const Floats (&row)[kFloats]) {
  Floats pairs[4];
  for (int i = 0; i < 4; ++i) {
    pairs[i] = _mm256_add_ps(_mm256_unpacklo_ps(row[2 * i], row[2 * i + 1]),
                             _mm256_unpackhi_ps(row[2 * i], row[2 * i + 1]));
  }
  Floats fours[2];
  for (int i = 0; i < 2; ++i) {
    const __m256d a = _mm256_castps_pd(pairs[2 * i]);
    const __m256d b = _mm256_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  return _mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
                       _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
}

// Lane j of row i becomes lane i of row j.
inline void transpose(Ints (&row)[kFloats]) {
  Ints t[kFloats];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    row[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    row[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    row[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    row[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(row[i], row[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(row[i], row[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) row[i] = t[i];
}

// Else compilers load a vector anew for every use.
inline Ints in_register(Ints a) {
  __asm__("" : "+x"(a));
  return a;
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Into the second cache, and not into the first: for what is needed later.
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace jmoe::JMOE_ISA
