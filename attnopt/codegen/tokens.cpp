// One token of each row against a cache that holds it already, for query heads that attend to tokens they select: the
// sink, the recent ones and those of the largest scores. Compiled with rows.cpp and cache.cpp, after them. A token at
// position p of these heads lies in slot p of its KV head.
//
// To select, the keys of a KV head are read once for all its query heads that select now. The best so far are held with
// the least of them: a score that is not larger is dropped where it comes out of the registers, no score is written
// down. Where scores are made of a few features, these lie feature by feature, and sixteen keys are one vector.

#include <cstring>

namespace {

// A row of the table of rules (reference_token_step.py).
struct Selecting {
  int count, sink, recent, every, features, source;
};

template <typename T>
struct Picking {
  int64_t batch, heads, kv_heads, slots, dim, dim_v, most, features;
  float scale;
  Tensor<T> q, keys, values, out;
  // (B, R, S) and (B, H, D), contiguous.
  T *labels, *asked;
  const int* n;
  const bool* valid;
  int64_t valid_row;
  const Segment* table;
  const Selecting* rules;
  const float* similar;
  // (B, H, K) and (B, H); of each source the address and K; (B, G, R).
  int *picked, *age;
  const int64_t *sources, *chosen;

  int64_t share() const { return heads / kv_heads; }
  bool counts(int64_t b) const { return valid == nullptr || valid[b * valid_row]; }
  int* held(int64_t b, int64_t h) const { return picked + (b * heads + h) * most; }
  T* then(int64_t b, int64_t h) const { return asked + (b * heads + h) * dim; }
};

// The largest of the scores that come in, with their positions, which ascend; of equal ones the first. A score is held
// by its bits, so turned that they compare as the numbers do.
struct Best {
  std::vector<uint32_t> bits;
  std::vector<int> places;
  int64_t count = 0, size = 0;
  float least = NONE;

  void begin(int64_t wanted) {
    count = wanted, size = 0, least = NONE;
    bits.resize(room() + 32);
    places.resize(room() + 32);
  }

  // Scores that are held before the least of the best is found anew.
  int64_t room() const { return count + std::max<int64_t>(count, 128); }

  // Sixteen scores, the first of position `first`.
  void take(__m512 scores, int first) {
    // Of 0 and -0 neither is larger.
    scores = _mm512_add_ps(scores, _mm512_setzero_ps());
    __mmask16 larger = _mm512_cmp_ps_mask(scores, _mm512_set1_ps(least), _CMP_GT_OQ);
    if (!larger) return;
    __m512i turned = _mm512_castps_si512(scores), sign = _mm512_srai_epi32(turned, 31);
    turned = _mm512_xor_si512(turned, _mm512_or_si512(sign, _mm512_set1_epi32(0x80000000)));
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i place = _mm512_add_epi32(_mm512_set1_epi32(first), lanes);
    _mm512_storeu_si512(&bits[size], _mm512_maskz_compress_epi32(larger, turned));
    _mm512_storeu_si512(&places[size], _mm512_maskz_compress_epi32(larger, place));
    size += __builtin_popcount(larger);
    if (size > room()) cut();
  }

  // Leave the best. Their least is found bit by bit: a step that selects 256 of 4096 keys by 16 features, 32 query heads
  // over 8 of 128, took 0.81 ms so and 1.31 ms with std::nth_element, thread time, each on a busy machine.
  void cut() {
    if (size <= count) return;
    std::fill_n(bits.begin() + size, 16, 0);
    uint32_t last = 0;
    for (uint32_t bit = 0x80000000; bit; bit >>= 1) {
      __m512i tried = _mm512_set1_epi32(last | bit);
      int64_t above = 0;
      for (int64_t i = 0; i < size; i += 16) {
        above += __builtin_popcount(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(&bits[i]), tried));
      }
      if (above >= count) last |= bit;
    }
    keep(last);
    last ^= last & 0x80000000 ? 0x80000000 : 0xffffffff;
    std::memcpy(&least, &last, sizeof(least));
  }

