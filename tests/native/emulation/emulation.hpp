// CUDA without a GPU: as much of the language and of the runtime as csrc/*.cu use, so that an ordinary C++ compiler
// builds them and an ordinary processor runs them. Every thread of a block is a fiber; fibers and blocks come in a
// random order, so what a kernel computes must not depend on it. What a GPU leaves undefined is an error here: a
// barrier that a part of the threads never reaches, a shuffle with a lane that has left, a launch beyond the limits of
// the hardware. Slow, and no judge of speed or of memory ordering within a warp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint4 {
  unsigned x, y, z, w;
};

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMemoryPoolsSupported };
using cudaStream_t = struct Stream*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

const char* cudaGetErrorString(cudaError_t status);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMallocAsync(void** memory, std::size_t size, cudaStream_t stream);
cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream);

namespace emulation {

constexpr int kWarp = 32;

cudaError_t run(dim3 grid, dim3 block, const std::function<void()>& thread);
// Hands 16 bytes at most to the warp and returns those of a lane, once all 32 have come.
void exchange(const void* mine, void* theirs, std::size_t size, int lane);
const dim3& thread_index();
const dim3& block_index();
const dim3& block_size();
const dim3& grid_size();
int lane();
[[noreturn]] void fail(const char* why);

}  // namespace emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  return emulation::run(config->gridDim, config->blockDim, [=] { kernel(static_cast<Parameters>(arguments)...); });
}

#define threadIdx emulation::thread_index()
#define blockIdx emulation::block_index()
#define blockDim emulation::block_size()
#define gridDim emulation::grid_size()

void __syncthreads();
[[noreturn]] inline void __trap() { emulation::fail("a trap"); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int apart) {
  if (mask != ~0u) emulation::fail("a shuffle of a part of a warp, which is not emulated");
  T found;
  emulation::exchange(&value, &found, sizeof(T), emulation::lane() ^ apart);
  return found;
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  unsigned votes = static_cast<unsigned>(predicate) << emulation::lane();
  for (int apart = 1; apart < emulation::kWarp; apart *= 2) votes |= __shfl_xor_sync(mask, votes, apart);
  return votes;
}

template <class T>
T __ldg(const T* from) {
  return *from;
}

inline void atomicAdd(unsigned long long* to, unsigned long long x) { *to += x; }  // fibers change over at barriers

inline std::int64_t min(std::int64_t a, std::int64_t b) { return std::min(a, b); }

inline std::uint32_t __float_as_uint(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
