// Attention whose heads keep spans of their own: a causal prefill, and decoding from ragged caches (decode.cpp, compiled
// with this file, after it). In bfloat16, for CPUs that multiply tiles of it (AMX), and in float32.
//
// Prefill. Key j is kept by query i of head h where  j <= i  and  (j < sinks[h] or i - j < windows[h])  and  pad[b, j].
// The keys of a KV head are transposed once; in bfloat16 keys and values are laid out as the matrix unit reads them, in
// pairs along the reduced dimension ("VNNI"). A tile of ROWS queries then walks the live keys: those of the sinks, and
// those from the window's left end to the diagonal, in whole blocks. Only runs at an edge, or with padding in them, are
// masked.
//
// ROWS, BLOCK, SPAN by share of the work-saved ideal, 8192 keys, bfloat16, one thread of a Xeon with AMX, torch 2.13:
//                        64/64/512   64/32/512   32/32/512   64/32/1024   128/32/512
//     D=64   W=256          .43         .49         .50          .51          .48
//     D=64   W=1024         .67         .75         .73          .78          .75
//     D=128  W=256          .41         .44         .46          .49          .47
//     D=128  W=2048         .79         .78         .78          .82          .79
// Out of torch's operators (span_cpu.py): .28, .47, .28, .53.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

namespace {

using at::BFloat16;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t ROWS = 64;
constexpr int64_t BLOCK = 32;
// Keys whose scores are held at once.
constexpr int64_t SPAN = 1024;
// Words between the rows of laid out keys, beyond the keys: rows a power of two apart share the cache's sets.
constexpr int64_t APART = 48;
constexpr float NONE = -std::numeric_limits<float>::infinity();

enum Live : uint8_t { DEAD, WHOLE, MIXED };

template <typename T>
struct Tensor {
  T* data;
  int64_t batch, head, row;  // strides, in elements
  T* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
};

struct Shape {
  int64_t batch, kv_heads, share, length, dim, dim_v;
  int64_t blocks() const { return (length + BLOCK - 1) / BLOCK; }
};

float sum(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, x);
}

float largest(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, x);
}

// keys (n, dim), n <= BLOCK, into columns of (dim, pitch); what is missing of the block is zero.
void lay_out_keys(const float* keys, int64_t row, int64_t n, int64_t dim, float* to, int64_t pitch) {
  for (int64_t d = 0; n < BLOCK && d < dim; d++) std::fill_n(to + d * pitch, BLOCK, 0.0f);
  at::vec::transpose_mxn<float>(keys, row, to, pitch, n, dim);
}

// The same in pairs of features, (dim / 2, pitch, 2): a pair is moved as one word, whose bits no transposition changes.
void lay_out_keys(const BFloat16* keys, int64_t row, int64_t n, int64_t dim, BFloat16* to, int64_t pitch) {
  lay_out_keys(
      reinterpret_cast<const float*>(keys), row / 2, n, dim / 2, reinterpret_cast<float*>(to), pitch);
}

// values (n, dim), n <= BLOCK, into (BLOCK / 2, dim, 2).
void lay_out_values(const BFloat16* values, int64_t row, int64_t n, int64_t dim, BFloat16* to) {
  auto wide = [](const BFloat16* x) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  };
  for (int64_t j = 0; j < BLOCK; j += 2) {
    const BFloat16* even = values + j * row;
    for (int64_t d = 0; d < dim; d += 16) {
      __m512i pair = j < n ? wide(even + d) : _mm512_setzero_si512();
      if (j + 1 < n) pair = _mm512_or_si512(pair, _mm512_slli_epi32(wide(even + row + d), 16));
      _mm512_storeu_si512(to + j * dim + 2 * d, pair);
    }
  }
}

// c (m, n) = a (m, k) b (k, n), added to c if `add`; leading dimensions follow their matrices. b in bfloat16: laid out.
template <typename T>
void multiply(
    int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc,
    bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, !std::is_same_v<T, float>);
}

// The weight of scores relative to the largest. The quick exponential errs by 20 units in the last place of a float,
// far less than rounding to bfloat16 does.
template <typename T>
Vec exponential(Vec x) {
  return std::is_same_v<T, float> ? x.exp() : x.exp_u20();
}

void store(Vec a, Vec b, BFloat16* to) { at::vec::convert_from_float<BFloat16>(a, b).store(to); }

void store(Vec a, Vec b, float* to) {
  a.store(to);
  b.store(to + Vec::size());
}

// One tile of one head: scores, weights, and per row the largest score, the sum of weights, the weighted sum of values.
template <typename T>
struct Tile {
  std::vector<float> scores, sums, top, total;
  std::vector<T> weights;

  Tile(int64_t rows, int64_t columns, int64_t dim_v)
      : scores(rows * columns), sums(rows * dim_v), top(rows), total(rows), weights(rows * columns) {}

  void clear() {
    std::fill(sums.begin(), sums.end(), 0.0f);
    std::fill(top.begin(), top.end(), NONE);
    std::fill(total.begin(), total.end(), 0.0f);
  }

