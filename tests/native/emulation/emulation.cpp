// The scheduler of the emulated GPU, and its runtime: one device of a few multiprocessors.
#include "emulation.hpp"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

namespace emulation {
namespace {

constexpr std::size_t kStack = 256 * 1024;

// Complete as soon as all who are still there have come.
struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;

  void release_if_complete() {
    if (arrived == expected) {
      arrived = 0;
      ++generation;
    }
  }
};

struct Warp {
  Barrier barrier;
  char values[2][kWarp][16];  // in turn: the next exchange may begin before all have read this one's
};

struct Fiber {
  ucontext_t context;
  dim3 index;
  Warp* warp;
  int lane;
  unsigned exchanges;
  const Barrier* waits;
  unsigned generation;
  bool left;
};

struct Block {
  dim3 index;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
};

ucontext_t scheduler;
const std::function<void()>* body;
Block block;
Fiber* current;
dim3 size_of_block, size_of_grid;
std::string failure;
std::uint64_t random_state = 1;

// A linear congruential generator (Knuth's MMIX): the order differs from launch to launch, and not from run to run.
std::uint32_t random_below(std::uint32_t bound) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<std::uint32_t>((random_state >> 33) % bound);
}

void leave_to_scheduler() { swapcontext(&current->context, &scheduler); }

void await(Barrier& barrier) {
  current->waits = &barrier;
  current->generation = barrier.generation;
  ++barrier.arrived;
  barrier.release_if_complete();
  // Who comes last may go on at once or be passed by those it has set free.
  if (barrier.generation == current->generation || random_below(4) == 0) leave_to_scheduler();
  current->waits = nullptr;
}

void live() {
  (*body)();
  current->left = true;
  if (current->warp->barrier.arrived) fail("a shuffle with a lane that leaves");
  --current->warp->barrier.expected;
  if (--block.barrier.expected) block.barrier.release_if_complete();
  leave_to_scheduler();
}

char* stack_of(std::size_t fiber) {
  static std::vector<char*> stacks;
  while (stacks.size() <= fiber) {
    void* const memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[fiber];
}

void prepare_block(unsigned threads) {
  block.barrier = {threads, 0, 0};
  block.warps.assign(threads / kWarp, {});
  for (Warp& warp : block.warps) warp.barrier.expected = kWarp;
  block.fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.index =
        dim3(i % size_of_block.x, i / size_of_block.x % size_of_block.y, i / size_of_block.x / size_of_block.y);
    fiber.warp = &block.warps[i / kWarp];
    fiber.lane = static_cast<int>(i % kWarp);
    fiber.exchanges = 0;
    fiber.waits = nullptr;
    fiber.left = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack_of(i);
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, live, 0);
  }
}

// Rounds over the fibers, each from a random one on and in a random direction, until all have left.
void run_block(unsigned threads) {
  prepare_block(threads);
  for (bool there = true, moved = true; there;) {
    if (!moved) {
      failure = "threads wait at barriers that the others never reach";
      return;
    }
    there = moved = false;
    const unsigned first = random_below(threads), backwards = random_below(2);
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = block.fibers[(first + (backwards ? threads - i : i)) % threads];
      if (fiber.left) continue;
      there = true;
      if (fiber.waits && fiber.waits->generation == fiber.generation) continue;
      moved = true;
      current = &fiber;
      swapcontext(&scheduler, &fiber.context);
      if (!failure.empty()) return;
    }
  }
}

}  // namespace

cudaError_t run(dim3 grid, dim3 block_dimensions, const std::function<void()>& thread) {
  const std::uint64_t threads = std::uint64_t{block_dimensions.x} * block_dimensions.y * block_dimensions.z;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  failure.clear();
  if (threads % kWarp) {
    failure = "blocks of no whole warps, which are not emulated";
    return cudaErrorLaunchFailure;
  }
  body = &thread;
  size_of_block = block_dimensions;
  size_of_grid = grid;
  const std::uint64_t first = random_below(static_cast<std::uint32_t>(std::min<std::uint64_t>(blocks, 1u << 31)));
  for (std::uint64_t i = 0; i < blocks && failure.empty(); ++i) {
    const std::uint64_t b = (first + i) % blocks;
    block.index = dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                       static_cast<unsigned>(b / grid.x / grid.y));
    run_block(static_cast<unsigned>(threads));
  }
  return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

void exchange(const void* mine, void* theirs, std::size_t size, int lane) {
  Warp& warp = *current->warp;
  if (warp.barrier.expected != kWarp) fail("a shuffle with a lane that has left");
  auto& values = warp.values[current->exchanges++ % 2];
  std::memcpy(values[current->lane], mine, size);
  await(warp.barrier);
  std::memcpy(theirs, values[lane], size);
}

const dim3& thread_index() { return current->index; }
const dim3& block_index() { return block.index; }
const dim3& block_size() { return size_of_block; }
const dim3& grid_size() { return size_of_grid; }
int lane() { return current->lane; }

void fail(const char* why) {
  failure = why;
  leave_to_scheduler();
  std::abort();  // it does not come back here
}

}  // namespace emulation

void __syncthreads() { emulation::await(emulation::block.barrier); }

const char* cudaGetErrorString(cudaError_t status) {
  if (status == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  return emulation::failure.c_str();
}

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 6 : 1;
  return cudaSuccess;
}

// Filled with NaNs, whatever the type.
cudaError_t cudaMallocAsync(void** memory, std::size_t size, cudaStream_t) {
  *memory = std::memset(std::malloc(size), 0xff, size);
  return cudaSuccess;
}

cudaError_t cudaFreeAsync(void* memory, cudaStream_t) {
  std::free(memory);
  return cudaSuccess;
}
