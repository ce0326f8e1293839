// Queries against the whole buffers of a cache of which a part is written, as a mask says; compiled with rows.cpp, after
// it. Only columns that some query of a batch entry keeps are read, run by run; within them each row has its mask.

namespace {

enum Masked : int { NO_MASK, BOOLEAN, FLOAT, SAME };
// A mask's value under which nothing of a key is left, whatever its score. Masks have -inf there, or the least number
// of their type.
constexpr float HIDDEN = -1e30f;

struct Stretch {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// k, v (B, G, C, ·). mask: (B or 1, T or 1, C), strides of batch and token, of a type as `masked` says.
template <typename T>
struct Looking : Rows<T> {
  int64_t batch, kv_heads, tokens, columns;
  Tensor<T> k, v;
  Masked masked;
  const void* mask;
  int64_t mask_batch, mask_row;
  // Of every row of the mask, its longest run of columns that are all kept.
  const Stretch* whole;

  int64_t masks() const { return mask_row ? tokens : 1; }
  template <typename M>
  const M* mask_of(int64_t b, int64_t t) const {
    return static_cast<const M*>(mask) + b * mask_batch + t * mask_row;
  }
  // `each` with a row of the mask, as what it consists of.
  template <typename Each>
  void with_mask(int64_t b, int64_t t, Each each) const {
    if (masked == BOOLEAN) each(mask_of<bool>(b, t));
    if (masked == FLOAT) each(mask_of<float>(b, t));
    if (masked == SAME) each(mask_of<T>(b, t));
  }

  void hide(const Piece<T>& piece, const Block& block, int64_t r, int64_t from, int64_t n, float* row) const override {
    int64_t t = block.token + r % block.tokens, first = piece.first + from;
    const Stretch& kept = whole[(mask_batch ? block.b : 0) * masks() + (mask_row ? t : 0)];
    if (masked == BOOLEAN && first >= kept.begin && first + n <= kept.end) return;
    with_mask(block.b, t, [&](const auto* mask) { put(mask + first, n, row); });
  }

  void put(const bool* mask, int64_t n, float* row) const {
    for (int64_t c = 0; c < n; c++) row[c] = mask[c] ? row[c] : NONE;
  }

