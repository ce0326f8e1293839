// Causal prefill whose heads keep their own sinks and windows, in bfloat16, for CPUs that multiply tiles of it (AMX).
//
// Key j is kept by query i of head h where  j <= i  and  (j < sinks[h] or i - j < windows[h])  and pad[b, j].
//
// K and V of a KV head are laid out once, as the matrix unit reads them (pairs along the reduced dimension, "VNNI"). A
// tile of ROWS queries then walks the live keys: those of the sinks, and those from the window's left end to the
// diagonal, in whole blocks. Only runs at an edge, or with padding in them, are masked.
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

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
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

struct Tensor {
  BFloat16* data;
  int64_t batch, head, row;  // strides, in elements
  BFloat16* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
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

// keys (n, dim), n <= BLOCK, into columns of (dim / 2, pitch, 2); what is missing of the block is zero.
void lay_out_keys(const BFloat16* keys, int64_t row, int64_t n, int64_t dim, BFloat16* to, int64_t pitch) {
  // Two features are moved as one word; a transposition changes no bits of it.
  auto from = reinterpret_cast<const float*>(keys);
  auto words = reinterpret_cast<float*>(to);
  for (int64_t d = 0; n < BLOCK && d < dim / 2; d++) std::fill_n(words + d * pitch, BLOCK, 0.0f);
  at::vec::transpose_mxn<float>(from, row / 2, words, pitch, n, dim / 2);
}

// values (n, dim), n <= BLOCK, into (BLOCK / 2, dim, 2).
__attribute__((optimize("tree-vectorize"))) void lay_out_values(
    const BFloat16* values, int64_t row, int64_t n, int64_t dim, BFloat16* to) {
  auto from = reinterpret_cast<const uint16_t*>(values);
  auto words = reinterpret_cast<uint32_t*>(to);
  for (int64_t j = 0; j < BLOCK; j += 2) {
    const uint16_t* even = from + j * row;
    const uint16_t* odd = even + row;
    uint32_t* out = words + j / 2 * dim;
    if (j + 1 < n) {
      for (int64_t d = 0; d < dim; d++) out[d] = even[d] | static_cast<uint32_t>(odd[d]) << 16;
    } else if (j < n) {
      for (int64_t d = 0; d < dim; d++) out[d] = even[d];
    } else {
      std::fill(out, out + dim, 0u);
    }
  }
}

// One tile of one head: scores, weights, and per row the largest score, the sum of weights, the weighted sum of values.
struct Tile {
  std::vector<float> scores, sums, top, total;
  std::vector<BFloat16> weights;

  explicit Tile(int64_t dim_v)
      : scores(ROWS * SPAN), sums(ROWS * dim_v), top(ROWS), total(ROWS), weights(ROWS * SPAN) {}

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
    BFloat16* to = &weights[r * columns];
    for (int64_t c = 0; c < columns; c += 2 * Vec::size()) {
      Vec a = at::vec::fmadd(Vec::loadu(row + c), factor, away).exp_u20();
      Vec b = at::vec::fmadd(Vec::loadu(row + c + Vec::size()), factor, away).exp_u20();
      all = all + a + b;
      at::vec::convert_from_float<BFloat16>(a, b).store(to + c);
    }
    float shrink = std::exp(top[r] - base);
    total[r] = total[r] * shrink + sum(all);
    top[r] = now;
    if (shrink == 1.0f) return;
    Vec less(shrink);
    for (float* x = &sums[r * dim_v]; x < &sums[r * dim_v] + dim_v; x += Vec::size()) (Vec::loadu(x) * less).store(x);
  }

  void write(int64_t rows, int64_t dim_v, BFloat16* out, int64_t out_row, float* lse) const {
    for (int64_t r = 0; r < rows; r++) {
      Vec share(total[r] > 0 ? 1.0f / total[r] : 0.0f);
      for (int64_t d = 0; d < dim_v; d += 2 * Vec::size()) {
        const float* x = &sums[r * dim_v + d];
        at::vec::convert_from_float<BFloat16>(Vec::loadu(x) * share, Vec::loadu(x + Vec::size()) * share)
            .store(out + r * out_row + d);
      }
      if (lse != nullptr) lse[r] = total[r] > 0 ? top[r] + std::log(total[r]) : NONE;
    }
  }
};

}  // namespace

