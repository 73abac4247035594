#include "parallel.hpp"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <mutex>

namespace clue {
namespace {

// The part of the OpenMP runtime's ABI that is used; libgomp has it, and so has LLVM's runtime on Linux.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
  int (*thread)();
  int (*team)();
  int (*max_threads)();
};

// libgomp's pool does not survive a fork: a child that used it would wait forever for threads that are not there.
std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

template <class Function>
bool find(Function& function, const char* name) noexcept {
  function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  return function != nullptr;
}

const OpenMp* openmp() noexcept {
  static OpenMp runtime;
  static std::mutex mutex;
  static std::atomic<bool> found{false};
  if (forked) return nullptr;
  if (!found) {  // looked for on every call until it is there: torch may be imported later
    const std::lock_guard lock(mutex);
    if (!find(runtime.parallel, "GOMP_parallel") || !find(runtime.thread, "omp_get_thread_num") ||
        !find(runtime.team, "omp_get_num_threads") || !find(runtime.max_threads, "omp_get_max_threads")) {
      return nullptr;
    }
    found = true;
  }
  return &runtime;
}

struct Region {
  const OpenMp* runtime;
  std::int64_t count;
  ParallelBody body;
  void* context;
};

void run_part(void* pointer) noexcept {
  const Region& region = *static_cast<const Region*>(pointer);
  const std::int64_t part = region.runtime->thread(), parts = region.runtime->team();
  region.body(region.context, region.count * part / parts, region.count * (part + 1) / parts);
}

}  // namespace

int openmp_threads() noexcept {
  const OpenMp* runtime = openmp();
  return runtime ? std::max(1, runtime->max_threads()) : 1;
}

void parallel_for(std::int64_t count, std::int64_t grain, ParallelBody body, void* context) noexcept {
  if (count <= 0) return;
  const std::int64_t useful = (count + grain - 1) / grain;
  const OpenMp* runtime = useful > 1 ? openmp() : nullptr;
  const std::int64_t threads = runtime ? std::min<std::int64_t>(useful, runtime->max_threads()) : 1;
  if (threads <= 1) {
    body(context, 0, count);
    return;
  }
  Region region{runtime, count, body, context};
  runtime->parallel(run_part, &region, static_cast<unsigned>(threads), 0);
}

}  // namespace clue
