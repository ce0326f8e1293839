// Rows that meet slots with keys and values, piece by piece: what decoding consists of, from whatever cache. Compiled with
// spans.cpp, after it. Threads take pieces as they come, whatever rows they are of; each leaves a soft-max of its own,
// and in the end these are merged.
//
// Few rows: what takes the time is memory, and a cache is cold whenever its layer's turn comes. Slots are walked once,
// GROUP at a time, scores and sums in registers, and what will be read AHEAD slots later is asked for meanwhile.
// More rows: the products of a piece are matrix products.

namespace {

// Rows that meet the same slots: the query heads of KV head g for the new tokens from `token` on, a head at a time.
struct Block {
  int64_t b, g, token, tokens;
};

// Slots one after the other in memory. first: what a call knows the first of them by, a slot or a position.
template <typename T>
struct Piece {
  const T *keys, *values;
  int64_t key_row, value_row, block, first, size;
};

// What the rows of one call are. q, out (B, H, T, ·): strides of batch, head and token.
template <typename T>
struct Rows {
  Tensor<T> q, out;
  int64_t share, dim, dim_v;
  float scale;
  // Whether `hide` has anything to do.
  bool hides = false;

  virtual ~Rows() = default;
  // Scores of row r of a block for the n slots of a piece from its slot `from` on: -inf where it does not keep them.
  virtual void hide(const Piece<T>&, const Block&, int64_t r, int64_t from, int64_t n, float* scores) const {}

  int64_t head(const Block& block, int64_t r) const { return block.g * share + r / block.tokens; }
  T* row(const Tensor<T>& x, const Block& block, int64_t r) const {
    return x.at(block.b, head(block, r), block.token + r % block.tokens);
  }
};

// Slots of one piece of work where threads share heads, and the most for which products are made at once.
constexpr int64_t CHUNK = 512;
// The products take rows in sixteens.
constexpr int64_t LANES = 16;

// Memory of a thread that it keeps from call to call: fresh pages cost more than what is done with them.
template <typename T>
T* kept(std::vector<T>& memory, int64_t count) {
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  return memory.data();
}

// --- few rows -------------------------------------------------------------------------------------------------------

// Rows that are taken through the slots one by one. One thread of a busy Xeon with AMX, eight KV heads of 1088 slots
// and 64 features, cold, ms, this way and by matrix products:
//     rows          4            8           12           16
//     bfloat16   .43  .79     .56  .75     .66  .97     .76  .95
//     float32    .81  .99     .86  .94     .86 1.10    1.23 1.19
constexpr int64_t FEW = 12;
// Slots whose scores are held at once.
constexpr int64_t GROUP = 32;
// Slots between what is read and what is asked for. There, four rows, ms: nothing asked for .53 (bfloat16) and .97
// (float32), 8 slots ahead .43 and .69, 32 .45 and .82, 128 .42 and .86; 32 KV heads of one row in bfloat16: 1.59,
// 1.37, 1.29, 1.30.
constexpr int64_t AHEAD = 32;

// 32 features as floats. Which are in which half is the same for queries, keys and values.
void halves(const float* x, __m512& a, __m512& b) {
  a = _mm512_loadu_ps(x);
  b = _mm512_loadu_ps(x + 16);
}

void halves(const BFloat16* x, __m512& a, __m512& b) {
  __m512i pairs = _mm512_loadu_si512(x);
  a = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  b = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
}

// The other way round, in place.
void join(float*, const float*) {}

void join(float* x, const BFloat16*) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  __m512 even = _mm512_loadu_ps(x), odd = _mm512_loadu_ps(x + 16);
  _mm512_storeu_ps(x, _mm512_permutex2var_ps(even, low, odd));
  _mm512_storeu_ps(x + 16, _mm512_permutex2var_ps(even, high, odd));
}

template <typename T>
void ask(const T* x) {
  for (int64_t at = 0; at < 32 * static_cast<int64_t>(sizeof(T)); at += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(x) + at, _MM_HINT_T1);
  }
}

