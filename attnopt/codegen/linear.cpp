// Linear attention to far keys: a causal prefill with a running state, and one decoded token. What the results are says
// attnopt/codegen/reference_linear.py; the order of the work, attnopt/codegen/linear_cpu.py. Inputs are float32 or
// bfloat16; features, products and states are float32.
//
// Prefill. One head of one sequence after the other, in chunks of CHUNK rows. Row r of a run is query s + w + r, for the
// sink s and the window w of the head, and its keys are s to s + r. The features of a chunk's keys are made as
// columns, (F, CHUNK): as they are the right-hand side of the products within the chunk and, later, the left-hand side of
// what the chunk adds to the state.
//
// Decoding. Each head's state is walked once: a row takes what leaves the window and is read for the query.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>

namespace {

using at::BFloat16;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t CHUNK = 64;
constexpr float NONE = -std::numeric_limits<float>::infinity();
// As attnopt/feature_maps.py has it.
constexpr float KEY_CAP = 40.0f;
constexpr float HALF_ROOT = 0.70710678118654752f;

template <typename T>
struct Tensor {
  T* data;
  int64_t batch, head, row;  // strides, in elements
  T* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
};

// served: heads with a far part, of `heads`; rank: R, rows of a map; taylor: its kind, else "exp".
struct Shape {
  int64_t batch, heads, kv_heads, length, dim, dim_v, served, rank, taylor;
  // Features of a row in a prefill's own state: of kind taylor, a product of two once and not twice.
  int64_t width() const { return taylor ? 1 + rank + rank * (rank + 1) / 2 : rank; }
};

// Of each served head: wq (D, R) in a prefill and (R, D) in decoding, bq (R,), cq, wk (R, D), bk (R,), ck, u (D,), u0.
// In a prefill of kind exp, u and u0 are part of wq and bq, and null.
struct Maps {
  const float *wq, *bq, *cq, *wk, *bk, *ck, *u, *u0;
};

Maps maps_of(const Maps& all, const Shape& s, int64_t n) {
  int64_t whole = n * s.rank * s.dim;
  auto own = [](const float* from, int64_t past) { return from == nullptr ? nullptr : from + past; };
  return {all.wq + whole, all.bq + n * s.rank, all.cq + n, all.wk + whole,
          all.bk + n * s.rank, all.ck + n, own(all.u, n * s.dim), own(all.u0, n)};
}

// c (m, n) = a (m, k) b (k, n), added to c if `add`; leading dimensions follow their matrices.
void multiply(
    int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
    bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
}

float dot(const float* a, const float* b, int64_t n) {
  Vec all(0.0f);
  int64_t d = 0;
  for (; d + Vec::size() <= n; d += Vec::size()) all = at::vec::fmadd(Vec::loadu(a + d), Vec::loadu(b + d), all);
  float found = at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return x + y; }, all);
  for (; d < n; d++) found += a[d] * b[d];
  return found;
}

// exp(x - less), for `size` entries.
void exponentials(float* x, int64_t size, float less) {
  at::vec::map<float>([less](Vec a) { return (a - Vec(less)).exp(); }, x, x, size);
}

void widen(const float* from, float* to, int64_t size) { std::copy_n(from, size, to); }

void widen(const BFloat16* from, float* to, int64_t size) { at::vec::convert(from, to, size); }

void narrow(const float* from, float* to, int64_t size) { std::copy_n(from, size, to); }

void narrow(const float* from, BFloat16* to, int64_t size) { at::vec::convert(from, to, size); }

// Rows of a tensor in float32: where they lie, or in `held` if they have to be converted or hidden.
template <typename T>
const float* wide_rows(const T* from, int64_t row, int64_t count, int64_t size, const bool* pad, float* held, int64_t* ld) {
  if constexpr (std::is_same_v<T, float>) {
    if (pad == nullptr) {
      *ld = row;
      return from;
    }
  }
  *ld = size;
  for (int64_t r = 0; r < count; r++) {
    float* to = held + r * size;
    if (pad == nullptr || pad[r]) {
      widen(from + r * row, to, size);
    } else {
      std::fill_n(to, size, 0.0f);
    }
  }
  return held;
}

