// A causal prefill each block of whose rows visits the blocks of keys that a list names; reference_blocks.py has the
// contract. Compiled with spans.cpp, after it.
//
// Keys and values of a KV head are laid out once for all heads and rows that share it, and of them only the blocks that
// a list names. A block of rows takes the scores of SPAN keys side by side, block after block in the order of the
// contract, then their weights at once, then the products with values. What a bound skips is known from its scores and
// the largest so far: the next block overwrites them, and neither an exponential nor its values are ever touched.
//
// Share of the work-saved ideal over torch's causal SDPA, 4 over 2 heads, 4096 keys, blocks of 64, of which 53 and 18 %
// are listed at random; one thread of an EPYC that multiplies bfloat16 in vectors, torch 2.13; by keys whose scores are
// held at once / keys in a panel, whose neighbours were one product:
//                         512/64       512/256       1024/64      1024/256
//     float32  D=64     1.25 1.08     1.23 1.04     1.19 1.08     1.19 1.05
//     float32  D=128    1.19 1.11     1.16 1.03     1.24 1.07     1.23 1.03
//     bfloat16 D=64     2.07 1.86     2.08 1.85     2.12 1.90     2.07 1.84
//     bfloat16 D=128    2.18 1.85     2.09 1.80     2.16 1.97     2.17 1.92
// Torch's own bfloat16 is no faster than its float32 there. A bound that skips nothing took 0 to 3 % more time, and up
// to 9 % in blocks of 16; one that skips three quarters, 35 to 42 % less (benchmarks/cpu_blocks.py).

namespace {

// spec.py has the blocks that there are.
constexpr int64_t MOST_BLOCK = 128;
// Floats between rows of scores: rows a power of two apart share the cache's sets.
constexpr int64_t WIDTH = SPAN + 16;

struct Lists {
  const int *heads, *counts, *blocks;  // (h,), (B, h, R), (B, h, R, most)
  const float* bounds;  // (B, h)
  const bool* pad;  // (B, M), or null
  int64_t count, rows, columns, most;  // h; blocks of rows and of keys; ids in a list

  int64_t at(int64_t b, int64_t n, int64_t r) const { return (b * count + n) * rows + r; }

  // Whether all lists hold ascending blocks that there are, and `heads` heads that there are.
  bool sound(int64_t batch, int64_t most_heads) const {
    if (std::any_of(heads, heads + count, [&](int n) { return n < 0 || n >= most_heads; })) return false;
    for (int64_t at = 0; at < batch * count * rows; at++) {
      if (counts[at] < 0 || counts[at] > most) return false;
      const int* list = blocks + at * most;
      for (int64_t n = 0, before = -1; n < counts[at]; before = list[n++]) {
        if (list[n] <= before || list[n] >= columns) return false;
      }
    }
    return true;
  }
};

// Keys and values of one KV head. Keys stand in panels (dim, panel), values in rows; both in pairs in bfloat16.
template <typename T>
struct Laid {
  static constexpr int64_t PAIR = std::is_same_v<T, float> ? 1 : 2;
  int64_t panel, dim, dim_v;
  std::unique_ptr<T[]> keys, values;

  Laid(int64_t length, int64_t panel, int64_t dim, int64_t dim_v)
      : panel(panel), dim(dim), dim_v(dim_v), keys(new T[(length + panel - 1) / panel * panel * dim]),
        values(new T[(length + panel - 1) / panel * panel * dim_v]) {}

  T* key(int64_t j) const { return &keys[j / panel * panel * dim + j % panel * PAIR]; }
  T* value(int64_t j) const { return &values[j * dim_v]; }

