// SwiGLU, RMSNorm and rotary embedding with their gradients on the CPU, float32, called over ctypes: each one pass over memory, where
// torch takes one an operation. Every row is one thread's work in a fixed order: results do not depend on the number of threads.
//
// T rows (tokens), F width of the MLP, M width of the residual stream, E = R + 2 entries of a group (R queries, key, value), D head width.
// OpenMP, so that the threads are torch's: others would have to share the cores with torch's, which wait awake.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common.h"

namespace {

constexpr int64_t kRows = 64;  // whose share of a weight's gradient is summed in one go

// Calls `one(lanes, n)` along a row of `width`: whole lanes in place, the rest by way of a copy.
template <typename One>
inline void along(int64_t width, One one) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) one(i, kLanes);
  if (i < width) one(i, width - i);
}
inline Lanes part(const float* from, int64_t n) {
  if (n == kLanes) return load(from);
  Lanes lanes = {};
  std::memcpy(&lanes, from, 4 * n);
  return lanes;
}
inline void put(float* to, Lanes lanes, int64_t n) {
  if (n == kLanes) return store(to, lanes);
  std::memcpy(to, &lanes, 4 * n);
}

// The pairs (i, i + D / 2) turned by their angles.
inline void turn(float* __restrict to, const float* __restrict from, const float* __restrict cosines, const float* __restrict sines,
                 float direction, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    float sine = direction * sines[i];
    to[i] = from[i] * cosines[i] - from[half + i] * sine;
    to[half + i] = from[half + i] * cosines[i] + from[i] * sine;
  }
}

inline Lanes sigmoid(Lanes x) {
  Lanes e = exponential(x < 0.f ? x : -x);  // of -|x|: nothing overflows
  return (x < 0.f ? e : Lanes{} + 1.f) / (1.f + e);
}

}  // namespace

extern "C" {

// x [T, 2 F], the gate first -> y [T, F] = silu(gate) * up.
void swiglu_forward(const float* x, int64_t T, int64_t F, float* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < T; ++t)
    along(F, [&](int64_t i, int64_t n) {
      Lanes gate = part(x + 2 * t * F + i, n), up = part(x + (2 * t + 1) * F + i, n);
      put(y + t * F + i, gate * sigmoid(gate) * up, n);
    });
}

// Also dy [T, F] -> dx [T, 2 F].
void swiglu_backward(const float* x, const float* dy, int64_t T, int64_t F, float* dx, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < T; ++t)
    along(F, [&](int64_t i, int64_t n) {
      Lanes gate = part(x + 2 * t * F + i, n), up = part(x + (2 * t + 1) * F + i, n), d = part(dy + t * F + i, n);
      Lanes s = sigmoid(gate), silu = gate * s;
      put(dx + 2 * t * F + i, d * up * (s + silu * (1.f - s)), n);
      put(dx + (2 * t + 1) * F + i, d * silu, n);
    });
}

// x [T, M], weight [M] -> y = x * scale * weight, scale [T] = 1 / sqrt(mean(x^2) + eps).
void rms_norm_forward(const float* x, const float* weight, int64_t T, int64_t M, float eps, float* y, float* scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const float* row = x + t * M;
    Lanes squares = {};
    along(M, [&](int64_t i, int64_t n) {
      Lanes a = part(row + i, n);
      squares += a * a;
    });
    float s = scale[t] = 1.f / std::sqrt(sum(squares) / M + eps);
    along(M, [&](int64_t i, int64_t n) { put(y + t * M + i, part(row + i, n) * s * part(weight + i, n), n); });
  }
}

// Also dy [T, M] -> dx [T, M], dweight [M].
void rms_norm_backward(const float* x, const float* weight, const float* scale, const float* dy, int64_t T, int64_t M, float* dx,
                       float* dweight, int threads) {
  int64_t chunks = (T + kRows - 1) / kRows;
  std::vector<float> shares(chunks * M);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t t = c * kRows; t < std::min(T, (c + 1) * kRows); ++t) {
      const float *row = x + t * M, *d = dy + t * M;
      float *share = shares.data() + c * M, s = scale[t];
      Lanes products = {};
      along(M, [&](int64_t i, int64_t n) {
        Lanes product = part(d + i, n) * part(row + i, n) * s;
        products += product * part(weight + i, n);
        put(share + i, part(share + i, n) + product, n);
      });
      // The part of the gradient along x: moving along x changes nothing.
      float back = sum(products) / M * s;
      along(M, [&](int64_t i, int64_t n) {
        put(dx + t * M + i, (part(d + i, n) * part(weight + i, n) - part(row + i, n) * back) * s, n);
      });
    }
  std::fill(dweight, dweight + M, 0.f);
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t i = 0; i < M; ++i) dweight[i] += shares[c * M + i];
}

// qkv [S, B, G, E, D] <-> queries [S, B, G R, D], keys and values [S, B, G, D], queries and keys turned by their positions; from
// the heads to `qkv` turned back, which is the gradient. shape: S, B, G, R, D. strides: of queries, keys and values, three each.
// cosines and sines [S, B or 1, D / 2] by the strides `angle`, that of one row of angles for all of B being 0.
void rotate_heads(float* qkv, float* q, float* k, float* v, const int64_t* strides, const float* cosines, const float* sines,
                  const int64_t* angle, const int64_t* shape, int back, int threads) {
  int64_t S = shape[0], B = shape[1], G = shape[2], R = shape[3], D = shape[4];
  Heads queries(q, strides), keys(k, strides + 3), values(v, strides + 6);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t token = 0; token < S * B; ++token) {
    int64_t s = token / B, b = token % B, angles = s * angle[0] + b * angle[1];
    float* row = qkv + token * G * (R + 2) * D;
    for (int64_t g = 0; g < G; ++g)
      for (int64_t e = 0; e < R + 2; ++e, row += D) {
        float* head = e < R ? queries.at(b, g * R + e, s) : (e == R ? keys : values).at(b, g, s);
        float *to = back ? row : head, *from = back ? head : row;
        if (e == R + 1)
          std::memcpy(to, from, 4 * D);
        else
          turn(to, from, cosines + angles, sines + angles, back ? -1.f : 1.f, D / 2);
      }
  }
}
}
