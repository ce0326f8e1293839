// The prefill of linear far parts, and its chunks for a matrix unit; compiled with linear.cpp, after it.

namespace {

// x (n, dim), n <= count, into pairs of rows (count / 2, dim, 2): 0 for rows that are not there, or padding.
void lay_out_pairs(
    const BFloat16* x, int64_t row, int64_t n, int64_t count, int64_t dim, const bool* pad, BFloat16* to) {
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
// because a projection is a product with each half of its weights, w = high + low. What is rounded to bfloat16 is what
// is multiplied: features (none is above 1 in queries), their products, and the state as it is read.
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
  const int *heads = call.pointer<const int>(), *sinks = call.pointer<const int>();
  const int* windows = call.pointer<const int>();
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

}  // namespace

extern "C" {

int prefill_bfloat16(const int64_t* call) {
  return guarded([&] { return prefill<BFloat16>(call); });
}

int prefill_float32(const int64_t* call) {
  return guarded([&] { return prefill<float>(call); });
}
}