// Lane n of the result: the sum of the lanes of x[n].
__m512 sums_of(__m512* x) {
  for (int n = 0; n < 8; n++) {
    x[n] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * n], x[2 * n + 1]), _mm512_unpackhi_ps(x[2 * n], x[2 * n + 1]));
  }
  for (int n = 0; n < 4; n++) {
    __m512d a = _mm512_castps_pd(x[2 * n]), b = _mm512_castps_pd(x[2 * n + 1]);
    x[n] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  auto quarters = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return quarters(quarters(x[0], x[1]), quarters(x[2], x[3]));
}

// Scores of R rows for 16 / R keys, into (R, GROUP).
template <int R, typename T>
void score(const float* q, const T* const* keys, int64_t dim, int64_t ahead, float* to) {
  constexpr int K = 16 / R;
  __m512 sums[16];
#pragma GCC unroll 16
  for (int n = 0; n < 16; n++) sums[n] = _mm512_setzero_ps();
  for (int64_t d = 0; d < dim; d += 32) {
    __m512 even[R], odd[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      even[r] = _mm512_loadu_ps(q + r * dim + d);
      odd[r] = _mm512_loadu_ps(q + r * dim + d + 16);
    }
#pragma GCC unroll 16
    for (int j = 0; j < K; j++) {
      __m512 a, b;
      halves(keys[j] + d, a, b);
      ask(keys[j] + d + ahead);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        sums[r * K + j] = _mm512_fmadd_ps(a, even[r], sums[r * K + j]);
        sums[r * K + j] = _mm512_fmadd_ps(b, odd[r], sums[r * K + j]);
      }
    }
  }
  __m512 all = sums_of(sums);
  if constexpr (R == 1) {
    _mm512_storeu_ps(to, all);
  } else if constexpr (R == 2) {
    _mm256_storeu_ps(to, _mm512_castps512_ps256(all));
    _mm256_storeu_ps(to + GROUP, _mm512_extractf32x8_ps(all, 1));
  } else {
    _mm_storeu_ps(to, _mm512_castps512_ps128(all));
    _mm_storeu_ps(to + GROUP, _mm512_extractf32x4_ps(all, 1));
    _mm_storeu_ps(to + 2 * GROUP, _mm512_extractf32x4_ps(all, 2));
    _mm_storeu_ps(to + 3 * GROUP, _mm512_extractf32x4_ps(all, 3));
  }
}

// Add n values, weighted by (R, GROUP), to the sums of R rows, for 32 P features.
template <int R, int P, typename T>
void weigh_values(
    const float* weights, const T* values, int64_t row, int64_t n, int64_t ahead, float* sums, int64_t dim_v) {
  __m512 held[R][2 * P];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int d = 0; d < 2 * P; d++) held[r][d] = _mm512_loadu_ps(sums + r * dim_v + 16 * d);
  }
  for (int64_t j = 0; j < n; j++, values += row) {
    __m512 value[2 * P];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      halves(values + 32 * p, value[2 * p], value[2 * p + 1]);
      ask(values + 32 * p + ahead);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      __m512 weight = _mm512_set1_ps(weights[r * GROUP + j]);
#pragma GCC unroll 8
      for (int d = 0; d < 2 * P; d++) held[r][d] = _mm512_fmadd_ps(weight, value[d], held[r][d]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int d = 0; d < 2 * P; d++) _mm512_storeu_ps(sums + r * dim_v + 16 * d, held[r][d]);
  }
}

template <int R, typename T>
void weigh_values(
    const float* weights, const T* values, int64_t row, int64_t n, int64_t ahead, float* sums, int64_t dim_v, int) {
  int64_t d = 0;
  if constexpr (R < 4) {
    for (; d + 128 <= dim_v; d += 128) weigh_values<R, 4>(weights, values + d, row, n, ahead, sums + d, dim_v);
  }
  for (; d + 64 <= dim_v; d += 64) weigh_values<R, 2>(weights, values + d, row, n, ahead, sums + d, dim_v);
  for (; d < dim_v; d += 32) weigh_values<R, 1>(weights, values + d, row, n, ahead, sums + d, dim_v);
}