  // Scores of row r for keys [base, base + columns) that query i does not keep become -inf.
  void mask(int64_t r, int64_t i, int64_t base, int64_t columns, int64_t sink, int64_t window, const bool* pad) {
    float* row = &scores[r * columns];
    int64_t sinks = std::clamp<int64_t>(sink - base, 0, columns);
    int64_t left = std::clamp<int64_t>(i - window + 1 - base, 0, columns);
    int64_t end = std::clamp<int64_t>(i + 1 - base, 0, columns);
    if (sinks < left) std::fill(row + sinks, row + left, NONE);
    std::fill(row + end, row + columns, NONE);
    if (pad != nullptr) {
      for (int64_t c = 0; c < end; c++) row[c] = pad[base + c] ? row[c] : NONE;
    }
  }

  // Take the scores of row r into the running soft-max and leave their weights.
  void weigh(int64_t r, int64_t columns, int64_t dim_v, float scale) {
    const float* row = &scores[r * columns];
    Vec most(NONE);
    for (int64_t c = 0; c < columns; c += Vec::size()) most = at::vec::maximum(most, Vec::loadu(row + c));
    float now = std::max(top[r], largest(most) * scale);
    // A row that has met no kept key yet: -inf minus -inf would be NaN.
    float base = now == NONE ? 0.0f : now;
    Vec factor(scale), away(-base), all(0.0f);
    T* to = &weights[r * columns];
    for (int64_t c = 0; c < columns; c += 2 * Vec::size()) {
      Vec a = exponential<T>(at::vec::fmadd(Vec::loadu(row + c), factor, away));
      Vec b = exponential<T>(at::vec::fmadd(Vec::loadu(row + c + Vec::size()), factor, away));
      all = all + a + b;
      store(a, b, to + c);
    }
    float shrink = std::exp(top[r] - base);
    total[r] = total[r] * shrink + sum(all);
    top[r] = now;
    if (shrink == 1.0f) return;
    Vec less(shrink);
    for (float* x = &sums[r * dim_v]; x < &sums[r * dim_v] + dim_v; x += Vec::size()) (Vec::loadu(x) * less).store(x);
  }

  // Add another soft-max of row r, over other keys: its largest score, its sum of weights, its weighted sum of values.
  void merge(int64_t r, float most, float weight, const float* values, int64_t dim_v) {
    float now = std::max(top[r], most), base = now == NONE ? 0.0f : now;
    float own = std::exp(top[r] - base), other = std::exp(most - base);
    total[r] = total[r] * own + weight * other;
    top[r] = now;
    Vec less(own), more(other);
    for (int64_t d = 0; d < dim_v; d += Vec::size()) {
      float* x = &sums[r * dim_v + d];
      (Vec::loadu(x) * less + Vec::loadu(values + d) * more).store(x);
    }
  }

  void write_row(int64_t r, int64_t dim_v, T* out) const {
    Vec share(total[r] > 0 ? 1.0f / total[r] : 0.0f);
    for (int64_t d = 0; d < dim_v; d += 2 * Vec::size()) {
      const float* x = &sums[r * dim_v + d];
      store(Vec::loadu(x) * share, Vec::loadu(x + Vec::size()) * share, out + d);
    }
  }

  void write(int64_t rows, int64_t dim_v, T* out, int64_t out_row, float* lse) const {
    for (int64_t r = 0; r < rows; r++) {
      write_row(r, dim_v, out + r * out_row);
      if (lse != nullptr) lse[r] = total[r] > 0 ? top[r] + std::log(total[r]) : NONE;
    }
  }
};