extern "C" {

// Whether this CPU has a matrix unit for bfloat16; without one the layout above would only cost time.
int serves() { return at::native::cpublas::could_pack(at::kBFloat16); }

// q, k, v, out (B, heads, N, ·): data, and strides of batch, head and row; features one after the other, dim and dim_v
// multiples of 32. lse (B, H, N), contiguous, or null. sinks, windows (H,). heads: the query heads to compute, `count`
// of them. pad (B, N), contiguous, or null.
void prefill(
    BFloat16* q_data, BFloat16* k_data, BFloat16* v_data, BFloat16* out_data, const int64_t* strides, float* lse,
    const int* sinks, const int* windows, const bool* pad, const int64_t* heads, int64_t count, const int64_t* sizes,
    float scale) {
  Shape s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  Tensor q{q_data, strides[0], strides[1], strides[2]}, k{k_data, strides[3], strides[4], strides[5]};
  Tensor v{v_data, strides[6], strides[7], strides[8]}, out{out_data, strides[9], strides[10], strides[11]};
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
  std::unique_ptr<BFloat16[]> keys(new BFloat16[pitch * s.dim]);
  std::unique_ptr<BFloat16[]> values(new BFloat16[blocks * BLOCK * s.dim_v]);
  int64_t tiles = (s.length + ROWS - 1) / ROWS;

  for (int64_t group = 0; group < s.batch * s.kv_heads; group++) {
    int64_t b = group / s.kv_heads, g = group % s.kv_heads;
    const std::vector<int64_t>& here = readers[g];
    if (here.empty()) continue;
    const uint8_t* alive = &live[b * blocks];
    at::parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        int64_t first = n * BLOCK, size = std::min(BLOCK, s.length - first);
        lay_out_keys(k.at(b, g, first), k.row, size, s.dim, &keys[first * 2], pitch);
        lay_out_values(v.at(b, g, first), v.row, size, s.dim_v, &values[first * s.dim_v]);
      }
    });
    // Tiles are taken one by one, the late and long ones first: heads differ too much to be dealt out beforehand.
    int64_t items = tiles * static_cast<int64_t>(here.size());
    std::atomic<int64_t> next{0};
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
      Tile tile(s.dim_v);
      for (int64_t at = next++; at < items; at = next++) {
        int64_t head = here[at % here.size()], first = (tiles - 1 - at / static_cast<int64_t>(here.size())) * ROWS;
        int64_t rows = std::min(ROWS, s.length - first), last = (first + rows + BLOCK - 1) / BLOCK;
        int64_t sink = std::max(sinks[head], 0), window = std::max(windows[head], 0);
        int64_t left = std::min(std::max<int64_t>(first - window + 1, 0) / BLOCK, last);
        int64_t sinks_end = std::min((sink + BLOCK - 1) / BLOCK, left);
        tile.clear();

        auto attend = [&](int64_t from, int64_t to) {
          int64_t columns = (to - from) * BLOCK, base = from * BLOCK;
          at::native::cpublas::brgemm(
              rows, columns, s.dim, q.row, pitch, columns, false, q.at(b, head, first), &keys[base * 2],
              tile.scores.data());
          bool mixed = std::any_of(alive + from, alive + to, [](uint8_t x) { return x != WHOLE; });
          bool inside = base >= first + rows - window || base + columns <= sink;
          bool edge = mixed || !inside || base + columns > first;
          for (int64_t r = 0; r < rows; r++) {
            if (edge) {
              tile.mask(r, first + r, base, columns, sink, window, mixed ? pad + b * s.length : nullptr);
            }
            tile.weigh(r, columns, s.dim_v, scale);
          }
          at::native::cpublas::brgemm(
              rows, s.dim_v, columns, columns, s.dim_v, s.dim_v, true, tile.weights.data(), &values[base * s.dim_v],
              tile.sums.data());
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
      at::native::cpublas::brgemm_release();
    });
  }
}
}
