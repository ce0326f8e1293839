// One decoded token of linear far parts; compiled with linear.cpp, after it. Each head's state is walked once: a row
// takes what leaves the window and is read for the query.

namespace {

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

// q (B, H, 1, D), with strides of batch and head; k (B, C, D) and v (B, C, Dv), of batch and slot. out (B, h, 1, Dv),
// lse (B, h), slots (B, h), heads (h,), state (B, h, F, Dv + 1) with F as attnopt/feature_maps.py has it, and maps are
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
  int64_t together = std::max<int64_t>(1, (1 << 15) / (width * row));
  at::parallel_for(0, s.batch * s.served, together, [&](int64_t begin, int64_t end) {
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

int decode_bfloat16(const int64_t* call) {
  return guarded([&] { return decode<BFloat16>(call); });
}

int decode_float32(const int64_t* call) {
  return guarded([&] { return decode<float>(call); });
}
}