  // Leave what is above `last`, and of what is equal the first.
  void keep(uint32_t last) {
    __m512i limit = _mm512_set1_epi32(last);
    int64_t equal = count, to = 0;
    for (int64_t i = 0; i < size; i += 16) {
      equal -= __builtin_popcount(_mm512_cmpgt_epu32_mask(_mm512_loadu_si512(&bits[i]), limit));
    }
    for (int64_t i = 0; i < size; i += 16) {
      __m512i held = _mm512_loadu_si512(&bits[i]), place = _mm512_loadu_si512(&places[i]);
      __mmask16 stay = _mm512_cmpgt_epu32_mask(held, limit), same = _mm512_cmpeq_epi32_mask(held, limit);
      if (size - i < 16) same &= (1 << (size - i)) - 1;
      for (; same && equal > 0; equal--, same &= same - 1) stay |= same & -same;
      _mm512_storeu_si512(&bits[to], _mm512_maskz_compress_epi32(stay, held));
      _mm512_storeu_si512(&places[to], _mm512_maskz_compress_epi32(stay, place));
      to += __builtin_popcount(stay);
    }
    size = to;
  }

  // The positions, and -1 behind them.
  void write(int* to) {
    cut();
    std::copy_n(places.begin(), size, to);
    std::fill(to + size, to + count, -1);
  }
};

struct Scratch {
  std::vector<float> queries, scores, sums;
  std::vector<Best> best;
  std::vector<int64_t> due;
  std::vector<int> places;
};

// A row of features as floats, in the order of `halves`.
template <typename T>
void widen(const T* from, int64_t dim, float* to) {
  for (int64_t d = 0; d < dim; d += 32) {
    __m512 a, b;
    halves(from + d, a, b);
    _mm512_storeu_ps(to + d, a);
    _mm512_storeu_ps(to + d + 16, b);
  }
}

template <typename T>
bool apart(const T* now, const T* then, int64_t dim, float similar) {
  float both = 0, of_now = 0, of_then = 0;
  for (int64_t d = 0; d < dim; d++) {
    float a = now[d], b = then[d];
    both += a * b, of_now += a * a, of_then += b * b;
  }
  return both < similar * std::sqrt(of_now) * std::sqrt(of_then);
}

// Whether a head selects in this step.
template <typename T>
bool due(const Picking<T>& call, int64_t b, int64_t h) {
  const Selecting& rule = call.rules[h];
  int age = call.age[b * call.heads + h];
  if (age < 0 || age + 1 >= rule.every) return true;
  float similar = call.similar[h];
  return similar > 0 && apart(call.q.at(b, h, 0), call.then(b, h), call.dim, similar);
}

// Scores of all features of the first n keys for the heads `heads`, into work.best.
template <typename T>
void scan(const Picking<T>& call, int64_t b, int64_t g, const std::vector<int64_t>& heads, int64_t n, Scratch& work) {
  int64_t rows = heads.size(), dim = call.dim, row = call.keys.row;
  float *q = kept(work.queries, rows * dim), *scores = kept(work.scores, rows * GROUP);
  for (int64_t r = 0; r < rows; r++) widen(call.q.at(b, heads[r], 0), dim, q + r * dim);
  const T* first = call.keys.at(b, 0, call.table[g].start);
  for (int64_t j = 0; j < n; j += GROUP) {
    int64_t here = std::min(GROUP, n - j);
    // Past the end the last key is read again, and hidden.
    const T* keys[GROUP];
    for (int64_t i = 0; i < GROUP; i++) keys[i] = first + (j + std::min(i, here - 1)) * row;
    in_parts(rows, [&](auto part, int64_t r) {
      constexpr int R = decltype(part)::value;
      for (int64_t i = 0; i < GROUP; i += 16 / R) {
        score<R>(q + r * dim, keys + i, dim, AHEAD * row, scores + r * GROUP + i);
      }
    });
    for (int64_t r = 0; r < rows; r++) {
      float* found = scores + r * GROUP;
      std::fill(found + here, found + GROUP, NONE);
      for (int64_t at = 0; at < here; at += 16) work.best[r].take(_mm512_loadu_ps(found + at), j + at);
    }
  }
}