// What one chunk is made in.
struct Chunk {
  const Shape& s;
  int64_t width;
  std::unique_ptr<float[]> rows, values, transposed, y, f, g, products, sums, state, normaliser;
  float shift[CHUNK], total[CHUNK], squares[CHUNK];

  explicit Chunk(const Shape& s)
      : s(s), width(s.width()), rows(new float[CHUNK * s.dim]), values(new float[CHUNK * s.dim_v]),
        transposed(new float[CHUNK * s.dim]), y(new float[CHUNK * s.rank]), f(new float[CHUNK * width]),
        g(new float[CHUNK * width]), products(new float[CHUNK * CHUNK]), sums(new float[CHUNK * s.dim_v]),
        state(new float[width * s.dim_v]), normaliser(new float[width]) {}

  void clear() {
    std::fill_n(state.get(), width * s.dim_v, 0.0f);
    std::fill_n(normaliser.get(), width, 0.0f);
  }

  // keys (n, D) -> features as columns, g (F, n) of rows CHUNK apart; 0 in padding.
  void keys(const float* x, int64_t ld, int64_t n, const Maps& maps, const bool* pad) {
    at::vec::transpose_mxn<float>(x, ld, transposed.get(), CHUNK, n, s.dim);
    // Of kind taylor the first feature is 1.
    float* own = g.get() + (s.taylor ? CHUNK : 0);
    multiply(s.rank, n, s.dim, maps.wk, s.dim, transposed.get(), CHUNK, own, CHUNK, false);
    if (!s.taylor && *maps.ck != 0.0f) {
      for (int64_t c = 0; c < n; c++) squares[c] = *maps.ck * dot(x + c * ld, x + c * ld, s.dim);
    } else {
      std::fill_n(squares, n, 0.0f);
    }
    for (int64_t r = 0; r < s.rank; r++) {
      float *row = own + r * CHUNK, bias = maps.bk[r];
      if (s.taylor) {
        for (int64_t c = 0; c < n; c++) row[c] += bias;
      } else {
        for (int64_t c = 0; c < n; c++) row[c] = std::min(row[c] + bias - squares[c], KEY_CAP);
        exponentials(row, n, 0.0f);
      }
    }
    if (s.taylor) {
      std::fill_n(g.get(), n, 1.0f);
      float* to = own + s.rank * CHUNK;
      for (int64_t a = 0; a < s.rank; a++) {
        for (int64_t b = a; b < s.rank; b++, to += CHUNK) {
          float factor = a == b ? HALF_ROOT : 1.0f;
          for (int64_t c = 0; c < n; c++) to[c] = factor * own[a * CHUNK + c] * own[b * CHUNK + c];
        }
      }
    }
    for (int64_t c = 0; pad != nullptr && c < n; c++) {
      for (int64_t r = 0; !pad[c] && r < width; r++) g[r * CHUNK + c] = 0.0f;
    }
  }

