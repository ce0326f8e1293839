// attnopt::attend_update and attnopt::live_attention on the CPU without Python; compiled with cache.cpp and live.cpp,
// after them. They are called for every layer and token, from cold caches, and there the Python of a call took three
// times as long as all that C++ has around the kernel. What fits a kernel as it comes goes straight to it. All else,
// what is wrong too, goes on to the Python that serves every device (attnopt/ops/cache.py, live.py).
//
// Eight heads with 16 slots, one thread of a busy Xeon, us, cold and warm: the kernel alone 69 and 4, this way 142 and 7,
// the operator's Python function 309 and 20; torch's SDPA on as much 154 and 10.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <cstdlib>
#include <cstring>

namespace {

using Given = c10::ArrayRef<c10::IValue>;

// What `settings` reads, where it reads it.
bool wanted() {
  const char *native = std::getenv("ATTNOPT_NATIVE"), *target = std::getenv("ATTNOPT_TARGET");
  bool ours = target == nullptr || !std::strcmp(target, "auto") || !std::strcmp(target, "cpu");
  return ours && (native == nullptr || !std::strcmp(native, "1"));
}

bool served(at::ScalarType type) {
  static const bool pairs = at::native::cpublas::could_pack(at::kBFloat16);
  return type == at::kFloat || (type == at::kBFloat16 && pairs);
}

bool plain(const at::Tensor& x, at::ScalarType type, at::IntArrayRef sizes) {
  bool here = x.is_cpu() && x.layout() == at::kStrided && x.scalar_type() == type && x.sizes() == sizes;
  return here && !x.is_neg() && !(x.requires_grad() && at::GradMode::is_enabled());
}

// The same with features one after the other, in as many as the vector loops step by.
bool walked(const at::Tensor& x, at::ScalarType type, at::IntArrayRef sizes) {
  return plain(x, type, sizes) && x.stride(-1) == 1 && sizes.back() > 0 && sizes.back() % 32 == 0;
}

int64_t address(const at::Tensor& x) { return reinterpret_cast<int64_t>(x.const_data_ptr()); }

int64_t written(const at::Tensor& x) { return reinterpret_cast<int64_t>(x.mutable_data_ptr()); }

// A new (B, H, T, Dv), laid out as (B, T, H, Dv).
at::Tensor tokens_first(const at::Tensor& q, int64_t width) {
  int64_t heads = q.size(1), tokens = q.size(2), row = heads * width;
  return at::empty_strided({q.size(0), heads, tokens, width}, {tokens * row, width, row, 1}, q.options());
}

at::Tensor attend_update(Given x) {
  const at::Tensor &q = x[0].toTensor(), &k = x[1].toTensor(), &v = x[2].toTensor(), &keys = x[3].toTensor();
  const at::Tensor &values = x[4].toTensor(), &n = x[5].toTensor(), &table = x[7].toTensor(), &spans = x[8].toTensor();
  at::ScalarType type = q.scalar_type();
  double scale = x[9].toDouble();
  bool ranks = q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && keys.dim() == 3;
  if (!ranks || !wanted() || !served(type) || !(scale > 0)) return {};
  int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), dim = q.size(3), groups = k.size(1);
  int64_t width = v.size(3), slots = keys.size(1);
  if (groups < 1 || heads % groups || !batch || !tokens) return {};
  // A prompt has a kernel of its own.
  if (x[10].toBool() && tokens >= PROMPT) return {};
  bool fits = walked(q, type, {batch, heads, tokens, dim}) && walked(k, type, {batch, groups, tokens, dim}) &&
      walked(v, type, {batch, groups, tokens, width}) && walked(keys, type, {batch, slots, dim}) &&
      walked(values, type, {batch, slots, width});
  fits = fits && plain(n, at::kInt, {batch}) && plain(table, at::kInt, {groups, 4}) && plain(spans, at::kInt, {heads, 2});
  // Inference tensors outside of inference mode are not to be written: said by Python.
  for (const at::Tensor* x : {&keys, &values, &n}) fits = fits && (!x->is_inference() || c10::InferenceMode::is_enabled());
  if (!fits || !n.is_contiguous() || !table.is_contiguous() || !spans.is_contiguous()) return {};
  int64_t valid = 0, valid_row = 0;
  if (!x[6].isNone()) {
    const at::Tensor& given = x[6].toTensor();
    if (!plain(given, at::kBool, {batch, tokens}) || given.stride(1) != 1) return {};
    valid = address(given), valid_row = given.stride(0);
  }
  at::Tensor out = tokens_first(q, width);
  const int64_t packed[] = {
      address(q), address(k), address(v), written(keys), written(values), written(out), written(n), valid,
      address(table), address(spans), q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
      v.stride(0), v.stride(1), v.stride(2), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
      out.stride(0), out.stride(1), out.stride(2), valid_row, batch, heads, groups, tokens, slots, dim, width};
  float factor = static_cast<float>(scale);
  Stored found = type == at::kFloat ? unpacked_step<float>(packed, factor) : unpacked_step<BFloat16>(packed, factor);
  return found == STORED ? out : at::Tensor();
}

