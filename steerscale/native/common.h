// Floats side by side in one register, what is computed with them, and heads of attention in memory.

#pragma once

#include <cstdint>

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4)));

inline Lanes load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }
inline void store(float* to, Lanes lanes) { *reinterpret_cast<Lanes*>(to) = lanes; }

// One number of all lanes, halves onto halves.
template <typename Combine>
inline float fold(Lanes lanes, Combine combine) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] = combine(lanes[l], lanes[l + half]);
  return lanes[0];
}
inline float sum(Lanes lanes) {
  return fold(lanes, [](float a, float b) { return a + b; });
}
inline float maximum(Lanes lanes) {
  return fold(lanes, [](float a, float b) { return a > b ? a : b; });
}

// e^x for x <= 0; 0 below -87. The polynomial is that of Cephes' expf: two units in the last place.
inline Lanes exponential(Lanes x) {
  Lanes shifted = x * 1.44269504f + 12582912.f;  // rounds x / ln 2, and leaves the integer in the low bits
  Lanes n = shifted - 12582912.f;
  Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Lanes p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  Lanes power = (Lanes)(((Ints)shifted + (127 - 0x4b400000)) << 23);
  return x < -87.f ? Lanes{} : (p * r * r + r + 1.f) * power;
}

// A tensor [S, B, heads, D] of any strides but the last, which is 1.
struct Heads {
  float* data;
  int64_t position, batch, head;
  Heads(float* data, const int64_t* strides) : data(data), position(strides[0]), batch(strides[1]), head(strides[2]) {}
  float* at(int64_t b, int64_t h, int64_t s = 0) const { return data + b * batch + h * head + s * position; }
};

}  // namespace