  // queries (n, D) -> features f (n, F), shift.
  void queries(const float* x, int64_t ld, int64_t n, const Maps& maps) {
    multiply(n, s.rank, s.dim, x, ld, maps.wq, s.rank, s.taylor ? y.get() : f.get(), s.rank, false);
    for (int64_t i = 0; i < n; i++) {
      if (!s.taylor) {
        float *row = f.get() + i * s.rank, most = NONE;
        for (int64_t r = 0; r < s.rank; r++) row[r] += maps.bq[r];
        most = at::vec::reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, row, s.rank);
        exponentials(row, s.rank, most);
        shift[i] = *maps.cq == 0.0f ? most : most - *maps.cq * dot(x + i * ld, x + i * ld, s.dim);
        continue;
      }
      float *own = y.get() + i * s.rank, *to = f.get() + i * width;
      *to++ = 1.0f;
      for (int64_t r = 0; r < s.rank; r++) *to++ = own[r] += maps.bq[r];
      for (int64_t a = 0; a < s.rank; a++) {
        *to++ = HALF_ROOT * own[a] * own[a];
        for (int64_t b = a + 1; b < s.rank; b++) *to++ = own[a] * own[b];
      }
      shift[i] = dot(x + i * ld, maps.u, s.dim) + *maps.u0;
    }
  }

  // The sums of n rows over keys up to each, into `sums` (n, Dv) and `total`; the state then has the chunk's keys too.
  void attend(const float* v, int64_t ld, int64_t n) {
    if (s.taylor) {
      multiply(n, n, s.rank, y.get(), s.rank, g.get() + CHUNK, CHUNK, products.get(), CHUNK, false);
    } else {
      multiply(n, n, width, f.get(), width, g.get(), CHUNK, products.get(), CHUNK, false);
    }
    for (int64_t i = 0; i < n; i++) {
      float* row = products.get() + i * CHUNK;
      if (s.taylor) {
        // The first feature of a key is 1, and 0 in padding.
        for (int64_t c = 0; c <= i; c++) row[c] = g[c] + row[c] * (1.0f + 0.5f * row[c]);
      }
      std::fill(row + i + 1, row + n, 0.0f);
      total[i] = dot(f.get() + i * width, normaliser.get(), width);
      for (int64_t c = 0; c <= i; c++) total[i] += row[c];
    }
    multiply(n, s.dim_v, n, products.get(), CHUNK, v, ld, sums.get(), s.dim_v, false);
    multiply(n, s.dim_v, width, f.get(), width, state.get(), s.dim_v, sums.get(), s.dim_v, true);
    multiply(width, s.dim_v, n, g.get(), CHUNK, v, ld, state.get(), s.dim_v, true);
    for (int64_t r = 0; r < width; r++) {
      const float* row = g.get() + r * CHUNK;
      float all = 0.0f;
      for (int64_t c = 0; c < n; c++) all += row[c];
      normaliser[r] += all;
    }
  }
};

// Reads what attnopt/codegen/linear_native.py packs.
struct Call {
  const int64_t* next;
  template <typename T>
  T* pointer() { return reinterpret_cast<T*>(*next++); }
  Maps maps() {
    Maps found;
    for (const float** at : {&found.wq, &found.bq, &found.cq, &found.wk, &found.bk, &found.ck, &found.u, &found.u0}) {
      *at = pointer<const float>();
    }
    return found;
  }
  Shape shape() {
    Shape found;
    std::copy_n(next, 9, &found.batch);
    next += 9;
    return found;
  }
};

