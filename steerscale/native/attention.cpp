// Causal attention and its gradients on the CPU, float32, called over ctypes. A block of scores is made, used and forgotten while it is
// in a core's cache, and made anew for the gradients (FlashAttention, Dao et al. 2022). Each group of heads that share keys and
// values is one thread's work in a fixed order: results do not depend on the number of threads.
//
// S positions, B batch, H heads, G groups with keys and values of their own, D head width, a multiple of 16.
// OpenMP, so that the threads are torch's: others would have to share the cores with torch's, which wait awake.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "common.h"

namespace {

#ifdef __AVX512F__
constexpr int kColumns = 4, kRows = 6;  // of a tile: 24 sums, 4 of b and 1 of a fill 29 of 32 registers
#else
constexpr int kColumns = 2, kRows = 6;  // 15 of 16
#endif

constexpr int64_t kQueries = 64, kKeys = 512;  // of a block of scores; the second a multiple of the first
constexpr int64_t kDepth = 128;                // rows of b that stay in the nearest cache
constexpr int64_t kScores = kKeys + kLanes;    // a row of scores: no power of two, which would put all rows in the same cache sets

// c [M, N lanes] (+)= a [M, depth] b [depth, N lanes], its sums in registers.
template <int M, int N>
void tile(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t ldb, float* c, int64_t ldc,
          bool add) {
  Lanes sums[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sums[m][n] = add ? load(c + m * ldc + n * kLanes) : Lanes{};
  for (int64_t k = 0; k < depth; ++k, a += a_depth, b += ldb) {
    Lanes columns[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) columns[n] = load(b + n * kLanes);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n] += a[m * a_row] * columns[n];
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) store(c + m * ldc + n * kLanes, sums[m][n]);
}

using Tile = decltype(&tile<1, 1>);
template <size_t... I>
constexpr std::array<Tile, sizeof...(I)> all_tiles(std::index_sequence<I...>) {
  return {tile<I / kColumns + 1, I % kColumns + 1>...};
}
constexpr auto kTiles = all_tiles(std::make_index_sequence<kRows * kColumns>{});

// c [m, n] (+)= a [m, depth] b [depth, n]; n a multiple of kLanes. a by two strides, so that it may be a transpose.
void product(int64_t m, int64_t n, int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t ldb,
             float* c, int64_t ldc, bool add) {
  for (int64_t k = 0; k < depth; k += kDepth, add = true)
    for (int64_t j = 0; j < n; j += kColumns * kLanes)
      for (int64_t i = 0; i < m; i += kRows) {
        int64_t rows = std::min<int64_t>(kRows, m - i), columns = std::min<int64_t>(kColumns, (n - j) / kLanes);
        kTiles[(rows - 1) * kColumns + columns - 1](std::min(kDepth, depth - k), a + i * a_row + k * a_depth, a_row, a_depth,
                                                    b + k * ldb + j, ldb, c + i * ldc + j, ldc, add);
      }
}

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

struct Shape {
  int64_t S, B, H, G, D;
  explicit Shape(const int64_t* shape) : S(shape[0]), B(shape[1]), H(shape[2]), G(shape[3]), D(shape[4]) {}
};

// A contiguous one, of `heads` heads.
Heads contiguous(float* data, const Shape& shape, int64_t heads) {
  int64_t strides[] = {shape.B * heads * shape.D, heads * shape.D, shape.D};
  return Heads(data, strides);
}

void copy_rows(float* to, int64_t to_row, const float* from, int64_t from_row, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * to_row, from + i * from_row, 4 * width);
}

// to [width, columns] = scale * from [rows, width] transposed; the columns after `rows` are zero.
void copy_transposed(float* to, int64_t columns, const float* from, int64_t from_row, int64_t rows, int64_t width, float scale) {
  for (int64_t i = 0; i < columns; i += kLanes)
    for (int64_t d = 0; d < width; ++d)
      for (int64_t l = i; l < i + kLanes; ++l) to[d * columns + l] = l < rows ? scale * from[l * from_row + d] : 0.f;
}

// A row of scores [width], of which the first `seen` may be attended to -> e^(score - shift), 0 for the others; returns the sum.
float exponentials(float* row, int64_t seen, int64_t width, float shift) {
  Lanes total = {};
  std::fill(row + seen, row + width, -INFINITY);
  for (int64_t c = 0; c < width; c += kLanes) {
    Lanes p = exponential(load(row + c) - shift);
    store(row + c, p);
    total += p;
  }
  return sum(total);
}

float largest(const float* row, int64_t seen) {
  Lanes most = Lanes{} - INFINITY;
  int64_t c = 0;
  for (; c + kLanes <= seen; c += kLanes) {
    Lanes x = load(row + c);
    most = x > most ? x : most;
  }
  return std::max(maximum(most), c < seen ? *std::max_element(row + c, row + seen) : -INFINITY);
}

}  // namespace