// Rows in fours, twos and ones: `each` is called with how many, as a type, and the first.
template <typename Each>
void in_parts(int64_t rows, Each each) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) each(std::integral_constant<int, 4>(), r);
  for (; r + 2 <= rows; r += 2) each(std::integral_constant<int, 2>(), r);
  for (; r < rows; r++) each(std::integral_constant<int, 1>(), r);
}

template <typename T>
struct Few {
  std::vector<float> queries, scores, totals;
  int64_t now = -1;

  // The soft-max of a piece: into (rows) largest scores, (rows) sums of weights, (rows, dim_v) weighted sums of values.
  void take(const Rows<T>& s, const Block& block, const Piece<T>& piece, float* into) {
    int64_t rows = s.share * block.tokens;
    float *q = kept(queries, rows * s.dim), *held = kept(scores, rows * GROUP), *total = kept(totals, rows * 16);
    float *top = into, *sums = into + 2 * rows;
    for (int64_t r = 0; piece.block != now && r < rows; r++) {
      const T* from = s.row(s.q, block, r);
      for (int64_t d = 0; d < s.dim; d += 32) {
        __m512 a, b;
        halves(from + d, a, b);
        _mm512_storeu_ps(q + r * s.dim + d, a);
        _mm512_storeu_ps(q + r * s.dim + d + 16, b);
      }
    }
    now = piece.block;
    std::fill_n(top, rows, NONE);
    std::fill_n(total, rows * 16, 0.0f);
    std::fill_n(sums, rows * s.dim_v, 0.0f);

    for (int64_t first = 0; first < piece.size; first += GROUP) {
      int64_t n = std::min(GROUP, piece.size - first);
      const T *seen = piece.keys + first * piece.key_row, *values = piece.values + first * piece.value_row;
      // Past the end the last key is read again, and hidden.
      const T* keys[GROUP];
      for (int64_t j = 0; j < GROUP; j++) keys[j] = seen + std::min(j, n - 1) * piece.key_row;
      for (int64_t j = 0; j < n; j += 16) {
        in_parts(rows, [&](auto part, int64_t r) {
          constexpr int R = decltype(part)::value;
          for (int64_t i = j; i < j + 16; i += 16 / R) {
            score<R>(q + r * s.dim, keys + i, s.dim, AHEAD * piece.key_row, held + r * GROUP + i);
          }
        });
      }
      for (int64_t r = 0; r < rows; r++) {
        float* row = held + r * GROUP;
        std::fill(row + n, row + GROUP, NONE);
        if (s.hides) s.hide(piece, block, r, first, n, row);
        weigh(s, r, row, top, total, sums);
      }
      in_parts(rows, [&](auto part, int64_t r) {
        constexpr int R = decltype(part)::value;
        weigh_values<R>(
            held + r * GROUP, values, piece.value_row, n, AHEAD * piece.value_row, sums + r * s.dim_v, s.dim_v, 0);
      });
    }
    for (int64_t r = 0; r < rows; r++) into[rows + r] = _mm512_reduce_add_ps(_mm512_loadu_ps(total + r * 16));
    for (int64_t d = 0; d < rows * s.dim_v; d += 32) join(sums + d, static_cast<const T*>(nullptr));
  }

