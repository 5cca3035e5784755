// CPU kernels, float32 and contiguous throughout, called over ctypes: no Python and no torch headers, so that they compile in
// seconds. Each output row is computed by one thread in a fixed order: results do not depend on the number of threads.

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace {

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4)));

// Workers take chunks of rows until none is left: rows may differ much in cost.
template <typename Body>
void parallel_for(int64_t rows, int64_t chunk, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(chunk)) < rows;) body(begin, std::min(rows, begin + chunk));
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads && t * chunk < rows; ++t) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
}

// An integer that compares as the float does, with -0 equal to 0 and every NaN above infinity.
inline int32_t ordered_key(int32_t bits) {
  int32_t magnitude = bits & INT32_MAX;
  int32_t key = bits ^ ((bits >> 31) & INT32_MAX);
  key = bits == INT32_MIN ? 0 : key;
  return magnitude > 0x7f800000 ? 0x7fc00000 : key;
}

struct Scratch {
  std::vector<int32_t> maxima, ranked;
  std::vector<uint64_t> candidates;
};

// One row's k best, best first. The k best lie in the k blocks of best (maximum, position), so only blocks whose maximum reaches
// the k-th largest of the maxima are looked at again.
template <int64_t kBlock>
void top_row(const int32_t* bits, int64_t n, int64_t k, int64_t* out, Scratch& scratch) {
  auto& [maxima, ranked, candidates] = scratch;
  int64_t blocks = (n + kBlock - 1) / kBlock;
  maxima.resize(blocks);
  for (int64_t b = 0; b < blocks; ++b) {
    const int32_t* block = bits + b * kBlock;
    int32_t best = INT32_MIN;
    if ((b + 1) * kBlock <= n) {
      for (int64_t i = 0; i < kBlock; ++i) best = std::max(best, ordered_key(block[i]));
    } else {
      for (int64_t i = 0; i < n - b * kBlock; ++i) best = std::max(best, ordered_key(block[i]));
    }
    maxima[b] = best;
  }
  int32_t bound = INT32_MIN;
  if (k < blocks) {
    ranked = maxima;
    std::nth_element(ranked.begin(), ranked.begin() + (k - 1), ranked.end(), std::greater<int32_t>());
    bound = ranked[k - 1];
  }
  candidates.clear();
  for (int64_t b = 0; b < blocks; ++b) {
    if (maxima[b] < bound) continue;
    for (int64_t i = b * kBlock, end = std::min(n, i + kBlock); i < end; ++i) {
      int32_t key = ordered_key(bits[i]);
      if (key < bound) continue;
      uint64_t rising = static_cast<uint32_t>(key) ^ 0x80000000u;
      candidates.push_back(rising << 32 | (UINT32_MAX - static_cast<uint32_t>(i)));
    }
  }
  if (k < static_cast<int64_t>(candidates.size()))
    std::nth_element(candidates.begin(), candidates.begin() + k, candidates.end(), std::greater<uint64_t>());
  std::sort(candidates.begin(), candidates.begin() + k, std::greater<uint64_t>());
  for (int64_t i = 0; i < k; ++i) out[i] = UINT32_MAX - static_cast<uint32_t>(candidates[i]);
}

inline float sum(Lanes lanes) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

// sum += v * y; returns y . w. One pass over y for both.
inline float add_and_dot(float* acc, const float* y, const float* w, float v, int64_t d) {
  Lanes dot0 = {}, dot1 = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= d; i += 2 * kLanes) {
    Lanes y0 = *reinterpret_cast<const Lanes*>(y + i), y1 = *reinterpret_cast<const Lanes*>(y + i + kLanes);
    *reinterpret_cast<Lanes*>(acc + i) += v * y0;
    *reinterpret_cast<Lanes*>(acc + i + kLanes) += v * y1;
    dot0 += y0 * *reinterpret_cast<const Lanes*>(w + i);
    dot1 += y1 * *reinterpret_cast<const Lanes*>(w + i + kLanes);
  }
  float dot = sum(dot0 + dot1);
  for (; i < d; ++i) {
    acc[i] += v * y[i];
    dot += y[i] * w[i];
  }
  return dot;
}