  // n <= BLOCK keys and values from j on, a multiple of BLOCK; what is missing of the block is zero. So are the values
  // of padding, which `pad` (n,), or null, has: a weight of 0 does not hide what is no number.
  void put(const T* k, int64_t k_row, const T* v, int64_t v_row, int64_t j, int64_t n, const bool* pad) const {
    lay_out_keys(k, k_row, n, dim, key(j), panel);
    if constexpr (PAIR == 2) {
      lay_out_values(v, v_row, n, dim_v, value(j));
    } else {
      for (int64_t i = 0; i < n; i++) std::copy_n(v + i * v_row, dim_v, value(j + i));
      std::fill_n(value(j + n), (BLOCK - n) * dim_v, 0.0f);
    }
    for (int64_t i = 0; pad != nullptr && i < n; i++) {
      if (pad[i]) continue;
      for (int64_t d = 0; d < dim_v; d++) value(j + i / PAIR * PAIR)[d * PAIR + i % PAIR] = 0.0f;
    }
  }
};

float largest(const float* x, int64_t count) {
  Vec found = Vec::loadu(x);
  for (int64_t c = Vec::size(); c < count; c += Vec::size()) found = at::vec::maximum(found, Vec::loadu(x + c));
  return largest(found);
}

enum Found { NOTHING_KEPT, SKIPPED, TAKEN };

// One block of rows of one head: `slots` places for the scores of a block of keys, filled from the last on downward, as
// lists are walked, so that neighbours stand as they do in memory.
template <typename T>
struct Visit {
  static constexpr bool PAIRS = !std::is_same_v<T, float>;
  int64_t block, slots, dim_v, rows = 0, from;
  Tile<T> tile;
  // Of each row the largest score so far; `tile.top` has that of the last time weights were taken.
  std::vector<float> most;
  std::vector<int64_t> held;

  Visit(int64_t block, int64_t dim_v)
      : block(block), slots(SPAN / block), dim_v(dim_v), from(slots), tile(block, WIDTH, dim_v), most(block),
        held(slots) {}

  void start(int64_t n) {
    rows = n, from = slots;
    tile.clear();
    std::fill(most.begin(), most.end(), NONE);
  }

  float* scores(int64_t r, int64_t slot) { return &tile.scores[r * WIDTH + slot * block]; }
  T* weights(int64_t r, int64_t slot) {
    if constexpr (PAIRS) return &tile.weights[r * WIDTH + slot * block];
    else return scores(r, slot);
  }

  // Hide of the scores in a slot those that the query at position p + r does not keep: of keys from `base` on.
  void mask(int64_t slot, int64_t p, int64_t base, int64_t window, const bool* pad) {
    for (int64_t r = 0; r < rows; r++, p++) {
      float* row = scores(r, slot);
      int64_t end = std::clamp<int64_t>(p + 1 - base, 0, block);
      if (window) std::fill(row, row + std::clamp<int64_t>(p - window + 1 - base, 0, block), NONE);
      std::fill(row + end, row + block, NONE);
      for (int64_t c = 0; pad != nullptr && c < end; c++) row[c] = pad[base + c] ? row[c] : NONE;
    }
  }

  // Take the largest scores in a slot into `most`, unless every row's are below its own there by more than `bound`.
  Found look(int64_t slot, float bound, float scale) {
    float here[MOST_BLOCK];
    bool any = false, wanted = false;
    for (int64_t r = 0; r < rows; r++) {
      here[r] = largest(scores(r, slot), block) * scale;
      any |= here[r] != NONE;
      wanted |= here[r] != NONE && !(here[r] < most[r] + bound);
    }
    for (int64_t r = 0; wanted && r < rows; r++) most[r] = std::max(most[r], here[r]);
    return wanted ? TAKEN : any ? SKIPPED : NOTHING_KEPT;
  }