// q, k, v, out (B, heads, N, ·): data, and strides of batch, head and row; features one after the other, dim and dim_v
// multiples of 32. lse (B, H, N), contiguous, or null. sinks, windows (H,). heads: the query heads to compute, `count`
// of them. pad (B, N), contiguous, or null. sizes: those of Shape.
template <typename T>
void prefill(
    T* const* data, const int64_t* strides, float* lse, const int* sinks, const int* windows, const bool* pad,
    const int64_t* heads, int64_t count, const int64_t* sizes, float scale) {
  constexpr bool PAIRS = !std::is_same_v<T, float>;
  Shape s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  Tensor<T> q{data[0], strides[0], strides[1], strides[2]}, k{data[1], strides[3], strides[4], strides[5]};
  Tensor<T> v{data[2], strides[6], strides[7], strides[8]}, out{data[3], strides[9], strides[10], strides[11]};
  int64_t blocks = s.blocks();

  std::vector<uint8_t> live(s.batch * blocks, WHOLE);
  for (int64_t at = 0; pad != nullptr && at < s.batch * blocks; at++) {
    const bool* from = pad + at / blocks * s.length + at % blocks * BLOCK;
    int64_t n = std::min(BLOCK, s.length - at % blocks * BLOCK), kept = std::count(from, from + n, true);
    live[at] = kept == 0 ? DEAD : kept == n ? WHOLE : MIXED;
  }

  // One KV head after the other, so that its keys and values, laid out, stay in the cache.
  std::vector<std::vector<int64_t>> readers(s.kv_heads);
  for (int64_t n = 0; n < count; n++) readers[heads[n] / s.share].push_back(heads[n]);
  int64_t pitch = blocks * BLOCK + APART;
  std::unique_ptr<T[]> keys(new T[pitch * s.dim]);
  std::unique_ptr<T[]> values(PAIRS ? new T[blocks * BLOCK * s.dim_v] : nullptr);
  int64_t tiles = (s.length + ROWS - 1) / ROWS;

  for (int64_t group = 0; group < s.batch * s.kv_heads; group++) {
    int64_t b = group / s.kv_heads, g = group % s.kv_heads;
    const std::vector<int64_t>& here = readers[g];
    if (here.empty()) continue;
    const uint8_t* alive = &live[b * blocks];
    at::parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        int64_t first = n * BLOCK, size = std::min(BLOCK, s.length - first);
        lay_out_keys(k.at(b, g, first), k.row, size, s.dim, &keys[first * (PAIRS ? 2 : 1)], pitch);
        if constexpr (PAIRS) lay_out_values(v.at(b, g, first), v.row, size, s.dim_v, &values[first * s.dim_v]);
      }
    });
    // Tiles are taken one by one, the late and long ones first: heads differ too much to be dealt out beforehand.
    int64_t items = tiles * static_cast<int64_t>(here.size());
    std::atomic<int64_t> next{0};
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
      Tile<T> tile(ROWS, std::min(SPAN, blocks * BLOCK), s.dim_v);
      for (int64_t at = next++; at < items; at = next++) {
        int64_t head = here[at % here.size()], first = (tiles - 1 - at / static_cast<int64_t>(here.size())) * ROWS;
        int64_t rows = std::min(ROWS, s.length - first), last = (first + rows + BLOCK - 1) / BLOCK;
        int64_t sink = std::max(sinks[head], 0), window = std::max(windows[head], 0);
        int64_t left = std::min(std::max<int64_t>(first - window + 1, 0) / BLOCK, last);
        int64_t sinks_end = std::min((sink + BLOCK - 1) / BLOCK, left);
        tile.clear();

        auto attend = [&](int64_t from, int64_t to) {
          int64_t columns = (to - from) * BLOCK, base = from * BLOCK;
          multiply(
              rows, columns, s.dim, q.at(b, head, first), q.row, &keys[base * (PAIRS ? 2 : 1)], pitch,
              tile.scores.data(), columns, false);
          bool mixed = std::any_of(alive + from, alive + to, [](uint8_t x) { return x != WHOLE; });
          bool inside = base >= first + rows - window || base + columns <= sink;
          bool edge = mixed || !inside || base + columns > first;
          for (int64_t r = 0; r < rows; r++) {
            if (edge) {
              tile.mask(r, first + r, base, columns, sink, window, mixed ? pad + b * s.length : nullptr);
            }
            tile.weigh(r, columns, s.dim_v, scale);
          }
          // Past the last key weights are 0, but only values that were laid out can be read there.
          const T* seen = PAIRS ? &values[base * s.dim_v] : v.at(b, g, base);
          multiply(
              rows, s.dim_v, PAIRS ? columns : std::min(columns, s.length - base), tile.weights.data(), columns, seen,
              PAIRS ? s.dim_v : v.row, tile.sums.data(), s.dim_v, true);
        };
        // Runs of live blocks, SPAN keys at most.
        auto walk = [&](int64_t from, int64_t to) {
          for (int64_t n = from; n < to;) {
            int64_t end = n + 1;
            if (alive[n] != DEAD) {
              while (end < to && alive[end] != DEAD && (end + 1 - n) * BLOCK <= SPAN) end++;
              attend(n, end);
            }
            n = end;
          }
        };
        walk(0, sinks_end);
        walk(left, last);
        float* sums = lse == nullptr ? nullptr : lse + (b * s.kv_heads * s.share + head) * s.length + first;
        tile.write(rows, s.dim_v, out.at(b, head, first), out.row, sums);
      }
      at::native::cpublas::brgemm_release(PAIRS);
    });
  }
}

}  // namespace

extern "C" {

// Whether this CPU has a matrix unit for bfloat16; without one the layout above would only cost time.
int has_matrix_unit() { return at::native::cpublas::could_pack(at::kBFloat16); }

// 0, or FAILED.
int prefill_bfloat16(
    BFloat16* const* data, const int64_t* strides, float* lse, const int* sinks, const int* windows, const bool* pad,
    const int64_t* heads, int64_t count, const int64_t* sizes, float scale) {
  return guarded([&] {
    prefill<BFloat16>(data, strides, lse, sinks, windows, pad, heads, count, sizes, scale);
    return 0;
  });
}

int prefill_float32(
    float* const* data, const int64_t* strides, float* lse, const int* sinks, const int* windows, const bool* pad,
    const int64_t* heads, int64_t count, const int64_t* sizes, float scale) {
  return guarded([&] {
    prefill<float>(data, strides, lse, sinks, windows, pad, heads, count, sizes, scale);
    return 0;
  });
}
}