at::Tensor live_attention(Given x) {
  const at::Tensor &q = x[0].toTensor(), &k = x[1].toTensor(), &v = x[2].toTensor();
  at::ScalarType type = q.scalar_type();
  double scale = x[4].toDouble();
  if (q.dim() != 4 || k.dim() != 4 || v.dim() != 4 || !wanted() || !served(type) || !(scale > 0)) return {};
  int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), dim = q.size(3), groups = k.size(1);
  int64_t columns = k.size(2), width = v.size(3);
  if (groups < 1 || heads % groups || heads / groups * tokens > MOST_ROWS || !batch || !tokens) return {};
  bool fits = walked(q, type, {batch, heads, tokens, dim}) && walked(k, type, {batch, groups, columns, dim}) &&
      walked(v, type, {batch, groups, columns, width});
  if (!fits) return {};
  Masked masked = NO_MASK;
  int64_t mask = 0, mask_batch = 0, mask_row = 0;
  if (!x[3].isNone()) {
    const at::Tensor& given = x[3].toTensor();
    at::ScalarType kind = given.scalar_type();
    if (given.dim() != 4 || (kind != at::kBool && kind != at::kFloat && kind != type)) return {};
    int64_t entries = given.size(0), rows = given.size(2);
    bool sized = (entries == 1 || entries == batch) && (rows == 1 || rows == tokens);
    if (!sized || !plain(given, kind, {entries, 1, rows, columns}) || given.stride(3) != 1) return {};
    masked = kind == at::kBool ? BOOLEAN : kind == at::kFloat ? FLOAT : SAME;
    mask = address(given), mask_batch = entries > 1 ? given.stride(0) : 0, mask_row = rows > 1 ? given.stride(2) : 0;
  }
  at::Tensor out = tokens_first(q, width);
  const int64_t packed[] = {
      address(q), address(k), address(v), written(out), mask, q.stride(0), q.stride(1), q.stride(2), k.stride(0),
      k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), out.stride(0), out.stride(1), out.stride(2),
      mask_batch, mask_row, masked, batch, groups, heads / groups, tokens, columns, dim, width};
  float factor = static_cast<float>(scale);
  Looked found = type == at::kFloat ? unpacked_look<float>(packed, factor) : unpacked_look<BFloat16>(packed, factor);
  return found == LOOKED ? out : at::Tensor();
}

// An operator's kernel: `run`, or, where that returns nothing, what is registered for all devices.
template <at::Tensor (*run)(Given), size_t COUNT>
void boxed(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::Tensor out = run(torch::jit::last(*stack, COUNT));
  if (!out.defined()) return op.callBoxedForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd, *stack);
  torch::jit::drop(*stack, COUNT);
  stack->emplace_back(std::move(out));
}

template <at::Tensor (*run)(Given), size_t COUNT>
void serve(const char* name) {
  // Never taken back, not when the process ends either: the operators may be gone by then.
  static auto* kept = new c10::RegistrationHandleRAII(c10::Dispatcher::singleton().registerImpl(
      {name, ""}, c10::DispatchKey::CPU, c10::KernelFunction::makeFromBoxedFunction<&boxed<run, COUNT>>(), std::nullopt,
      nullptr, "attnopt/codegen/dispatch.cpp"));
  (void)kept;
}

}  // namespace

extern "C" {

// 0, or FAILED. What throws later throws into torch, which calls these.
int serve_operators() {
  return guarded([] {
    serve<attend_update, 11>("attnopt::attend_update");
    serve<live_attention, 5>("attnopt::live_attention");
    return 0;
  });
}
}
