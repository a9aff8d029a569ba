// Vectors of 512 bits. With JMOE_VNNI four byte products and their sum are one instruction.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace jmoe::JMOE_ISA {

constexpr int kFloats = 16;
constexpr int kBytes = 4 * kFloats;

// Accumulators that leave registers for operands.
constexpr int kAccumulators = 24;

using Floats = __m512;
using Ints = __m512i;  // int32 lanes, or bytes

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats broadcast(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
// The second operand if one is NaN.
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats abs(Floats a) { return _mm512_abs_ps(a); }
// a * b + c, rounded once.
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a); }
inline float max_of(Floats a) { return _mm512_reduce_max_ps(a); }
// Lane i is lane index[i] of a, modulo the number of lanes.
inline Floats permute(Floats a, Ints index) { return _mm512_permutexvar_ps(index, a); }

inline Floats load_u8(const uint8_t* p) {
  __m128i bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}
inline Floats load_bf16(const uint16_t* p) {
  __m256i halves;
  std::memcpy(&halves, p, sizeof(halves));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// The first n <= kFloats lanes: the others are zero, or stay unwritten.
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline Floats broadcast_some(float x, int64_t n) { return _mm512_maskz_mov_ps(first_lanes(n), broadcast(x)); }
inline Floats load_some(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store_some(float* p, Floats x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
inline Floats load_u8_some(const uint8_t* p, int64_t n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)));
}
inline Floats load_bf16_some(const uint16_t* p, int64_t n) {
  const __m256i halves = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
// Of 2 * kFloats neighbours, those with even and those with odd places.
inline void load_pairs_bf16(const uint16_t* p, Floats& even, Floats& odd) {
  const __m512i pairs = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}
inline void load_pairs(const float* p, Floats& even, Floats& odd) {
  const __m512i places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512 a = _mm512_loadu_ps(p);
  const __m512 b = _mm512_loadu_ps(p + kFloats);
  even = _mm512_permutex2var_ps(a, places, b);
  odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(places, _mm512_set1_epi32(1)), b);
}
inline void load_pairs_bf16_some(const uint16_t* p, int64_t n, Floats& even, Floats& odd) {  // n < 2 * kFloats
  const __m512i pairs = _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << n) - 1u), p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}
inline void store_pairs(float* p, Floats even, Floats odd) {
  const __m512i places = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  _mm512_storeu_ps(p, _mm512_permutex2var_ps(even, places, odd));
  _mm512_storeu_ps(p + kFloats, _mm512_permutex2var_ps(even, _mm512_add_epi32(places, _mm512_set1_epi32(8)), odd));
}
inline Ints bits_of(Floats a) { return _mm512_castps_si512(a); }
inline Floats from_bits(Ints a) { return _mm512_castsi512_ps(a); }
// To the nearest bfloat16, ties to even; NaN stays NaN.
inline __m256i to_bf16(Floats a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16));
}
inline void store_bf16(uint16_t* p, Floats a) {
  const __m256i halves = to_bf16(a);
  std::memcpy(p, &halves, sizeof(halves));
}
inline void store_bf16_some(uint16_t* p, Floats a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16(a));
}

inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
// The first n < kBytes bytes, and zeros; reads no other.
inline Ints load_bytes_some(const void* p, int64_t n) {
  return _mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, p);
}
inline void store_ints(void* p, Ints x) { _mm512_storeu_si512(p, x); }
inline Ints broadcast_int(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints bit_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints bit_or(Ints a, Ints b) { return _mm512_or_si512(a, b); }
inline Ints bit_xor(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
template <int kBits>
inline Ints shift_left(Ints a) {  // int32 lanes
  return _mm512_slli_epi32(a, kBits);
}
// Of int32 lanes, rounding down.
template <int kBits>
inline Ints shift_right(Ints a) {
  return _mm512_srai_epi32(a, kBits);
}
// Of lanes of 16 bits: bits of one byte reach the next one, and must be masked.
template <int kBits>
inline Ints shift_right_16(Ints a) {
  return _mm512_srli_epi16(a, kBits);
}
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
// Nearest, ties to even. |a| < 2^31.
inline Ints to_ints(Floats a) { return _mm512_cvtps_epi32(a); }
// The lowest byte of every int32 lane.
inline void store_low_bytes(int8_t* p, Ints a) {
  const __m128i bytes = _mm512_cvtepi32_epi8(a);
  std::memcpy(p, &bytes, sizeof(bytes));
}

// acc + sum of four products u8 * s8 in every int32 lane. kSmall: u8 < 128.
template <bool kSmall>
inline Ints dot(Ints acc, Ints u8, Ints s8) {
#ifdef JMOE_VNNI
  return _mm512_dpbusd_epi32(acc, u8, s8);
#else
  if constexpr (kSmall) {
    const Ints pairs = _mm512_maddubs_epi16(u8, s8);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  } else {  // pairs would not fit into 16 bits
    const Ints even = _mm512_madd_epi16(_mm512_and_si512(u8, _mm512_set1_epi16(255)),
                                        _mm512_srai_epi16(_mm512_slli_epi16(s8, 8), 8));
    const Ints odd = _mm512_madd_epi16(_mm512_srli_epi16(u8, 8), _mm512_srai_epi16(s8, 8));
    return _mm512_add_epi32(acc, _mm512_add_epi32(even, odd));
  }
#endif
}

// Lane i is the sum of row i, added up in the same order for every i.
inline Floats sums(const Floats (&row)[kFloats]) {
  Floats pairs[8];
  for (int i = 0; i < 8; ++i) {
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(row[2 * i], row[2 * i + 1]),
                             _mm512_unpackhi_ps(row[2 * i], row[2 * i + 1]));
  }
  Floats fours[4];
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]);
    const __m512d b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  Floats halves[2];
  for (int i = 0; i < 2; ++i) {
    halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                              _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                       _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

// Lane j of row i becomes lane i of row j.
inline void transpose(Ints (&row)[kFloats]) {
  Ints t[kFloats];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    row[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    row[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    row[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    row[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    row[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Else compilers load a vector anew for every use.
inline Ints in_register(Ints a) {
  __asm__("" : "+v"(a));
  return a;
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Into the second cache, and not into the first: for what is needed later.
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace jmoe::JMOE_ISA