__m512 lane(const float* x, __mmask16 real) { return _mm512_maskz_loadu_ps(real, x); }

__m512 lane(const BFloat16* x, __mmask16 real) {
  __m256i halves = _mm256_maskz_loadu_epi16(real, x);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// The same out of the features that weigh most.
template <typename T>
void scan_features(
    const Picking<T>& call, int64_t b, int64_t g, const std::vector<int64_t>& heads, int64_t n, Scratch& work) {
  int64_t rows = heads.size(), all = call.features;
  float* q = kept(work.queries, rows * all);
  const int64_t* chosen = call.chosen + (b * call.kv_heads + g) * all;
  for (int64_t r = 0; r < rows; r++) {
    const T* from = call.q.at(b, heads[r], 0);
    // Of a head that asks for fewer, the others are not there.
    for (int64_t f = 0; f < all; f++) q[r * all + f] = f < call.rules[heads[r]].features ? float(from[chosen[f]]) : 0.0f;
  }
  const T* first = call.labels + b * all * call.slots + call.table[g].start;
  for (int64_t j = 0; j < n; j += 16) {
    __mmask16 real = n - j < 16 ? (1 << (n - j)) - 1 : 0xffff;
    in_parts(rows, [&](auto part, int64_t r) {
      constexpr int R = decltype(part)::value;
      __m512 sums[R];
      for (int i = 0; i < R; i++) sums[i] = _mm512_setzero_ps();
      for (int64_t f = 0; f < all; f++) {
        __m512 x = lane(first + f * call.slots + j, real);
        for (int i = 0; i < R; i++) sums[i] = _mm512_fmadd_ps(x, _mm512_set1_ps(q[(r + i) * all + f]), sums[i]);
      }
      for (int i = 0; i < R; i++) {
        work.best[r + i].take(_mm512_mask_mov_ps(_mm512_set1_ps(NONE), real, sums[i]), j);
      }
    });
  }
}

// Let the heads of a KV head that are due select, and count the steps of the others.
template <typename T>
void select(Picking<T>& call, int64_t b, int64_t g, Scratch& work) {
  int64_t n = call.n[b];
  for (bool narrow : {false, true}) {
    work.due.clear();
    for (int64_t h = g * call.share(); h < (g + 1) * call.share(); h++) {
      const Selecting& rule = call.rules[h];
      if (!rule.count || rule.source >= 0 || (rule.features > 0) != narrow) continue;
      int& age = call.age[b * call.heads + h];
      if (!due(call, b, h)) {
        age++;
        continue;
      }
      age = 0;
      std::copy_n(call.q.at(b, h, 0), call.dim, call.then(b, h));
      if (rule.count < n) {
        work.due.push_back(h);
        continue;
      }
      int* to = call.held(b, h);
      for (int64_t p = 0; p < rule.count; p++) to[p] = p < n ? p : -1;
    }
    if (work.due.empty()) continue;
    if (work.best.size() < work.due.size()) work.best.resize(work.due.size());
    for (size_t r = 0; r < work.due.size(); r++) work.best[r].begin(call.rules[work.due[r]].count);
    narrow ? scan_features(call, b, g, work.due, n, work) : scan(call, b, g, work.due, n, work);
    for (size_t r = 0; r < work.due.size(); r++) work.best[r].write(call.held(b, work.due[r]));
  }
}

// Add n values, weighted, for 32 P features.
template <int P, typename T>
void weigh_places(const float* weights, const T* values, int64_t row, const int* places, int64_t n, float* sums) {
  __m512 held[2 * P];
#pragma GCC unroll 8
  for (int d = 0; d < 2 * P; d++) held[d] = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j++) {
    const T *value = values + places[j] * row, *next = values + places[std::min(j + 8, n - 1)] * row;
    __m512 weight = _mm512_set1_ps(weights[j]);
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      __m512 a, b;
      halves(value + 32 * p, a, b);
      ask(next + 32 * p);
      held[2 * p] = _mm512_fmadd_ps(weight, a, held[2 * p]);
      held[2 * p + 1] = _mm512_fmadd_ps(weight, b, held[2 * p + 1]);
    }
  }
