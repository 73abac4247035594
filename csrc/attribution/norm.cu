// Norm backward on CUDA: a warp owns a row; the sums over its width are a fixed tree of shuffles, so a call gives the
// same bits every time. No workspace, no synchronization, capturable in a graph.
#include "attribution/norm.hpp"
#include "launch.cuh"

namespace clue {
namespace {

constexpr int kLanes = 32, kWarps = 8;  // of a block

template <class T>
__device__ inline T over_warp(T x) {
#pragma unroll
  for (int half = kLanes / 2; half > 0; half /= 2) x += __shfl_xor_sync(0xffffffffu, x, half);
  return x;
}

template <class T>
__global__ void __launch_bounds__(kLanes* kWarps) norm_kernel(const NormArguments a) {
  const std::int64_t row = std::int64_t{blockIdx.x} * kWarps + threadIdx.y;
  if (row >= a.rows) return;
  const std::int64_t token = row % a.tokens;
  T* const grad = reinterpret_cast<T*>(a.grad) + row * a.width;
  const T* const gain = reinterpret_cast<const T*>(a.gain);
  const T* const normal = a.normal ? reinterpret_cast<const T*>(a.normal) + token * a.width : nullptr;
  T along = 0, sum = 0;
  if (normal || a.centre) {
    for (std::int64_t i = threadIdx.x; i < a.width; i += kLanes) {
      const T y = gain ? grad[i] * gain[i] : grad[i];
      sum += y;
      if (normal) along += y * normal[i];
    }
    along = over_warp(along) / static_cast<T>(a.width);
    sum = a.centre ? over_warp(sum) / static_cast<T>(a.width) : T{0};
  }
  const T scale = reinterpret_cast<const T*>(a.scale)[token];
  for (std::int64_t i = threadIdx.x; i < a.width; i += kLanes) {
    const T y = gain ? grad[i] * gain[i] : grad[i];
    grad[i] = scale * (y - (normal ? normal[i] * along : T{0}) - sum);
  }
}

}  // namespace

void norm_backward_cuda(const NormArguments& a, int device, void* stream) {
  if (a.rows == 0 || a.width == 0) return;
  constexpr const char* operation = "norm_backward";
  const DeviceGuard guard(device, operation);
  const dim3 blocks(static_cast<unsigned>((a.rows + kWarps - 1) / kWarps)), threads(kLanes, kWarps);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  auto* kernel = a.dtype == Dtype::kF64 ? norm_kernel<double> : norm_kernel<float>;
  check_cuda(launch(kernel, blocks, threads, queue, a), operation);
}

}  // namespace clue
