// Linear attention to far keys: a causal prefill with a running state, and one decoded token. What the results are says
// attnopt/codegen/reference_linear.py; the order of the work, attnopt/codegen/linear_cpu.py. Inputs are float32 or
// bfloat16; features and states are float32, and so are products unless the CPU has a matrix unit for bfloat16.
//
// One head of one sequence after the other, or pieces of one side by side, in chunks of CHUNK rows. Row r of a run is
// query s + w + r, for the sink s and the window w of the head, and its keys are s to s + r. The features of a chunk's
// keys are made as columns, (F, CHUNK): as they are the right-hand side of the products within the chunk and, later,
// the left-hand side of what the chunk adds to the state.
//
// linear_prefill.cpp and linear_decode.cpp are compiled with this text, after it.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>

namespace {

using at::BFloat16;
using Vec = at::vec::Vectorized<float>;

// Microseconds of a token and head by CHUNK 32, 64, 128, D = R = 64, one thread of a Xeon with AVX-512, torch 2.13:
// float32 .78 .81 .89, bfloat16 .66 .58 .59.
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

// The same in bfloat16, b in pairs of its rows, (k / 2, n, 2), as the matrix unit reads it.
void multiply(
    int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b, int64_t ldb, float* c,
    int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, true);
}

float dot(const float* a, const float* b, int64_t n) {
  Vec all(0.0f);
  int64_t d = 0;
  for (; d + Vec::size() <= n; d += Vec::size()) all = at::vec::fmadd(Vec::loadu(a + d), Vec::loadu(b + d), all);
  float found = at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return x + y; }, all);
  for (; d < n; d++) found += a[d] * b[d];
  return found;
}

