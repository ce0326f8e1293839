// What Python calls comes in through `guarded`: an exception that left a function called by ctypes would end the process.
// Compiled before everything else of a library.

#include <cstdio>
#include <exception>

namespace {

constexpr int FAILED = -1;
thread_local char said[256];

// What `call` returns, which is not negative; FAILED where it throws, and then `failure` has what was said.
template <typename Call>
int guarded(Call call) noexcept {
  try {
    return call();
  } catch (const std::exception& error) {
    std::snprintf(said, sizeof(said), "%s", error.what());
  } catch (...) {
    std::snprintf(said, sizeof(said), "of an unknown kind");
  }
  return FAILED;
}

}  // namespace

extern "C" {

const char* failure() { return said; }
}