// q, k, v, out (B, heads, N, ·), features one after the other; out has the served heads alone. lse (B, h, N), heads,
// sinks, windows (h,), pad (B, N) or null, and maps are contiguous. Strides are those of batch, head and row.
template <typename T>
int prefill(const int64_t* packed) {
  Call call{packed};
  T* data[4];
  for (T*& x : data) x = call.pointer<T>();
  float* lse = call.pointer<float>();
  const int *heads = call.pointer<const int>(), *sinks = call.pointer<const int>(), *windows = call.pointer<const int>();
  const bool* pad = call.pointer<const bool>();
  Maps maps = call.maps();
  const int64_t* strides = call.next;
  call.next += 12;
  Shape s = call.shape();
  Tensor<T> q{data[0], strides[0], strides[1], strides[2]}, k{data[1], strides[3], strides[4], strides[5]};
  Tensor<T> v{data[2], strides[6], strides[7], strides[8]}, out{data[3], strides[9], strides[10], strides[11]};

  at::parallel_for(0, s.batch * s.served, 1, [&](int64_t begin, int64_t end) {
    Chunk chunk(s);
    for (int64_t item = begin; item < end; item++) {
      int64_t b = item / s.served, n = item % s.served, head = heads[n], kv = head / (s.heads / s.kv_heads);
      int64_t sink = std::max(sinks[n], 0), window = std::max(windows[n], 0);
      int64_t none = std::min(sink + window, s.length), rows = s.length - none;
      Maps own = maps_of(maps, s, n);
      float* sums = lse + item * s.length;
      std::fill_n(sums, none, NONE);
      for (int64_t i = 0; i < none; i++) std::fill_n(out.at(b, n, i), s.dim_v, T(0.0f));
      chunk.clear();
      for (int64_t first = 0; first < rows; first += CHUNK) {
        int64_t count = std::min(CHUNK, rows - first), from = sink + first, ld;
        const bool* real = pad == nullptr ? nullptr : pad + b * s.length + from;
        const float* x = wide_rows(k.at(b, kv, from), k.row, count, s.dim, real, chunk.rows.get(), &ld);
        chunk.keys(x, ld, count, own, real);
        x = wide_rows(q.at(b, head, none + first), q.row, count, s.dim, nullptr, chunk.rows.get(), &ld);
        chunk.queries(x, ld, count, own);
        x = wide_rows(v.at(b, kv, from), v.row, count, s.dim_v, real, chunk.values.get(), &ld);
        chunk.attend(x, ld, count);
        for (int64_t i = 0; i < count; i++) {
          float total = chunk.total[i], *row = chunk.sums.get() + i * s.dim_v;
          // A total of 0 comes with sums of 0: what is left of them is 0.
          Vec divisor(total > 0.0f ? total : std::numeric_limits<float>::infinity());
          at::vec::map<float>([divisor](Vec a) { return a / divisor; }, row, row, s.dim_v);
          narrow(row, out.at(b, n, none + first + i), s.dim_v);
          sums[none + first + i] = total > 0.0f ? chunk.shift[i] + std::log(total) : NONE;
        }
      }
    }
    at::native::cpublas::brgemm_release(false);
  });
  return 0;
}

// y (R,) = w (R, D) x + b
void project(const float* w, const float* b, const float* x, const Shape& s, float* y) {
  for (int64_t r = 0; r < s.rank; r++) y[r] = b[r] + dot(w + r * s.dim, x, s.dim);
}

// [1, y, vec(y yᵀ) / sqrt 2] (1 + R + R²,) of y (R,).
void second_order(const float* y, int64_t rank, float* to) {
  *to++ = 1.0f;
  to = std::copy_n(y, rank, to);
  for (int64_t a = 0; a < rank; a++) {
    for (int64_t b = 0; b < rank; b++) *to++ = HALF_ROOT * y[a] * y[b];
  }
}

// Adds g_r (values, 1) to row r of a state (F, Dv + 1), if there is a g, and leaves the sum of f_r times row r in sums.
struct Walk {
  float *state, *sums;
  const float *f, *g, *values;
  int64_t width, row;

  // Columns from d on, N vectors of them, the last of which has `last` entries.
  template <int N>
  void columns(int64_t d, int64_t last) const {
    auto load = [last](const float* from, int n) {
      return n < N - 1 ? Vec::loadu(from + n * Vec::size()) : Vec::loadu(from + n * Vec::size(), last);
    };
    Vec all[N], added[N];
    for (int n = 0; n < N; n++) {
      all[n] = Vec(0.0f);
      added[n] = g == nullptr ? all[n] : load(values + d, n);
    }
    for (int64_t r = 0; r < width; r++) {
      float* at = state + r * row + d;
      Vec weight(f[r]), grown(g == nullptr ? 0.0f : g[r]);
      for (int n = 0; n < N; n++) {
        Vec now = load(at, n);
        if (g != nullptr) {
          now = at::vec::fmadd(grown, added[n], now);
          now.store(at + n * Vec::size(), n < N - 1 ? Vec::size() : last);
        }
        all[n] = at::vec::fmadd(weight, now, all[n]);
      }
    }
    for (int n = 0; n < N; n++) all[n].store(sums + d + n * Vec::size(), n < N - 1 ? Vec::size() : last);
  }