inline void add_scaled(float* __restrict acc, const float* __restrict y, float v, int64_t d) {
  for (int64_t i = 0; i < d; ++i) acc[i] += v * y[i];
}

inline void prefetch_row(const float* row, int64_t d) {
  for (int64_t i = 0; i < d; i += 16) __builtin_prefetch(row + i);
}

}  // namespace

extern "C" {

// out [rows, k]: each row's k best of n, best first; values as their bits. 0 < k <= n < 2^32.
void top_rows(const int32_t* bits, int64_t rows, int64_t n, int64_t k, int64_t* out, int threads) {
  // Wide blocks have fewer maxima to rank, but there have to be several times k blocks to rule most of them out.
  auto top = 4 * k * 64 <= n ? top_row<64> : top_row<16>;
  parallel_for(rows, 8, threads, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t row = begin; row < end; ++row) top(bits + row * n, n, k, out + row * k, scratch);
  });
}

// offsets[row + 1] = how many of the row's n bytes (each 0 or 1) are set.
void count_rows(const uint8_t* mask, int64_t rows, int64_t n, int64_t* offsets, int threads) {
  parallel_for(rows, 8, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* bytes = mask + row * n;
      int64_t count = 0;
      for (int64_t i = 0; i < n; ++i) count += bytes[i];
      offsets[row + 1] = count;
    }
  });
}

// out[offsets[row] ...] = columns of the set bytes of each row, ascending.
void find_rows(const uint8_t* mask, int64_t rows, int64_t n, const int64_t* offsets, int64_t* out, int threads) {
  parallel_for(rows, 8, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* bytes = mask + row * n;
      int64_t* place = out + offsets[row];
      int64_t i = 0;
      for (; i + 8 <= n; i += 8) {
        uint64_t eight;
        std::memcpy(&eight, bytes + i, 8);
        if (!eight) continue;
        for (int64_t b = 0; b < 8; ++b)
          if (bytes[i + b]) *place++ = i + b;
      }
      for (; i < n; ++i)
        if (bytes[i]) *place++ = i;
    }
  });
}

// out [N, d] (+)= sum over latent j's entries of v y[token]. Entries sorted by latent: offsets [N + 1], tokens, order [nnz];
// values [nnz] in the order of tokens. With add, rows of out without entries are not touched.
void sum_tokens(const int64_t* offsets, const int64_t* tokens, const int64_t* order, const float* values, const float* y,
                int64_t latents, int64_t d, float* out, int add, int threads) {
  parallel_for(latents, 32, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      float* row = out + j * d;
      if (!add) std::memset(row, 0, sizeof(float) * d);
      for (int64_t e = offsets[j]; e < offsets[j + 1]; ++e) {
        if (e + 1 < offsets[latents]) prefetch_row(y + tokens[e + 1] * d, d);
        add_scaled(row, y + tokens[e] * d, values[order[e]], d);
      }
    }
  });
}

// Both derivatives of a decoder in one pass over the entries: d_values [nnz] (in the order of tokens) = y[token] . W[latent], and
// out [N, d] (+)= sum of v y[token], without its component along W[latent] if project (rows of W have norm 1).
void decode_gradients(const int64_t* offsets, const int64_t* tokens, const int64_t* order, const float* values,
                      const float* y, const float* W, int64_t latents, int64_t d, float* d_values, float* out, int add,
                      int project, int threads) {
  parallel_for(latents, 32, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      float* row = out + j * d;
      if (!add) std::memset(row, 0, sizeof(float) * d);
      float along = 0;
      for (int64_t e = offsets[j]; e < offsets[j + 1]; ++e) {
        if (e + 1 < offsets[latents]) prefetch_row(y + tokens[e + 1] * d, d);
        float v = values[order[e]];
        float dot = add_and_dot(row, y + tokens[e] * d, W + j * d, v, d);
        d_values[order[e]] = dot;
        along += v * dot;
      }
      if (project && offsets[j] < offsets[j + 1]) add_scaled(row, W + j * d, -along, d);
    }
  });
}

}  // extern "C"
