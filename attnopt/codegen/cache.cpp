// One step of a cache that holds of every KV head the first tokens and the last; compiled with rows.cpp, after it. New
// queries attend to what is stored and to the new keys, then those of the new that stay are written.
//
//     slots of a head, capacity C    0 .. sink - 1 | sink .. C - 1
//     hold the positions             0 .. sink - 1 | p at sink + (p - sink) mod (C - sink), the newest of them
//
// A position is the number of valid tokens of its row before it. What a block of queries can see of a head are at most
// four stretches of slots in which positions go up by one: the sinks, the ring in two pieces, and the new tokens, again
// cut in pieces where some of these are padding. So no position is ever stored, or looked up: a row keeps a beginning
// and an end of a stretch.

namespace {

struct Step {
  int64_t batch, heads, kv_heads, tokens, slots;
};

// Of one KV head, as the table has it: where its slots begin and how many there are, its sinks, its widest window.
struct Segment {
  int start, capacity, sink, window;
  int64_t ring() const { return capacity - sink; }
  int64_t slot(int64_t p) const { return start + (p < sink ? p : sink + (p - sink) % ring()); }
};

// New tokens that are all valid: columns from `token` on, positions from `first` on.
struct Run {
  int64_t token, first, size;
};

// k, v (B, G, T, ·): the new ones; keys, values (B, S, ·): those stored. n (B,); valid (B, T), or null where all are;
// table (G, 4); spans (H, 2): sinks and windows.
template <typename T>
struct Stepping : Rows<T> {
  Step s;
  Tensor<T> k, v, keys, values;
  int* n;
  const bool* valid;
  int64_t valid_row;
  const Segment* table;
  const int* spans;
  // (B, T): the position of every new token, or -1 for padding.
  const int64_t* at;

  void hide(const Piece<T>& piece, const Block& block, int64_t r, int64_t from, int64_t n, float* row) const override {
    int64_t i = at[block.b * s.tokens + block.token + r % block.tokens], begin = piece.first + from;
    const int* span = spans + 2 * this->head(block, r);
    int64_t sinks = i < 0 ? 0 : std::clamp<int64_t>(span[0] - begin, 0, n);
    int64_t left = std::clamp<int64_t>(i - span[1] + 1 - begin, 0, n), end = std::clamp<int64_t>(i + 1 - begin, 0, n);
    if (sinks < left) std::fill(row + sinks, row + left, NONE);
    std::fill(row + end, row + n, NONE);
  }
};

// The runs of valid tokens of every row, into `at` as positions, and how many each row has after the step.
struct Arrivals {
  std::vector<Run> runs;
  std::vector<int64_t> begins, at, ends;

