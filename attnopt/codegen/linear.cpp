// Linear attention to far keys: a causal prefill with a running state, and one decoded token. What the results are says
// attnopt/codegen/reference_linear.py; the order of the work, attnopt/codegen/linear_cpu.py. Inputs are float32 or
// bfloat16; features and states are float32, and so are products unless the CPU has a matrix unit for bfloat16.
//
// Prefill. One head of one sequence after the other, or pieces of one side by side, in chunks of CHUNK rows. Row r of a run is query s + w + r, for the
// sink s and the window w of the head, and its keys are s to s + r. The features of a chunk's keys are made as
// columns, (F, CHUNK): as they are the right-hand side of the products within the chunk and, later, the left-hand side of
// what the chunk adds to the state.
//
// Decoding. Each head's state is walked once: a row takes what leaves the window and is read for the query.

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
  std::unique_ptr<float[]> vector, rows, values, transposed, y, f, g, products, sums, state, normaliser;
  // The chunk's values, and how far apart their rows are.
  const float* seen = nullptr;
  int64_t seen_row = 0;
  float shift[CHUNK], total[CHUNK], squares[CHUNK];

  explicit Chunk(const Shape& s)
      : s(s), width(s.width()), vector(new float[s.dim]), rows(new float[CHUNK * s.dim]), values(new float[CHUNK * s.dim_v]),
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

// x (n, dim), n <= count, into pairs of rows (count / 2, dim, 2): 0 for rows that are not there, or padding.
void lay_out_pairs(const BFloat16* x, int64_t row, int64_t n, int64_t count, int64_t dim, const bool* pad, BFloat16* to) {
  auto load = [&](int64_t j, int64_t d) {
    if (j >= n || (pad != nullptr && !pad[j])) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + j * row + d)));
  };
  for (int64_t j = 0; j < count; j += 2) {
    for (int64_t d = 0; d < dim; d += 16) {
      __m512i pair = _mm512_or_si512(load(j, d), _mm512_slli_epi32(load(j + 1, d), 16));
      _mm512_storeu_si512(to + j * dim + 2 * d, pair);
    }
  }
}

// A chunk of kind exp in bfloat16, for CPUs with a matrix unit. State, normaliser and exponents are float32, the last
// because a projection is a product with each half of its weights, w = high + low. What is rounded to bfloat16 is what is
// multiplied: features (none is above 1 in queries), their products, and the state as it is read.
struct Pairs : Chunk {
  std::unique_ptr<BFloat16[]> wq, wk, turned, queries, keys, key_pairs, weights, value_pairs, narrowed, state_pairs;

  explicit Pairs(const Shape& s)
      : Chunk(s), wq(new BFloat16[2 * s.dim * s.rank]), wk(new BFloat16[2 * s.dim * s.rank]),
        turned(new BFloat16[s.dim * CHUNK]()), queries(new BFloat16[CHUNK * s.rank]),
        keys(new BFloat16[s.rank * CHUNK]), key_pairs(new BFloat16[s.rank * CHUNK]),
        weights(new BFloat16[CHUNK * CHUNK]), value_pairs(new BFloat16[CHUNK * s.dim_v]),
        narrowed(new BFloat16[s.rank * s.dim_v]), state_pairs(new BFloat16[s.rank * s.dim_v]) {}

  // The kernel's vector loops and tiles step by 32; keys are moved as words of two features.
  static bool serve(const Shape& s, const Tensor<BFloat16>& k) {
    bool even = k.batch % 2 == 0 && k.head % 2 == 0 && k.row % 2 == 0 && reinterpret_cast<uintptr_t>(k.data) % 4 == 0;
    return !s.taylor && s.dim % 32 == 0 && s.dim_v % 32 == 0 && s.rank % 32 == 0 && even &&
        at::native::cpublas::could_pack(at::kBFloat16);
  }

  void begin(const Maps& maps) {
    int64_t size = s.dim * s.rank;
    for (int64_t d = 0; d < s.dim; d++) {
      for (int64_t r = 0; r < s.rank; r++) {
        split(maps.wq[d * s.rank + r], &wq[(d / 2 * s.rank + r) * 2 + d % 2], size);
        split(maps.wk[r * s.dim + d], &wk[r * s.dim + d], size);
      }
    }
  }

  static void split(float w, BFloat16* to, int64_t apart) {
    to[0] = w;
    to[apart] = w - static_cast<float>(to[0]);
  }

  void take_keys(const BFloat16* x, int64_t row, int64_t n, const Maps& maps, const bool* pad) {
    at::vec::transpose_mxn<float>(
        reinterpret_cast<const float*>(x), row / 2, reinterpret_cast<float*>(turned.get()), CHUNK, n, s.dim / 2);
    for (int64_t half = 0; half < 2; half++) {
      const BFloat16* w = wk.get() + half * s.dim * s.rank;
      multiply(s.rank, CHUNK, s.dim, w, s.dim, turned.get(), CHUNK, g.get(), CHUNK, half == 1);
    }
    finish_keys(x, row, n, maps, pad);
    for (int64_t r = 0; n < CHUNK && r < s.rank; r++) std::fill(&g[r * CHUNK + n], &g[r * CHUNK + CHUNK], 0.0f);
    narrow(g.get(), keys.get(), s.rank * CHUNK);
    lay_out_pairs(keys.get(), CHUNK, s.rank, s.rank, CHUNK, nullptr, key_pairs.get());
  }

  void take_queries(const BFloat16* x, int64_t row, int64_t n, const Maps& maps) {
    for (int64_t half = 0; half < 2; half++) {
      const BFloat16* w = wq.get() + half * s.dim * s.rank;
      multiply(n, s.rank, s.dim, x, row, w, s.rank, f.get(), s.rank, half == 1);
    }
    finish_queries(x, row, n, maps);
    narrow(f.get(), queries.get(), n * s.rank);
  }

