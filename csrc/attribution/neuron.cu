// Neuron attribution on CUDA: a block owns 32 neurons, its warps share out the tokens, and one tree adds them up. The
// order is fixed, so a call gives the same bits every time; no workspace, no synchronization, capturable in a graph.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attribution/neuron.hpp"
#include "launch.cuh"

namespace clue {
namespace {

constexpr int kNeurons = 32;  // of a block: one per lane
constexpr int kWarps = 32;    // of a block

__device__ inline float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float load(__half x) { return __half2float(x); }
__device__ inline float load(float x) { return x; }
__device__ inline double load(double x) { return x; }

template <class T, class Sum>
__global__ void __launch_bounds__(kNeurons* kWarps) neuron_kernel(const NeuronArguments a) {
  const int lane = threadIdx.x, warp = threadIdx.y;
  const std::int64_t neuron = std::int64_t{blockIdx.x} * kNeurons + lane;
  Sum sums[4] = {};
  if (neuron < a.neurons) {
    const T* inputs[4];
    for (int i = 0; i < 4; ++i) inputs[i] = reinterpret_cast<const T*>(a.inputs[i]) + neuron;
#pragma unroll 4
    for (std::int64_t token = warp; token < a.tokens; token += kWarps) {
      if (a.mask && !a.mask[token * a.mask_stride]) continue;
      const Sum difference = load(inputs[1][token * a.strides[1]]) - load(inputs[0][token * a.strides[0]]);
      const Sum noising = difference * load(inputs[2][token * a.strides[2]]);
      const Sum denoising = difference * load(inputs[3][token * a.strides[3]]);
      sums[0] += noising;
      sums[1] += denoising;
      sums[2] += noising * noising;
      sums[3] += denoising * denoising;
    }
  }
  __shared__ Sum partial[kWarps][kNeurons];
  for (int i = 0; i < 4; ++i) {
    partial[warp][lane] = sums[i];
    __syncthreads();
    for (int half = kWarps / 2; half > 0; half /= 2) {
      if (warp < half) partial[warp][lane] += partial[warp + half][lane];
      __syncthreads();
    }
    if (warp == 0 && neuron < a.neurons) reinterpret_cast<Sum*>(a.sums[i])[neuron] += partial[0][lane];
    __syncthreads();
  }
}

}  // namespace

void neuron_attribution_cuda(const NeuronArguments& a, int device, void* stream) {
  if (a.tokens == 0 || a.neurons == 0) return;
  constexpr const char* operation = "neuron_attribution";
  const DeviceGuard guard(device, operation);
  const dim3 blocks(static_cast<unsigned>((a.neurons + kNeurons - 1) / kNeurons)), threads(kNeurons, kWarps);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  switch (a.dtype) {
    case Dtype::kBf16:
      neuron_kernel<__nv_bfloat16, float><<<blocks, threads, 0, queue>>>(a);
      break;
    case Dtype::kF16:
      neuron_kernel<__half, float><<<blocks, threads, 0, queue>>>(a);
      break;
    case Dtype::kF32:
      neuron_kernel<float, float><<<blocks, threads, 0, queue>>>(a);
      break;
    default:
      neuron_kernel<double, double><<<blocks, threads, 0, queue>>>(a);
  }
  check_cuda(cudaGetLastError(), operation);
}

}  // namespace clue