  // What is added comes before the scale here, and after it in the mask.
  template <typename M>
  void put(const M* mask, int64_t n, float* row) const {
    for (int64_t c = 0; c < n; c++) row[c] += static_cast<float>(mask[c]) / this->scale;
  }
};

bool shown(float x) { return x > HIDDEN; }
bool shown(BFloat16 x) { return static_cast<float>(x) > HIDDEN; }

// The first column from `at` on that is shown, or that is not.
template <typename M>
int64_t next(const M* row, int64_t at, int64_t columns, bool wanted) {
  while (at < columns && shown(row[at]) != wanted) at++;
  return at;
}

int64_t next(const bool* row, int64_t at, int64_t columns, bool wanted) {
  const __m512i zero = _mm512_setzero_si512();
  for (; at + 64 <= columns; at += 64) {
    __mmask64 found = _mm512_cmpneq_epi8_mask(_mm512_loadu_si512(row + at), zero);
    if (!wanted) found = ~found;
    if (found) return at + __builtin_ctzll(found);
  }
  while (at < columns && row[at] != wanted) at++;
  return at;
}

// Runs of columns that any of the rows of a mask shows; of each row its longest run. False if one shows nothing.
template <typename M>
bool find_runs(
    const M* mask, int64_t stride, int64_t rows, int64_t columns, std::vector<Stretch>& runs,
    std::vector<Stretch>& whole) {
  thread_local std::vector<uint8_t> any;
  runs.clear();
  bool all = true;
  if (rows > 1) any.assign(columns, 0);
  for (int64_t t = 0; t < rows; t++) {
    const M* row = mask + t * stride;
    Stretch most{0, 0};
    for (int64_t end = 0, begin; (begin = next(row, end, columns, true)) < columns;) {
      end = next(row, begin, columns, false);
      if (end - begin > most.size()) most = {begin, end};
      if (rows == 1) {
        runs.push_back({begin, end});
      } else {
        std::fill(any.begin() + begin, any.begin() + end, 1);
      }
    }
    all = all && most.size() > 0;
    whole.push_back(most);
  }
  const bool* together = reinterpret_cast<const bool*>(any.data());
  for (int64_t end = 0, begin; rows > 1 && (begin = next(together, end, columns, true)) < columns;) {
    end = next(together, begin, columns, false);
    runs.push_back({begin, end});
  }
  return all;
}

// Runs of columns from which on they may be too short, and the columns that one must have on average: where every other
// is kept at random, 16384 columns, 32 query heads and 8 KV heads took 94 ms in runs of two, and torch's operators 26.
constexpr int64_t MANY_RUNS = 64, RUN = 32;

enum Looked : int { LOOKED, LEFT_TO_OTHERS };

bool fragmented(const std::vector<Stretch>& runs, int64_t columns) {
  int64_t count = runs.size();
  return count > MANY_RUNS && count * RUN > columns;
}

template <typename T>
Looked look(Looking<T>& call) {
  thread_local std::vector<Stretch> runs, whole;
  thread_local Work<T> work;
  int64_t rows = call.share * call.tokens;
  bool all = true;
  call.hides = call.masked != NO_MASK;
  runs.assign(1, {0, call.columns});
  whole.clear();
  work.clear();
  work.whole = longest(rows);
  for (int64_t b = 0; b < call.batch; b++) {
    if (b == 0 || call.mask_batch) {
      call.with_mask(b, 0, [&](const auto* mask) {
        all &= find_runs(mask, call.mask_row, call.masks(), call.columns, runs, whole);
      });
      // Where the least number hides everything, everything is shown alike; who added -inf meant 0.
      if (!all && call.masked != BOOLEAN) return LEFT_TO_OTHERS;
      if (fragmented(runs, call.columns)) return LEFT_TO_OTHERS;
      call.whole = whole.data();
    }
    for (int64_t g = 0; g < call.kv_heads; g++) {
      work.open({b, g, 0, call.tokens});
      for (const Stretch& run : runs) {
        const T *keys = call.k.at(b, g, run.begin), *values = call.v.at(b, g, run.begin);
        work.add(keys, values, call.k.row, call.v.row, run.begin, run.size());
      }
      attend_some(call, work, rows);
    }
  }
  attend(call, work, rows);
  return LOOKED;
}

// x: addresses of q, k, v, out, mask; strides of q, k, v, out, and of batch and token of the mask; what the mask is;
// sizes: batch, kv_heads, share, tokens, columns, dim, dim_v.
template <typename T>
Looked unpacked_look(const int64_t* x, float scale) {
  auto values = [&](int n) { return reinterpret_cast<T*>(x[n]); };
  const int64_t *steps = x + 5, *sizes = x + 20;
  Looking<T> call;
  call.q = {values(0), steps[0], steps[1], steps[2]};
  call.k = {values(1), steps[3], steps[4], steps[5]};
  call.v = {values(2), steps[6], steps[7], steps[8]};
  call.out = {values(3), steps[9], steps[10], steps[11]};
  call.mask = reinterpret_cast<const void*>(x[4]);
  call.mask_batch = steps[12], call.mask_row = steps[13];
  call.masked = static_cast<Masked>(x[19]);
  call.batch = sizes[0], call.kv_heads = sizes[1], call.tokens = sizes[3], call.columns = sizes[4];
  call.share = sizes[2], call.dim = sizes[5], call.dim_v = sizes[6];
  call.scale = scale;
  return look(call);
}

}  // namespace

extern "C" {

// 0; LEFT_TO_OTHERS where a floating mask shows a query nothing, or a mask shows too many short runs, and then `out` is
// worth nothing; FAILED.
int look_bfloat16(const int64_t* packed, float scale) {
  return guarded([&] { return unpacked_look<BFloat16>(packed, scale); });
}

int look_float32(const int64_t* packed, float scale) {
  return guarded([&] { return unpacked_look<float>(packed, scale); });
}
}