  void take_values(const BFloat16* v, int64_t row, int64_t n, const bool* pad) {
    lay_out_pairs(v, row, n, CHUNK, s.dim_v, pad, value_pairs.get());
  }

  void attend(int64_t n) {
    multiply(n, CHUNK, s.rank, queries.get(), s.rank, key_pairs.get(), CHUNK, products.get(), CHUNK, false);
    for (int64_t i = 0; i < n; i++) finish_products(i, CHUNK);
    narrow(products.get(), weights.get(), n * CHUNK);
    narrow(state.get(), narrowed.get(), s.rank * s.dim_v);
    lay_out_pairs(narrowed.get(), s.dim_v, s.rank, s.rank, s.dim_v, nullptr, state_pairs.get());
    multiply(n, s.dim_v, CHUNK, weights.get(), CHUNK, value_pairs.get(), s.dim_v, sums.get(), s.dim_v, false);
    multiply(n, s.dim_v, s.rank, queries.get(), s.rank, state_pairs.get(), s.dim_v, sums.get(), s.dim_v, true);
  }

  void add(int64_t n) {
    multiply(s.rank, s.dim_v, CHUNK, keys.get(), CHUNK, value_pairs.get(), s.dim_v, state.get(), s.dim_v, true);
    add_to_normaliser(n);
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

// A type, to be passed.
template <typename X>
struct As {
  using type = X;
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

  // Where heads are fewer than threads, each is cut into pieces of whole chunks. What the keys of a piece add to the
  // state is then summed before any piece is read, so that their features are made twice.
  int64_t items = s.batch * s.served, threads = at::get_num_threads(), size = s.width() * (s.dim_v + 1);
  int64_t chunks = (s.length + CHUNK - 1) / CHUNK, pieces = items < threads ? std::min(threads / items, chunks) : 1;
  int64_t stride = (chunks + pieces - 1) / pieces * CHUNK;
  std::unique_ptr<float[]> states(pieces > 1 ? new float[items * pieces * size] : nullptr);

  auto walk = [&](auto& chunk, int64_t item, int64_t piece, bool read) {
    int64_t b = item / s.served, n = item % s.served, head = heads[n], kv = head / (s.heads / s.kv_heads);
    int64_t sink = std::max(sinks[n], 0), none = std::min<int64_t>(sink + std::max(windows[n], 0), s.length);
    int64_t rows = s.length - none, last = std::min((piece + 1) * stride, rows);
    Maps own = maps_of(maps, s, n);
    float* sums = lse + item * s.length;
    for (int64_t i = 0; read && piece == 0 && i < none; i++) {
      sums[i] = NONE;
      std::fill_n(out.at(b, n, i), s.dim_v, T(0.0f));
    }
    chunk.begin(own);
    for (int64_t first = piece * stride; first < last; first += CHUNK) {
      int64_t count = std::min(CHUNK, last - first), from = sink + first;
      const bool* real = pad == nullptr ? nullptr : pad + b * s.length + from;
      chunk.take_keys(k.at(b, kv, from), k.row, count, own, real);
      chunk.take_values(v.at(b, kv, from), v.row, count, real);
      if (read) {
        chunk.take_queries(q.at(b, head, none + first), q.row, count, own);
        chunk.attend(count);
        for (int64_t i = 0; i < count; i++) {
          float total = chunk.total[i], *row = chunk.sums.get() + i * s.dim_v;
          // A total of 0 comes with sums of 0: what is left of them is 0.
          Vec divisor(total > 0.0f ? total : std::numeric_limits<float>::infinity());
          at::vec::map<float>([divisor](Vec a) { return a / divisor; }, row, row, s.dim_v);
          narrow(row, out.at(b, n, none + first + i), s.dim_v);
          sums[none + first + i] = total > 0.0f ? chunk.shift[i] + std::log(total) : NONE;
        }
      }
      chunk.add(count);
    }
  };

  auto run = [&](auto made) {
    using Own = typename decltype(made)::type;
    if (pieces > 1) {
      at::parallel_for(0, items * pieces, 1, [&](int64_t begin, int64_t end) {
        Own chunk(s);
        for (int64_t n = begin; n < end; n++) {
          chunk.clear();
          // Nobody reads what the last piece adds.
          if (n % pieces + 1 < pieces) walk(chunk, n / pieces, n % pieces, false);
          chunk.save(&states[n * size]);
        }
        at::native::cpublas::brgemm_release(std::is_same_v<Own, Pairs>);
      });
      for (int64_t item = 0; item < items; item++) {
        float* sum = &states[item * pieces * size];
        for (int64_t piece = 1; piece + 1 < pieces; piece++, sum += size) {
          for (int64_t n = 0; n < size; n++) sum[size + n] += sum[n];
        }
      }
    }
    at::parallel_for(0, items * pieces, 1, [&](int64_t begin, int64_t end) {
      Own chunk(s);
      for (int64_t n = begin; n < end; n++) {
        chunk.clear();
        if (n % pieces) chunk.restore(&states[(n - 1) * size]);
        walk(chunk, n / pieces, n % pieces, true);
      }
      at::native::cpublas::brgemm_release(std::is_same_v<Own, Pairs>);
    });
  };
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (Pairs::serve(s, k)) {
      run(As<Pairs>{});
      return 0;
    }
  }
  run(As<Chunk>{});
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

  // A thread is woken for some microseconds of work: a state of 64 features of 64 takes one and a half.
  at::parallel_for(0, s.batch * s.served, std::max<int64_t>(1, (1 << 15) / (width * row)), [&](int64_t begin, int64_t end) {
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