#pragma GCC unroll 8
  for (int d = 0; d < 2 * P; d++) _mm512_storeu_ps(sums + 16 * d, held[d]);
}

// The slots that a head attends to, into work.places.
template <typename T>
void find_places(const Picking<T>& call, int64_t b, int64_t h, Scratch& work) {
  const Selecting& rule = call.rules[h];
  int n = call.n[b], sinks = std::min(rule.sink, n), recent = std::max(sinks, n - std::min(rule.recent, n));
  work.places.clear();
  for (int p = 0; p < sinks; p++) work.places.push_back(p);
  const int* held = call.held(b, h);
  if (rule.source >= 0) {
    const int64_t* source = call.sources + 2 * rule.source;
    held = reinterpret_cast<const int*>(source[0]) + (b * call.heads + h) * source[1];
  }
  for (int i = 0; i < rule.count && held[i] >= 0; i++) {
    if (held[i] >= sinks && held[i] < recent) work.places.push_back(held[i]);
  }
  for (int p = recent; p < n; p++) work.places.push_back(p);
}

template <typename T>
void attend_places(const Picking<T>& call, int64_t b, int64_t h, Scratch& work) {
  T* out = call.out.at(b, h, 0);
  if (call.counts(b)) find_places(call, b, h, work);
  if (!call.counts(b) || work.places.empty()) {
    std::fill_n(out, call.dim_v, T(0.0f));
    return;
  }
  int start = call.table[h / call.share()].start;
  int64_t n = work.places.size(), padded = (n + 15) / 16 * 16;
  const int* places = work.places.data();
  float *q = kept(work.queries, call.dim), *scores = kept(work.scores, padded), *sums = kept(work.sums, call.dim_v);
  widen(call.q.at(b, h, 0), call.dim, q);
  const T *first = call.keys.at(b, 0, start), *values = call.values.at(b, 0, start);
  for (int64_t j = 0; j < n; j += 16) {
    const T* keys[16];
    for (int64_t i = 0; i < 16; i++) {
      keys[i] = first + places[std::min(j + i, n - 1)] * call.keys.row;
      const T* next = first + places[std::min(j + i + 16, n - 1)] * call.keys.row;
      for (int64_t d = 0; d < call.dim; d += 32) ask(next + d);
    }
    score<1>(q, keys, call.dim, 0, scores + j);
  }
  std::fill(scores + n, scores + padded, NONE);
  float most = *std::max_element(scores, scores + n), total = 0;
  Vec factor(call.scale), away(-most * call.scale), all(0.0f);
  for (int64_t j = 0; j < padded; j += 16) {
    Vec weight = exponential<T>(at::vec::fmadd(Vec::loadu(scores + j), factor, away));
    weight.store(scores + j);
    all = all + weight;
  }
  total = sum(all);
  int64_t d = 0, row = call.values.row;
  for (; d + 128 <= call.dim_v; d += 128) weigh_places<4>(scores, values + d, row, places, n, sums + d);
  for (; d + 64 <= call.dim_v; d += 64) weigh_places<2>(scores, values + d, row, places, n, sums + d);
  for (; d < call.dim_v; d += 32) weigh_places<1>(scores, values + d, row, places, n, sums + d);
  for (d = 0; d < call.dim_v; d += 32) join(sums + d, static_cast<const T*>(nullptr));
  for (d = 0; d < call.dim_v; d++) out[d] = T(sums[d] / total);
}