  // Take the scores of row r for a group of slots into its running soft-max and leave their weights.
  void weigh(const Rows<T>& s, int64_t r, float* row, float* top, float* total, float* sums) {
    __m512 a = _mm512_loadu_ps(row), b = _mm512_loadu_ps(row + 16);
    float most = _mm512_reduce_max_ps(_mm512_max_ps(a, b)) * s.scale;
    if (most > top[r]) {
      __m512 less = _mm512_set1_ps(std::exp(top[r] - most));
      top[r] = most;
      _mm512_storeu_ps(total + r * 16, _mm512_mul_ps(_mm512_loadu_ps(total + r * 16), less));
      for (float* x = sums + r * s.dim_v; x < sums + (r + 1) * s.dim_v; x += 16) {
        _mm512_storeu_ps(x, _mm512_mul_ps(_mm512_loadu_ps(x), less));
      }
    }
    // A row that has met no kept key yet: -inf minus -inf would be NaN.
    Vec factor(s.scale), away(top[r] == NONE ? 0.0f : -top[r]);
    Vec first_half = exponential<T>(at::vec::fmadd(Vec(a), factor, away));
    Vec second_half = exponential<T>(at::vec::fmadd(Vec(b), factor, away));
    first_half.store(row);
    second_half.store(row + 16);
    (Vec::loadu(total + r * 16) + first_half + second_half).store(total + r * 16);
  }

  void done() {}
};

// --- more rows ------------------------------------------------------------------------------------------------------

// queries (rows, dim), a row of them at a time, into (dim, lanes), in pairs of features in bfloat16; lanes beyond the
// rows are zero.
template <typename T>
void lay_out_queries(const Rows<T>& s, const Block& block, int64_t lanes, T* to) {
  constexpr int64_t PAIR = std::is_same_v<T, float> ? 1 : 2;
  std::fill_n(to, s.dim * lanes, T(0));
  for (int64_t r = 0; r < s.share * block.tokens; r++) {
    const T* from = s.row(s.q, block, r);
    for (int64_t d = 0; d < s.dim; d++) to[(d / PAIR * lanes + r) * PAIR + d % PAIR] = from[d];
  }
}

template <typename T>
struct Many {
  static constexpr bool PAIRS = !std::is_same_v<T, float>;
  Tile<T> tile;
  std::vector<float> scores;
  std::vector<T> queries, values;
  int64_t now = -1;

  Many(int64_t rows, int64_t dim_v) : tile(rows, CHUNK, dim_v) {}

  // As Few::take.
  void take(const Rows<T>& s, const Block& block, const Piece<T>& piece, float* into) {
    int64_t rows = s.share * block.tokens, lanes = (rows + LANES - 1) / LANES * LANES;
    float* products = kept(scores, CHUNK * lanes);
    T *laid = kept(queries, s.dim * lanes), *pairs = PAIRS ? kept(values, CHUNK * s.dim_v) : nullptr;
    if (piece.block != now) lay_out_queries(s, block, lanes, laid);
    now = piece.block;
    int64_t columns = (piece.size + BLOCK - 1) / BLOCK * BLOCK;
    multiply(piece.size, lanes, s.dim, piece.keys, piece.key_row, laid, lanes, products, lanes, false);
    tile.clear();
    for (int64_t r = 0; r < rows; r++) {
      std::fill_n(&tile.scores[r * columns + piece.size], columns - piece.size, NONE);
    }
    at::vec::transpose_mxn<float>(products, lanes, tile.scores.data(), columns, piece.size, rows);
    for (int64_t r = 0; r < rows; r++) {
      if (s.hides) s.hide(piece, block, r, 0, piece.size, &tile.scores[r * columns]);
      tile.weigh(r, columns, s.dim_v, s.scale);
    }
    for (int64_t c = 0; PAIRS && c < columns; c += BLOCK) {
      if constexpr (PAIRS) {
        int64_t n = std::min(BLOCK, piece.size - c);
        lay_out_values(piece.values + c * piece.value_row, piece.value_row, n, s.dim_v, &pairs[c * s.dim_v]);
      }
    }
    multiply(
        rows, s.dim_v, PAIRS ? columns : piece.size, tile.weights.data(), columns, PAIRS ? pairs : piece.values,
        PAIRS ? s.dim_v : piece.value_row, tile.sums.data(), s.dim_v, true);
    std::copy_n(tile.top.data(), rows, into);
    std::copy_n(tile.total.data(), rows, into + rows);
    std::copy_n(tile.sums.data(), rows * s.dim_v, into + 2 * rows);
  }

