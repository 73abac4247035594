// Threads for the CPU kernels, borrowed from the OpenMP runtime that the process already has (torch's), so that no
// second pool competes with it. Without one, and in forked children, everything runs on the calling thread.
#pragma once

#include <cstdint>

namespace clue {

// Threads a parallel_for started here would use; 1 without an OpenMP runtime and in forked children.
int openmp_threads() noexcept;

using ParallelBody = void (*)(void* context, std::int64_t begin, std::int64_t end) noexcept;

void parallel_for(std::int64_t count, std::int64_t grain, ParallelBody body, void* context) noexcept;

// Calls body(begin, end) on disjoint ranges that cover 0...count-1, each on one thread and no more than one thread per
// `grain` items. The ranges depend on the number of threads: an item's result must not depend on its neighbours.
template <class Body>
void parallel_for(std::int64_t count, std::int64_t grain, const Body& body) noexcept {
  parallel_for(
      count, grain,
      [](void* context, std::int64_t begin, std::int64_t end) noexcept {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

}  // namespace clue