  // Weights of all scores that are held, and their values added to the sums.
  void weigh(const Laid<T>& laid, float scale, bool known) {
    if (from == slots) return;
    // Sixteen columns more where the vectors below take two at a time.
    int64_t columns = (slots - from) * block, odd = columns % (2 * Vec::size());
    for (int64_t r = 0; r < rows; r++) {
      float* row = scores(r, from) - odd;
      std::fill(row, row + odd, NONE);
      if (!known) most[r] = std::max(most[r], largest(row + odd, columns) * scale);
      // A row that has met no kept key yet: -inf minus -inf would be NaN.
      float base = most[r] == NONE ? 0.0f : most[r];
      Vec factor(scale), away(-base), all(0.0f);
      T* to = weights(r, from) - odd;
      for (int64_t c = 0; c < columns + odd; c += 2 * Vec::size()) {
        Vec a = exponential<T>(at::vec::fmadd(Vec::loadu(row + c), factor, away));
        Vec b = exponential<T>(at::vec::fmadd(Vec::loadu(row + c + Vec::size()), factor, away));
        all = all + a + b;
        store(a, b, to + c);
      }
      float shrink = std::exp(tile.top[r] - base);
      tile.total[r] = tile.total[r] * shrink + sum(all);
      tile.top[r] = most[r];
      if (shrink == 1.0f) continue;
      Vec less(shrink);
      float* sums = &tile.sums[r * dim_v];
      for (int64_t d = 0; d < dim_v; d += Vec::size()) (Vec::loadu(sums + d) * less).store(sums + d);
    }
    for (int64_t n = from, end; n < slots; n = end) {
      for (end = n + 1; end < slots && held[end] == held[end - 1] + 1;) end++;
      multiply(
          rows, dim_v, (end - n) * block, weights(0, n), WIDTH, laid.value(held[n] * block), dim_v, tile.sums.data(),
          dim_v, true);
    }
    from = slots;
  }
};

template <typename T>
struct Listed {
  Tensor<T> q, k, v, out;
  float* lse;  // (B, h, N), or null
  int* skipped;  // (B, h, R)
  Lists lists;
  int64_t batch, kv_heads, share, length, keys, dim, dim_v, block, window;
  float scale;
  std::vector<uint8_t> live;

  // Which blocks of keys have padding in them.
  void find_padding() {
    live.assign(batch * lists.columns, WHOLE);
    for (int64_t at = 0; lists.pad != nullptr && at < static_cast<int64_t>(live.size()); at++) {
      int64_t first = at % lists.columns * block, n = std::min(block, keys - first);
      const bool* row = lists.pad + at / lists.columns * keys + first;
      int64_t kept = std::count(row, row + n, true);
      live[at] = kept == 0 ? DEAD : kept == n ? WHOLE : MIXED;
    }
  }

  // One block of rows of served head n.
  void attend(Visit<T>& visit, const Laid<T>& laid, int64_t b, int64_t n, int64_t r) const {
    int64_t head = lists.heads[n], first = r * block, at = lists.at(b, n, r), size = lists.counts[at], missed = 0;
    int64_t rows = std::min(block, length - first), p = first + keys - length;
    const int* list = lists.blocks + at * lists.most;
    const uint8_t* alive = &live[b * lists.columns];
    float bound = lists.bounds[b * lists.count + n];
    bool bounded = bound != NONE;
    visit.start(rows);
    for (int64_t i = 0; i < size; i++) {
      // In the order of the contract.
      int64_t c = list[i ? size - i : 0], base = c * block, slot = visit.from - 1;
      if (alive[c] == DEAD || base >= p + rows || (window && base + block + window <= p + 1)) continue;
      multiply(
          rows, block, dim, q.at(b, head, first), q.row, laid.key(base), laid.panel, visit.scores(0, slot), WIDTH,
          false);
      bool mixed = alive[c] == MIXED, inside = !window || base + window >= p + rows;
      if (mixed || !inside || base + block > p + 1) {
        visit.mask(slot, p, base, window, mixed ? lists.pad + b * keys : nullptr);
      }
      Found found = bounded ? visit.look(slot, bound, scale) : TAKEN;
      missed += found == SKIPPED;
      if (found == TAKEN) visit.held[visit.from = slot] = c;
      if (!visit.from) visit.weigh(laid, scale, bounded);
    }
    visit.weigh(laid, scale, bounded);
    skipped[at] = missed;
    float* sums = lse == nullptr ? nullptr : lse + (b * lists.count + n) * length + first;
    visit.tile.write(rows, dim_v, out.at(b, head, first), out.row, sums);
  }

