// Functions of floats, conversions between float types, and reading as fast as memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace jmoe::JMOE_ISA {

// e^x within 2 ulp where it is a normal number; 0 below -87, infinity above 88.72; NaN stays NaN.
inline Floats exp(Floats x) {
  x = min(broadcast(88.8f), max(broadcast(-87.6f), x));
  // Adding 1.5 * 2^23 rounds x / log(2) to an integer n, in the lowest bits of the sum; 126 is the exponent's bias
  // less one, so that 2^(n - 1) is a number for every n here (zero for the least).
  const Floats shift = broadcast(12582912.0f + 126.0f);
  const Floats shifted = fma(x, broadcast(1.44269504f), shift);
  const Floats n = sub(shifted, shift);
  // log(2) in two parts; the first has so few bits that its product with n is exact.
  Floats r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  // e^r = 1 + r + r^2 * p(r), with the coefficients of Cephes' expf.
  Floats p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), broadcast(1.0f));
  const Floats power = from_bits(shift_left<23>(bits_of(shifted)));
  return mul(mul(p, power), broadcast(2.0f));
}

inline Floats swiglu(Floats gate, Floats up) {
  const Floats one = broadcast(1.0f);
  return mul(div(gate, add(one, exp(sub(zero(), gate)))), up);
}

inline void swiglu(const float* gate, const float* up, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) store(out + i, swiglu(load(gate + i), load(up + i)));
  const int64_t rest = n - i;
  if (rest > 0) store_some(out + i, swiglu(load_some(gate + i, rest), load_some(up + i, rest)), rest);
}

inline void to_float32(const FloatView& from, int64_t first, float* to, int64_t n) {
  if (from.type == FloatType::kFloat32) {
    std::memcpy(to, static_cast<const float*>(from.data) + first, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(from.data) + first;
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) store(to + i, load_bf16(p + i));
  if (i < n) store_some(to + i, load_bf16_some(p + i, n - i), n - i);
}

inline void from_float32(const float* from, void* to, FloatType type, int64_t first, int64_t n) {
  if (type == FloatType::kFloat32) {
    std::memcpy(static_cast<float*>(to) + first, from, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  uint16_t* p = static_cast<uint16_t*>(to) + first;
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) store_bf16(p + i, load(from + i));
  if (i < n) store_bf16_some(p + i, load_some(from + i, n - i), n - i);
}

// The exclusive or of all words of 64 bits, the last one filled up with zeros: the same for every instruction set.
inline uint64_t read_bytes(const void* data, int64_t n) {
  // Four streams are faster than one, and no slower than with prefetch instructions.
  constexpr int64_t kStreams = 4;
  constexpr int64_t kStep = 256;
  const int64_t each = n / kStreams / kStep * kStep;
  const uint8_t* p = static_cast<const uint8_t*>(data);
  Ints sums[4] = {zero_ints(), zero_ints(), zero_ints(), zero_ints()};
  for (int64_t i = 0; i < each; i += kStep) {
    for (int64_t stream = 0; stream < kStreams; ++stream) {
      for (int64_t j = i + stream * each; j < i + stream * each + kStep; j += 4 * kBytes) {
        for (int64_t k = 0; k < 4; ++k) sums[k] = bit_xor(sums[k], load_ints(p + j + k * kBytes));
      }
    }
  }
  uint64_t words[kBytes / 8];
  store_ints(words, bit_xor(bit_xor(sums[0], sums[1]), bit_xor(sums[2], sums[3])));
  uint64_t total = 0;
  for (uint64_t word : words) total ^= word;
  for (int64_t i = kStreams * each; i < n; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, p + i, static_cast<size_t>(n - i < 8 ? n - i : 8));
    total ^= word;
  }
  return total;
}

}  // namespace jmoe::JMOE_ISA