  void operator()() const {
    int64_t d = 0;
    for (; d + 4 * Vec::size() < row; d += 4 * Vec::size()) columns<4>(d, Vec::size());
    for (; d < row; d += Vec::size()) columns<1>(d, std::min<int64_t>(Vec::size(), row - d));
  }
};

// q (B, H, 1, D), with strides of batch and head; k (B, C, D) and v (B, C, Dv), of batch and slot. out (B, h, 1, Dv), lse
// (B, h), slots (B, h), heads (h,), state (B, h, F, Dv + 1) with F as attnopt/feature_maps.py has it, and maps are
// contiguous. The length of the shape is C. 1, and nothing done, where a slot is beyond it.
template <typename T>
int decode(const int64_t* packed) {
  Call call{packed};
  T* data[4];
  for (T*& x : data) x = call.pointer<T>();
  float* lse = call.pointer<float>();
  const int *slots = call.pointer<const int>(), *heads = call.pointer<const int>();
  float* state = call.pointer<float>();
  Maps maps = call.maps();
  const int64_t* strides = call.next;
  call.next += 6;
  Shape s = call.shape();
  if (std::any_of(slots, slots + s.batch * s.served, [&](int slot) { return slot >= s.length; })) return 1;
  int64_t width = s.taylor ? 1 + s.rank + s.rank * s.rank : s.rank, row = s.dim_v + 1;

  at::parallel_for(0, s.batch * s.served, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> x(new float[s.dim]), y(new float[s.rank]), f(new float[width]), g(new float[width]);
    std::unique_ptr<float[]> values(new float[row]), sums(new float[row]);
    for (int64_t item = begin; item < end; item++) {
      int64_t b = item / s.served, n = item % s.served;
      Maps own = maps_of(maps, s, n);
      float* held = state + item * width * row;
      int64_t slot = slots[item];
      if (slot >= 0) {
        widen(data[1] + b * strides[2] + slot * strides[3], x.get(), s.dim);
        widen(data[2] + b * strides[4] + slot * strides[5], values.get(), s.dim_v);
        values[s.dim_v] = 1.0f;
        project(own.wk, own.bk, x.get(), s, s.taylor ? y.get() : g.get());
        if (s.taylor) {
          second_order(y.get(), s.rank, g.get());
        } else {
          float square = *own.ck == 0.0f ? 0.0f : *own.ck * dot(x.get(), x.get(), s.dim);
          for (int64_t r = 0; r < width; r++) g[r] = std::min(g[r] - square, KEY_CAP);
          exponentials(g.get(), width, 0.0f);
        }
      }
      widen(data[0] + b * strides[0] + heads[n] * strides[1], x.get(), s.dim);
      project(own.wq, own.bq, x.get(), s, s.taylor ? y.get() : f.get());
      float shift = dot(x.get(), own.u, s.dim) + *own.u0;
      if (s.taylor) {
        second_order(y.get(), s.rank, f.get());
      } else {
        float most = *std::max_element(f.get(), f.get() + width);
        exponentials(f.get(), width, most);
        shift += most - *own.cq * dot(x.get(), x.get(), s.dim);
      }
      Walk{held, sums.get(), f.get(), slot >= 0 ? g.get() : nullptr, values.get(), width, row}();
      float total = sums[s.dim_v];
      float share = total > 0.0f ? total : std::numeric_limits<float>::infinity();
      for (int64_t d = 0; d < s.dim_v; d++) sums[d] /= share;
      narrow(sums.get(), data[3] + item * s.dim_v, s.dim_v);
      lse[item] = total > 0.0f ? shift + std::log(total) : NONE;
    }
  });
  return 0;
}

}  // namespace

extern "C" {

int prefill_bfloat16(const int64_t* call) { return prefill<BFloat16>(call); }
int prefill_float32(const int64_t* call) { return prefill<float>(call); }
int decode_bfloat16(const int64_t* call) { return decode<BFloat16>(call); }
int decode_float32(const int64_t* call) { return decode<float>(call); }
}