  void run() {
    find_padding();
    Laid<T> laid(keys, std::max(block, BLOCK), dim, dim_v);
    struct Item {
      int64_t n, r;
      int size;
    };
    std::vector<Item> items;
    std::vector<uint8_t> named;
    // One KV head after the other, so that its keys and values stay in the cache.
    for (int64_t group = 0; group < batch * kv_heads; group++) {
      int64_t b = group / kv_heads, g = group % kv_heads;
      items.clear();
      named.assign(lists.columns, 0);
      for (int64_t n = 0; n < lists.count; n++) {
        for (int64_t r = 0; lists.heads[n] / share == g && r < lists.rows; r++) {
          int64_t at = lists.at(b, n, r);
          items.push_back({n, r, lists.counts[at]});
          for (int64_t m = 0; m < lists.counts[at]; m++) named[lists.blocks[at * lists.most + m]] = 1;
        }
      }
      if (items.empty()) continue;
      // Whole blocks, and two at once of those that are smaller than BLOCK.
      int64_t step = std::max(block, BLOCK);
      at::parallel_for(0, (keys + step - 1) / step, 4, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin * step; j < end * step; j += BLOCK) {
          int64_t n = std::clamp<int64_t>(keys - j, 0, BLOCK), last = std::min(j + BLOCK, keys) - 1;
          if (!named[std::min(j, last) / block] && !named[last / block]) continue;
          const bool* pad = lists.pad == nullptr ? nullptr : lists.pad + b * keys + j;
          laid.put(k.at(b, g, j), k.row, v.at(b, g, j), v.row, j, n, pad);
        }
      });
      // Taken one by one, the long ones first.
      std::stable_sort(items.begin(), items.end(), [](const Item& x, const Item& y) { return x.size > y.size; });
      std::atomic<int64_t> next{0};
      at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
        Visit<T> visit(block, dim_v);
        for (int64_t at = next++; at < static_cast<int64_t>(items.size()); at = next++) {
          attend(visit, laid, b, items[at].n, items[at].r);
        }
        at::native::cpublas::brgemm_release(Visit<T>::PAIRS);
      });
    }
  }
};

enum Visited : int { VISITED, LISTS_OF_ANOTHER };

// x: addresses of q, k, v, out, lse, heads, counts, blocks, bounds, pad, skipped; strides of q, k, v, out; sizes:
// batch, KV heads, query heads of each, N, M, dim, dim_v, served heads, block, ids in a list, window.
template <typename T>
Visited unpacked_blocks(const int64_t* x, float scale) {
  auto values = [&](int n) { return reinterpret_cast<T*>(x[n]); };
  auto numbers = [&](int n) { return reinterpret_cast<const int*>(x[n]); };
  const int64_t *steps = x + 11, *sizes = x + 23;
  Listed<T> call;
  call.q = {values(0), steps[0], steps[1], steps[2]};
  call.k = {values(1), steps[3], steps[4], steps[5]};
  call.v = {values(2), steps[6], steps[7], steps[8]};
  call.out = {values(3), steps[9], steps[10], steps[11]};
  call.lse = reinterpret_cast<float*>(x[4]);
  call.skipped = reinterpret_cast<int*>(x[10]);
  call.batch = sizes[0], call.kv_heads = sizes[1], call.share = sizes[2], call.length = sizes[3], call.keys = sizes[4];
  call.dim = sizes[5], call.dim_v = sizes[6], call.block = sizes[8], call.window = sizes[10];
  call.scale = scale;
  int64_t rows = (call.length + call.block - 1) / call.block, columns = (call.keys + call.block - 1) / call.block;
  call.lists = {numbers(5), numbers(6), numbers(7), reinterpret_cast<const float*>(x[8]),
                reinterpret_cast<const bool*>(x[9]), sizes[7], rows, columns, sizes[9]};
  if (!call.lists.sound(call.batch, call.kv_heads * call.share)) return LISTS_OF_ANOTHER;
  call.run();
  return VISITED;
}

}  // namespace

extern "C" {

// Whether this CPU multiplies pairs of bfloat16, in a matrix unit or in its vectors.
int multiplies_pairs() { return has_matrix_unit() || __builtin_cpu_supports("avx512bf16"); }

// 0; LISTS_OF_ANOTHER, with nothing written; FAILED.
int blocks_bfloat16(const int64_t* packed, float scale) {
  return guarded([&] { return unpacked_blocks<BFloat16>(packed, scale); });
}

int blocks_float32(const int64_t* packed, float scale) {
  return guarded([&] { return unpacked_blocks<float>(packed, scale); });
}
}
