// Decoding from ragged caches, a segment of slots for every KV head; compiled with rows.cpp, after it.

namespace {

struct Cache {
  int64_t batch, kv_heads, share, tokens, dim, dim_v, slots;
  int64_t rows() const { return share * tokens; }
};

// What one call is given. k, v (B, C, ·): strides of batch and slot. starts (G + 1,), filled (B, G). positions (B or 1,
// C), `apart` entries from one batch entry to the next, or null; with them at (B,), sinks and windows (H,).
template <typename T>
struct Decoding : Rows<T> {
  Cache s;
  Tensor<T> k, v;
  const int *starts, *filled, *positions, *at, *sinks, *windows;
  int64_t apart;

  void hide(const Piece<T>& piece, const Block& block, int64_t r, int64_t from, int64_t n, float* row) const override {
    int64_t head = this->head(block, r), i = at[block.b] + r % block.tokens;
    auto in_range = [](int64_t x) { return _mm512_set1_epi32(std::clamp<int64_t>(x, INT32_MIN, INT32_MAX)); };
    __m512i here = in_range(i), left = in_range(i - windows[head]), sink = _mm512_set1_epi32(sinks[head]);
    const int* positions = this->positions + block.b * apart + piece.first + from;
    for (int64_t j = 0; j < n; j += 16) {
      __mmask16 there = n >= j + 16 ? 0xffff : (1 << (n - j)) - 1;
      __m512i where = _mm512_maskz_loadu_epi32(there, positions + j);
      __mmask16 past = _mm512_mask_cmple_epi32_mask(there, where, here);
      __mmask16 keep = past & (_mm512_cmplt_epi32_mask(where, sink) | _mm512_cmpgt_epi32_mask(where, left));
      _mm512_mask_storeu_ps(row + j, there & ~keep, _mm512_set1_ps(NONE));
    }
  }
};

enum Outcome : int { DONE, SEGMENTS_APART, SEGMENTS_END_ELSEWHERE };

template <typename T>
Outcome decode(const Decoding<T>& call) {
  const Cache& s = call.s;
  for (int64_t g = 0; g < s.kv_heads; g++) {
    if (call.starts[0] != 0 || call.starts[g] > call.starts[g + 1]) return SEGMENTS_APART;
  }
  if (call.starts[s.kv_heads] != s.slots) return SEGMENTS_END_ELSEWHERE;

  thread_local Work<T> work;
  work.clear();
  work.whole = longest(s.rows());
  for (int64_t b = 0; b < s.batch; b++) {
    for (int64_t g = 0; g < s.kv_heads; g++) {
      int64_t first = call.starts[g], slots = call.starts[g + 1] - first;
      int64_t n = std::clamp<int64_t>(call.filled[b * s.kv_heads + g], 0, slots);
      work.open({b, g, 0, s.tokens});
      work.add(call.k.at(b, 0, first), call.v.at(b, 0, first), call.k.row, call.v.row, first, n);
      attend_some(call, work, s.rows());
    }
  }
  attend(call, work, s.rows());
  return DONE;
}

// x: addresses of q, k, v, out, starts, filled, positions, at, sinks, windows; strides of q, k, v and out; `apart`; the
// sizes of Cache.
template <typename T>
Decoding<T> unpacked(const int64_t* x, float scale) {
  auto values = [&](int n) { return reinterpret_cast<T*>(x[n]); };
  auto table = [&](int n) { return reinterpret_cast<const int*>(x[n]); };
  const int64_t *steps = x + 10, *sizes = x + 21;
  Decoding<T> call;
  call.q = {values(0), steps[0], steps[1], steps[2]};
  call.out = {values(3), steps[7], steps[8], steps[9]};
  call.share = sizes[2], call.dim = sizes[4], call.dim_v = sizes[5];
  call.scale = scale;
  call.hides = table(6) != nullptr;
  call.s = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
  call.k = {values(1), steps[3], 0, steps[4]};
  call.v = {values(2), steps[5], 0, steps[6]};
  call.starts = table(4), call.filled = table(5), call.positions = table(6);
  call.at = table(7), call.sinks = table(8), call.windows = table(9);
  call.apart = x[20];
  return call;
}

}  // namespace

extern "C" {

// 0, or what is wrong with `starts`: an Outcome.
int decode_bfloat16(const int64_t* packed, float scale) {
  return guarded([&] { return decode(unpacked<BFloat16>(packed, scale)); });
}

int decode_float32(const int64_t* packed, float scale) {
  return guarded([&] { return decode(unpacked<float>(packed, scale)); });
}
}