// The features of the newest key; of a ring that has gone round, in which nobody selects by features, none.
template <typename T>
void label(const Picking<T>& call, int64_t b, int64_t g) {
  if (call.n[b] > call.table[g].capacity) return;
  const int64_t* chosen = call.chosen + (b * call.kv_heads + g) * call.features;
  int64_t slot = call.table[g].start + call.n[b] - 1;
  const T* key = call.keys.at(b, 0, slot);
  for (int64_t f = 0; f < call.features; f++) call.labels[(b * call.features + f) * call.slots + slot] = key[chosen[f]];
}

// Whether all heads that select have a slot for every token there is.
template <typename T>
bool whole(const Picking<T>& call) {
  int most = *std::max_element(call.n, call.n + call.batch);
  for (int64_t h = 0; h < call.heads; h++) {
    const Segment& segment = call.table[h / call.share()];
    bool inside = segment.start >= 0 && segment.start + segment.capacity <= call.slots && most <= segment.capacity;
    if (call.rules[h].count && !inside) return false;
  }
  return true;
}

template <typename T>
void pick(Picking<T>& call) {
  at::parallel_for(0, call.batch * call.kv_heads, 1, [&](int64_t from, int64_t to) {
    thread_local Scratch work;
    for (int64_t at = from; at < to; at++) {
      int64_t b = at / call.kv_heads, g = at % call.kv_heads;
      if (!call.counts(b)) continue;
      label(call, b, g);
      select(call, b, g, work);
    }
  });
  at::parallel_for(0, call.batch * call.heads, 1, [&](int64_t from, int64_t to) {
    thread_local Scratch work;
    for (int64_t at = from; at < to; at++) {
      if (call.rules[at % call.heads].count) attend_places(call, at / call.heads, at % call.heads, work);
    }
  });
}

// x: addresses of q, keys, values, out, labels, asked, n, valid, table, rules, similar, picked, age, sources, chosen;
// strides of q, keys, values and out, and of the rows of valid; sizes.
template <typename T>
int unpacked_pick(const int64_t* x, float scale) {
  auto values = [&](int n) { return reinterpret_cast<T*>(x[n]); };
  const int64_t *steps = x + 15, *sizes = x + 24;
  Picking<T> call{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], scale};
  call.q = {values(0), steps[0], steps[1], 0};
  call.keys = {values(1), steps[2], 0, steps[3]};
  call.values = {values(2), steps[4], 0, steps[5]};
  call.out = {values(3), steps[6], steps[7], 0};
  call.labels = values(4), call.asked = values(5);
  call.n = reinterpret_cast<const int*>(x[6]);
  call.valid = reinterpret_cast<const bool*>(x[7]), call.valid_row = steps[8];
  call.table = reinterpret_cast<const Segment*>(x[8]);
  call.rules = reinterpret_cast<const Selecting*>(x[9]);
  call.similar = reinterpret_cast<const float*>(x[10]);
  call.picked = reinterpret_cast<int*>(x[11]), call.age = reinterpret_cast<int*>(x[12]);
  call.sources = reinterpret_cast<const int64_t*>(x[13]), call.chosen = reinterpret_cast<const int64_t*>(x[14]);
  if (!whole(call)) return 1;
  pick(call);
  return 0;
}

}  // namespace

extern "C" {

// 0; 1, with nothing written, where a head that selects has not a slot for every token; or FAILED.
int pick_bfloat16(const int64_t* packed, float scale) {
  return guarded([&] { return unpacked_pick<BFloat16>(packed, scale); });
}

int pick_float32(const int64_t* packed, float scale) {
  return guarded([&] { return unpacked_pick<float>(packed, scale); });
}
}