extern "C" {

// out [S, B, H, D] contiguous; log_sums [B, H, S], of each softmax. strides: those of q, k and v, three each.
void attention_forward(float* q_data, float* k_data, float* v_data, const int64_t* shape_of, const int64_t* strides, float scale,
                       float* out_data, float* log_sums, int threads) {
  Shape shape(shape_of);
  auto [S, B, H, G, D] = shape;
  Heads q(q_data, strides), k(k_data, strides + 3), v(v_data, strides + 6), out = contiguous(out_data, shape, H);
  int64_t keys = padded(S);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> k_t(D * keys), v_rows(S * D), queries(kQueries * D), scores(kQueries * kScores), sums(kQueries * D);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < B * G; ++unit) {
      int64_t b = unit / G, g = unit % G;
      copy_transposed(k_t.data(), keys, k.at(b, g), k.position, S, D, scale);
      copy_rows(v_rows.data(), D, v.at(b, g), v.position, S, D);
      for (int64_t h = g * (H / G); h < (g + 1) * (H / G); ++h)
        for (int64_t i = 0; i < S; i += kQueries) {
          int64_t rows = std::min(kQueries, S - i);
          float best[kQueries], total[kQueries];
          copy_rows(queries.data(), D, q.at(b, h, i), q.position, rows, D);
          for (int64_t j = 0; j < i + rows; j += kKeys) {
            int64_t n = std::min(kKeys, i + rows - j);
            product(rows, padded(n), D, queries.data(), D, 1, k_t.data() + j, keys, scores.data(), kScores, false);
            for (int64_t r = 0; r < rows; ++r) {
              float* row = scores.data() + r * kScores;
              int64_t seen = std::min(n, i + r - j + 1);
              float most = largest(row, seen);
              if (j > 0) {
                // What came before was relative to a smaller maximum.
                most = std::max(most, best[r]);
                float fade = std::exp(best[r] - most);
                for (int64_t d = 0; d < D; ++d) sums[r * D + d] *= fade;
                total[r] *= fade;
              } else {
                total[r] = 0;
              }
              best[r] = most;
              total[r] += exponentials(row, seen, padded(n), most);
            }
            product(rows, D, n, scores.data(), kScores, 1, v_rows.data() + j * D, D, sums.data(), D, j > 0);
          }
          for (int64_t r = 0; r < rows; ++r) {
            float normalizer = 1.f / total[r];
            for (int64_t d = 0; d < D; ++d) out.at(b, h, i + r)[d] = sums[r * D + d] * normalizer;
            log_sums[(b * H + h) * S + i + r] = best[r] + std::log(total[r]);
          }
        }
    }
  }
}

// dq [S, B, H, D], dk and dv [S, B, G, D], contiguous. strides: those of q, k, v and d_out; out and log_sums as above.
void attention_backward(float* q_data, float* k_data, float* v_data, float* d_out_data, const int64_t* shape_of,
                        const int64_t* strides, float scale, float* out_data, const float* log_sums, float* dq_data,
                        float* dk_data, float* dv_data, int threads) {
  Shape shape(shape_of);
  auto [S, B, H, G, D] = shape;
  Heads q(q_data, strides), k(k_data, strides + 3), v(v_data, strides + 6), d_out(d_out_data, strides + 9);
  Heads out = contiguous(out_data, shape, H), dq = contiguous(dq_data, shape, H);
  Heads dk = contiguous(dk_data, shape, G), dv = contiguous(dv_data, shape, G);
  int64_t keys = padded(S);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> k_t(D * keys), v_t(D * keys), k_rows(S * D), dk_rows(S * D), dv_rows(S * D);
    std::vector<float> queries(kQueries * D), dq_rows(kQueries * D), d_outs(kQueries * D);
    std::vector<float> p(kQueries * kScores), ds(kQueries * kScores);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < B * G; ++unit) {
      int64_t b = unit / G, g = unit % G;
      copy_transposed(k_t.data(), keys, k.at(b, g), k.position, S, D, scale);
      copy_transposed(v_t.data(), keys, v.at(b, g), v.position, S, D, 1.f);
      copy_rows(k_rows.data(), D, k.at(b, g), k.position, S, D);
      std::fill(dk_rows.begin(), dk_rows.end(), 0.f);
      std::fill(dv_rows.begin(), dv_rows.end(), 0.f);
      for (int64_t h = g * (H / G); h < (g + 1) * (H / G); ++h)
        for (int64_t i = 0; i < S; i += kQueries) {
          int64_t rows = std::min(kQueries, S - i);
          float along[kQueries];  // d_out . out, which is the sum of p ds
          copy_rows(queries.data(), D, q.at(b, h, i), q.position, rows, D);
          copy_rows(d_outs.data(), D, d_out.at(b, h, i), d_out.position, rows, D);
          for (int64_t r = 0; r < rows; ++r) {
            Lanes dot = {};
            for (int64_t d = 0; d < D; d += kLanes) dot += load(out.at(b, h, i + r) + d) * load(d_outs.data() + r * D + d);
            along[r] = sum(dot);
          }
          for (int64_t j = 0; j < i + rows; j += kKeys) {
            int64_t n = std::min(kKeys, i + rows - j);
            product(rows, padded(n), D, queries.data(), D, 1, k_t.data() + j, keys, p.data(), kScores, false);
            product(rows, padded(n), D, d_outs.data(), D, 1, v_t.data() + j, keys, ds.data(), kScores, false);
            for (int64_t r = 0; r < rows; ++r) {
              float *row = p.data() + r * kScores, *ds_row = ds.data() + r * kScores;
              exponentials(row, std::min(n, i + r - j + 1), padded(n), log_sums[(b * H + h) * S + i + r]);
              for (int64_t c = 0; c < padded(n); c += kLanes)
                store(ds_row + c, load(row + c) * (load(ds_row + c) - along[r]) * scale);
            }
            product(n, D, rows, p.data(), 1, kScores, d_outs.data(), D, dv_rows.data() + j * D, D, true);
            product(n, D, rows, ds.data(), 1, kScores, queries.data(), D, dk_rows.data() + j * D, D, true);
            product(rows, D, n, ds.data(), kScores, 1, k_rows.data() + j * D, D, dq_rows.data(), D, j > 0);
          }
          copy_rows(dq.at(b, h, i), dq.position, dq_rows.data(), D, rows, D);
        }
      copy_rows(dk.at(b, g), dk.position, dk_rows.data(), D, S, D);
      copy_rows(dv.at(b, g), dv.position, dv_rows.data(), D, S, D);
    }
  }
}

}  // extern "C"