  void done() { at::native::cpublas::brgemm_release(PAIRS); }
};

// --- both -----------------------------------------------------------------------------------------------------------

// Floats that the pieces of one go leave, at most, but for the last block's: 16 MB. More than twice as many are not kept.
constexpr int64_t MOST_FOUND = 1 << 22;

// The work of one go, in memory that is kept: blocks, and their pieces, one block after the other.
template <typename T>
struct Work {
  std::vector<Block> blocks;
  std::vector<Piece<T>> pieces;
  std::vector<int64_t> begins;
  std::vector<float> memory;
  // Slots of a piece, at most.
  int64_t whole = CHUNK;

  void clear() {
    blocks.clear();
    pieces.clear();
    begins.clear();
    if (static_cast<int64_t>(memory.size()) > 2 * MOST_FOUND) std::vector<float>().swap(memory);
  }

  // Whether there is enough of it, where a piece leaves `held` floats.
  bool full(int64_t held) const { return static_cast<int64_t>(pieces.size()) * held >= MOST_FOUND; }

  void open(const Block& block) {
    blocks.push_back(block);
    begins.push_back(pieces.size());
  }

  // Slots for the block that was opened last.
  void add(const T* keys, const T* values, int64_t key_row, int64_t value_row, int64_t first, int64_t size) {
    int64_t block = blocks.size() - 1;
    for (int64_t n = 0; n < size; n += whole) {
      pieces.push_back(
          {keys + n * key_row, values + n * value_row, key_row, value_row, block, first + n, std::min(whole, size - n)});
    }
  }
};

// Whether rows are taken one by one, and how many slots a piece then has: a thread that is alone cuts nothing up.
bool few(int64_t rows) { return rows <= FEW; }

int64_t longest(int64_t rows) {
  return few(rows) && at::get_num_threads() == 1 ? std::numeric_limits<int64_t>::max() / 2 : CHUNK;
}

// Write the rows of all blocks, none of which has more than `most`, and forget these. Rows that keep nothing are 0.
template <typename T>
void attend(const Rows<T>& s, Work<T>& work, int64_t most) {
  int64_t held = most * (s.dim_v + 2), count = work.pieces.size();
  work.begins.push_back(count);
  // Of each piece the largest scores, the sums of weights, and the weighted sums of values.
  float* found = kept(work.memory, count * held);

  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), count), 1, [&](int64_t, int64_t) {
    auto all = [&](auto& worker) {
      for (int64_t n = next++; n < count; n = next++) {
        worker.take(s, work.blocks[work.pieces[n].block], work.pieces[n], found + n * held);
      }
      worker.done();
    };
    if (few(most)) {
      thread_local Few<T> worker;
      worker.now = -1;
      all(worker);
    } else {
      Many<T> worker(most, s.dim_v);
      all(worker);
    }
  });

  Tile<T> merged(most, 0, s.dim_v);
  for (size_t at = 0; at < work.blocks.size(); at++) {
    const Block& block = work.blocks[at];
    int64_t rows = s.share * block.tokens;
    merged.clear();
    for (int64_t n = work.begins[at]; n < work.begins[at + 1]; n++) {
      const float* part = found + n * held;
      for (int64_t r = 0; r < rows; r++) {
        merged.merge(r, part[r], part[rows + r], part + 2 * rows + r * s.dim_v, s.dim_v);
      }
    }
    for (int64_t r = 0; r < rows; r++) merged.write_row(r, s.dim_v, s.row(s.out, block, r));
  }
  work.clear();
}

// The same where there is enough of it for one go.
template <typename T>
void attend_some(const Rows<T>& s, Work<T>& work, int64_t most) {
  if (work.full(most * (s.dim_v + 2))) attend(s, work, most);
}

}  // namespace