float sum(const float* x, int64_t n) {
  return at::vec::reduce_all<float>([](Vec a, Vec b) { return a + b; }, x, n);
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
const float* wide_rows(
    const T* from, int64_t row, int64_t count, int64_t size, const bool* pad, float* held, int64_t* ld) {
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
  std::unique_ptr<float[]> vector, rows, values, transposed, y, f, g, products, sums, state, normaliser;
  // The chunk's values, and how far apart their rows are.
  const float* seen = nullptr;
  int64_t seen_row = 0;
  float shift[CHUNK], total[CHUNK], squares[CHUNK];

  explicit Chunk(const Shape& s)
      : s(s), width(s.width()), vector(new float[s.dim]), rows(new float[CHUNK * s.dim]),
        values(new float[CHUNK * s.dim_v]),
        transposed(new float[CHUNK * s.dim]), y(new float[CHUNK * s.rank]), f(new float[CHUNK * width]),
        g(new float[CHUNK * width]), products(new float[CHUNK * CHUNK]), sums(new float[CHUNK * s.dim_v]),
        state(new float[width * s.dim_v]), normaliser(new float[width]) {}

  void clear() {
    std::fill_n(state.get(), width * s.dim_v, 0.0f);
    std::fill_n(normaliser.get(), width, 0.0f);
  }

  void save(float* to) const {
    std::copy_n(normaliser.get(), width, std::copy_n(state.get(), width * s.dim_v, to));
  }

  void restore(const float* from) {
    std::copy_n(from, width * s.dim_v, state.get());
    std::copy_n(from + width * s.dim_v, width, normaliser.get());
  }

  void begin(const Maps&) {}

  // keys (n, D) -> features as columns, g (F, n) of rows CHUNK apart; 0 in padding.
  template <typename T>
  void take_keys(const T* keys, int64_t row, int64_t n, const Maps& maps, const bool* pad) {
    int64_t ld;
    const float* x = wide_rows(keys, row, n, s.dim, pad, rows.get(), &ld);
    at::vec::transpose_mxn<float>(x, ld, transposed.get(), CHUNK, n, s.dim);
    // Of kind taylor the first feature is 1.
    multiply(
        s.rank, n, s.dim, maps.wk, s.dim, transposed.get(), CHUNK, g.get() + (s.taylor ? CHUNK : 0), CHUNK, false);
    finish_keys(keys, row, n, maps, pad);
  }

  // From projections to features. The keys are read where their squares count.
  template <typename T>
  void finish_keys(const T* keys, int64_t row, int64_t n, const Maps& maps, const bool* pad) {
    float* own = g.get() + (s.taylor ? CHUNK : 0);
    square(keys, row, n, s.taylor ? 0.0f : *maps.ck);
    for (int64_t r = 0; r < s.rank; r++) {
      float *at = own + r * CHUNK, bias = maps.bk[r];
      if (s.taylor) {
        for (int64_t c = 0; c < n; c++) at[c] += bias;
      } else {
        for (int64_t c = 0; c < n; c++) at[c] = std::min(at[c] + bias - squares[c], KEY_CAP);
        exponentials(at, n, 0.0f);
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

  // squares (n,) = factor |x|²
  template <typename T>
  void square(const T* x, int64_t row, int64_t n, float factor) {
    std::fill_n(squares, n, 0.0f);
    for (int64_t i = 0; factor != 0.0f && i < n; i++) {
      widen(x + i * row, vector.get(), s.dim);
      squares[i] = factor * dot(vector.get(), vector.get(), s.dim);
    }
  }

  // queries (n, D) -> features f (n, F), shift.
  template <typename T>
  void take_queries(const T* queries, int64_t row, int64_t n, const Maps& maps) {
    int64_t ld;
    const float* x = wide_rows(queries, row, n, s.dim, nullptr, rows.get(), &ld);
    multiply(n, s.rank, s.dim, x, ld, maps.wq, s.rank, s.taylor ? y.get() : f.get(), s.rank, false);
    if (!s.taylor) return finish_queries(queries, row, n, maps);
    for (int64_t i = 0; i < n; i++) {
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

  // Of kind exp, from projections to features and shifts.
  template <typename T>
  void finish_queries(const T* queries, int64_t row, int64_t n, const Maps& maps) {
    square(queries, row, n, *maps.cq);
    for (int64_t i = 0; i < n; i++) {
      float* at = f.get() + i * s.rank;
      for (int64_t r = 0; r < s.rank; r++) at[r] += maps.bq[r];
      float most = at::vec::reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, at, s.rank);
      exponentials(at, s.rank, most);
      shift[i] = most - squares[i];
    }
  }

  template <typename T>
  void take_values(const T* v, int64_t row, int64_t n, const bool* pad) {
    seen = wide_rows(v, row, n, s.dim_v, pad, values.get(), &seen_row);
  }

  // Products of row i, (n,): 0 for later keys. Their sum and that of keys before the chunk is `total`.
  void finish_products(int64_t i, int64_t n) {
    float* row = products.get() + i * CHUNK;
    std::fill(row + i + 1, row + n, 0.0f);
    total[i] = dot(f.get() + i * width, normaliser.get(), width) + sum(row, i + 1);
  }

  // The sums of n rows over keys up to each, into `sums` (n, Dv) and `total`.
  void attend(int64_t n) {
    if (s.taylor) {
      multiply(n, n, s.rank, y.get(), s.rank, g.get() + CHUNK, CHUNK, products.get(), CHUNK, false);
    } else {
      multiply(n, n, width, f.get(), width, g.get(), CHUNK, products.get(), CHUNK, false);
    }
    for (int64_t i = 0; i < n; i++) {
      float* row = products.get() + i * CHUNK;
      // The first feature of a key is 1, and 0 in padding.
      for (int64_t c = 0; s.taylor && c <= i; c++) row[c] = g[c] + row[c] * (1.0f + 0.5f * row[c]);
      finish_products(i, n);
    }
    multiply(n, s.dim_v, n, products.get(), CHUNK, seen, seen_row, sums.get(), s.dim_v, false);
    multiply(n, s.dim_v, width, f.get(), width, state.get(), s.dim_v, sums.get(), s.dim_v, true);
  }

  // The state takes the chunk's keys.
  void add(int64_t n) {
    multiply(width, s.dim_v, n, g.get(), CHUNK, seen, seen_row, state.get(), s.dim_v, true);
    add_to_normaliser(n);
  }

  void add_to_normaliser(int64_t n) {
    for (int64_t r = 0; r < width; r++) normaliser[r] += sum(g.get() + r * CHUNK, n);
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

}  // namespace