  template <typename T>
  void find(const Stepping<T>& call) {
    const Step& s = call.s;
    runs.clear();
    begins.clear();
    ends.clear();
    at.resize(s.batch * s.tokens);
    for (int64_t b = 0; b < s.batch; b++) {
      begins.push_back(runs.size());
      int64_t p = call.n[b];
      for (int64_t t = 0, before = 0; t < s.tokens; t++) {
        bool here = call.valid == nullptr || call.valid[b * call.valid_row + t];
        at[b * s.tokens + t] = here ? p : -1;
        if (here && !before) runs.push_back({t, p, 0});
        if (here) runs.back().size++, p++;
        before = here;
      }
      ends.push_back(p);
    }
    begins.push_back(runs.size());
  }
};

// What the queries of a block can see, the first of which is at position i: of the sinks and, from `left` on, of those
// behind them.
template <typename T>
void gather(const Stepping<T>& call, const Arrivals& arrivals, const Block& block, int64_t i, Work<T>& work) {
  const Segment& head = call.table[block.g];
  int64_t b = block.b, n = call.n[b], ring = head.ring();
  int64_t left = std::max<int64_t>({head.sink, i - head.window + 1, n - ring});
  auto stored = [&](int64_t from, int64_t to) {
    if (from >= to) return;
    int64_t slot = head.slot(from);
    work.add(call.keys.at(b, 0, slot), call.values.at(b, 0, slot), call.keys.row, call.values.row, from, to - from);
  };
  stored(0, std::min<int64_t>(n, head.sink));
  if (left < n) {
    int64_t whole = head.start + head.capacity - head.slot(left), middle = std::min(n, left + whole);
    // As they lie in memory, so that what is asked for ahead of the end of one is the next.
    stored(middle, n);
    stored(left, middle);
  }
  for (int64_t at = arrivals.begins[b]; at < arrivals.begins[b + 1]; at++) {
    const Run& run = arrivals.runs[at];
    int64_t size = std::min(run.size, block.token + block.tokens - run.token);
    auto arrived = [&](int64_t from, int64_t to) {
      if (from >= to) return;
      int64_t t = run.token + from - run.first;
      const T *key = call.k.at(b, block.g, t), *value = call.v.at(b, block.g, t);
      work.add(key, value, call.k.row, call.v.row, from, to - from);
    };
    int64_t end = run.first + size;
    arrived(run.first, std::min<int64_t>(end, head.sink));
    arrived(std::max(run.first, left), end);
  }
}

// Write of the new tokens those that stay: the sinks, and of the others the last that the ring holds.
template <typename T>
void store_arrivals(const Stepping<T>& call, const Arrivals& arrivals) {
  const Step& s = call.s;
  at::parallel_for(0, s.batch * s.kv_heads, std::max<int64_t>(1, 4096 / s.tokens), [&](int64_t from, int64_t to) {
    for (int64_t group = from; group < to; group++) {
      int64_t b = group / s.kv_heads, g = group % s.kv_heads;
      const Segment& head = call.table[g];
      int64_t oldest = arrivals.ends[b] - head.ring();
      for (int64_t at = arrivals.begins[b]; at < arrivals.begins[b + 1]; at++) {
        const Run& run = arrivals.runs[at];
        for (int64_t p = run.first; p < run.first + run.size; p++) {
          if (p >= head.sink && p < oldest) continue;
          int64_t t = run.token + p - run.first, slot = head.slot(p);
          std::copy_n(call.k.at(b, g, t), call.dim, call.keys.at(b, 0, slot));
          std::copy_n(call.v.at(b, g, t), call.dim_v, call.values.at(b, 0, slot));
        }
      }
    }
  });
}

// Rows that one piece of work holds, but for a KV head that has more query heads.
constexpr int64_t MOST_ROWS = 64;
// Tokens from which on a prompt into an empty cache is the span prefill's, which lays keys out once for all rows
// (native.py has the same number). Eight heads of 64 features, a quarter of them whole, one thread of a busy Xeon with
// AMX, ms, this way and by that kernel:
//     tokens              512         1024        2048        4096
//     float32  8 KV    2.6   3.5    9.3  10.5   27    28    83    75
//              2 KV    2.9   4.1    9.3  10.2   31    30   114   101
//     bfloat16 8 KV    2.1   2.0    4.9   4.4   13    11    50    32
//              2 KV    2.4   1.9    6.8   5.0   20    14    61    38
constexpr int64_t PROMPT = 1024;

enum Stored : int { STORED, FULL, TABLE_OF_ANOTHER, NEGATIVE };

// attends: whether there are queries; without them what is new is only written.
template <typename T>
Stored step(Stepping<T>& call, bool attends) {
  const Step& s = call.s;
  int64_t slots = 0, room = std::numeric_limits<int64_t>::max();
  for (int64_t g = 0; g < s.kv_heads; g++) {
    const Segment& head = call.table[g];
    if (head.start != slots || head.sink < 0 || head.ring() < 0) return TABLE_OF_ANOTHER;
    slots += head.capacity;
    // One that holds every token: its window is wider than its ring, which must not wrap.
    if (head.window > head.ring()) room = std::min<int64_t>(room, head.capacity);
  }
  if (slots != s.slots) return TABLE_OF_ANOTHER;
  // Its slots would lie before the cache.
  if (std::any_of(call.n, call.n + s.batch, [](int n) { return n < 0; })) return NEGATIVE;
  thread_local Arrivals arrivals;
  arrivals.find(call);
  for (int64_t b = 0; b < s.batch; b++) {
    if (arrivals.ends[b] > room) return FULL;
  }
  call.at = arrivals.at.data();
  call.hides = true;

  int64_t most = std::min(s.tokens, std::max<int64_t>(1, MOST_ROWS / call.share));
  thread_local Work<T> work;
  work.clear();
  for (int64_t token = 0; attends && token < s.tokens; token += most) {
    int64_t tokens = std::min(most, s.tokens - token), rows = call.share * tokens;
    work.whole = longest(rows);
    for (int64_t b = 0; b < s.batch; b++) {
      const int64_t* here = &arrivals.at[b * s.tokens + token];
      const int64_t* first = std::find_if(here, here + tokens, [](int64_t p) { return p >= 0; });
      for (int64_t g = 0; g < s.kv_heads; g++) {
        work.open({b, g, token, tokens});
        if (first != here + tokens) gather(call, arrivals, work.blocks.back(), *first, work);
        attend_some(call, work, rows);
      }
    }
    attend(call, work, rows);
  }

  store_arrivals(call, arrivals);
  for (int64_t b = 0; b < s.batch; b++) call.n[b] = arrivals.ends[b];
  return STORED;
}

// x: addresses of q, k, v, keys, values, out, n, valid, table, spans; strides of q, k, v, keys, values and out, and of
// the rows of valid; sizes: those of Step, dim, dim_v. q null: no queries.
template <typename T>
Stored unpacked_step(const int64_t* x, float scale) {
  auto values = [&](int n) { return reinterpret_cast<T*>(x[n]); };
  const int64_t *steps = x + 10, *sizes = x + 27;
  Stepping<T> call;
  call.s = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  call.share = sizes[1] / sizes[2], call.dim = sizes[5], call.dim_v = sizes[6];
  call.scale = scale;
  call.q = {values(0), steps[0], steps[1], steps[2]};
  call.k = {values(1), steps[3], steps[4], steps[5]};
  call.v = {values(2), steps[6], steps[7], steps[8]};
  call.keys = {values(3), steps[9], 0, steps[10]};
  call.values = {values(4), steps[11], 0, steps[12]};
  call.out = {values(5), steps[13], steps[14], steps[15]};
  call.n = reinterpret_cast<int*>(x[6]);
  call.valid = reinterpret_cast<const bool*>(x[7]), call.valid_row = steps[16];
  call.table = reinterpret_cast<const Segment*>(x[8]);
  call.spans = reinterpret_cast<const int*>(x[9]);
  return step(call, x[0] != 0);
}

}  // namespace

extern "C" {

// 0, or why nothing has been written: a Stored.
int step_bfloat16(const int64_t* packed, float scale) {
  return guarded([&] { return unpacked_step<BFloat16>(packed, scale); });
}

int step_float32(const int64_t* packed, float scale) {
  return guarded([&] { return unpacked_step<float>(packed, scale); });
}
}
