// Neuron attribution on CUDA. A block owns 128 bytes of every row: 8 lanes read 16 bytes each, so a warp reads four
// tokens at once, and the warps share out the tokens. Every thread has at least two tokens of all inputs in flight,
// which is 64 KiB on a multiprocessor. Where the neurons alone are too few blocks to fill the device, the tokens are
// split as well, and a second kernel adds up the parts. All orders are fixed, so a call gives the same bits every time;
// nothing synchronizes, and a graph can hold it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>

#include "attribution/neuron.hpp"
#include "launch.cuh"

namespace clue {
namespace {

constexpr const char* kOperation = "neuron_attribution";
constexpr int kAccess = 16;                 // bytes a thread reads of a row
constexpr int kColumns = 8;                 // threads side by side on a row
constexpr int kSlots = 32 / kColumns;       // tokens of a warp at once
constexpr int kTogether = 2;                // of a thread
constexpr int kMostWarps = 16;              // of a block, of which a multiprocessor then holds one; else two of half
constexpr std::int64_t kLeastTokens = 256;  // of a split

__device__ inline float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float load(__half x) { return __half2float(x); }
__device__ inline float load(float x) { return x; }
__device__ inline double load(double x) { return x; }

// The numbers that one thread reads of a row. Where not all is aligned to 16 bytes they are 8 apart, each on its own.
template <class T, bool kAligned>
struct Piece {
  static constexpr int kNumbers = kAccess / sizeof(T);

  T numbers[kNumbers];

  // Of the block's neurons.
  static __device__ int place(int column, int j) { return kAligned ? column * kNumbers + j : j * kColumns + column; }

  // Zeros where nothing is wanted. From the block's first neuron on, where `row` points, there are `left`.
  __device__ void read(const T* row, int column, std::int64_t left, bool wanted) {
    if constexpr (kAligned) {
      // A predicate rather than a branch, so that the reads of all inputs and tokens are on their way together.
      uint4 bytes{};
#ifdef __CUDACC__
      asm("{\n"
          "  .reg .pred wanted;\n"
          "  setp.ne.u32 wanted, %5, 0;\n"
          "  mov.b32 %0, 0;\n"
          "  mov.b32 %1, 0;\n"
          "  mov.b32 %2, 0;\n"
          "  mov.b32 %3, 0;\n"
          "  @wanted ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
          "}"
          : "=&r"(bytes.x), "=&r"(bytes.y), "=&r"(bytes.z), "=&r"(bytes.w)
          : "l"(row + column * kNumbers), "r"(static_cast<unsigned>(wanted)));
#else
      if (wanted) std::memcpy(&bytes, row + column * kNumbers, sizeof bytes);
#endif
      std::memcpy(numbers, &bytes, sizeof bytes);
    } else {
#pragma unroll
      for (int j = 0; j < kNumbers; ++j) {
        numbers[j] = wanted && place(column, j) < left ? __ldg(row + place(column, j)) : T(0.0f);
      }
    }
  }
};

template <class T, class Sum, bool kAligned, int kGradients>
__global__ void __launch_bounds__(kMostWarps * 32, 1)
    neuron_kernel(const NeuronArguments a, Sum* const parts, const std::int64_t split) {
  using P = Piece<T, kAligned>;
  constexpr int kNumbers = P::kNumbers, kNeurons = kNumbers * kColumns, kInputs = 2 + kGradients;
  constexpr int kSums = 2 * kGradients;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int column = lane % kColumns, slot = lane / kColumns;
  const std::int64_t first = std::int64_t{blockIdx.x} * kNeurons, left = a.neurons - first;
  const bool inside = P::place(column, 0) < left;
  const std::int64_t begin = blockIdx.y * split, end = min(a.tokens, begin + split);
  const auto enters = [&](std::int64_t token) { return token < end && (!a.mask || a.mask[token * a.mask_stride]); };

  Sum sums[kSums][kNumbers] = {};
  bool next = enters(begin + warp * 32 + lane);
  for (std::int64_t start = begin + warp * 32; start < end; start += warps * 32) {
    const unsigned entering = __ballot_sync(~0u, next);
    next = enters(start + warps * 32 + lane);  // early: the reads below must not wait for it
    const T* rows[kInputs];
    for (int i = 0; i < kInputs; ++i) {
      rows[i] = reinterpret_cast<const T*>(a.inputs[i]) + (start + slot) * a.strides[i] + first;
    }
#pragma unroll(kAligned ? 32 / (kSlots * kTogether) : 1)
    for (int token = 0; token < 32; token += kSlots * kTogether) {
      P pieces[kTogether][kInputs];
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        const bool wanted = inside && (entering >> (token + t * kSlots + slot) & 1u);
#pragma unroll
        for (int i = 0; i < kInputs; ++i) {
          pieces[t][i].read(rows[i] + (token + t * kSlots) * a.strides[i], column, left, wanted);
        }
      }
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
#pragma unroll
        for (int j = 0; j < kNumbers; ++j) {
          const Sum difference = load(pieces[t][1].numbers[j]) - load(pieces[t][0].numbers[j]);
#pragma unroll
          for (int g = 0; g < kGradients; ++g) {
            const Sum term = difference * load(pieces[t][2 + g].numbers[j]);
            sums[g][j] += term;
            sums[kGradients + g][j] += term * term;
          }
        }
      }
    }
  }

  __shared__ Sum of_warps[kMostWarps][kSums][kNeurons];
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int j = 0; j < kNumbers; ++j) {
      Sum sum = sums[s][j];
      for (int apart = kColumns; apart < 32; apart *= 2) sum += __shfl_xor_sync(~0u, sum, apart);
      if (slot == 0) of_warps[warp][s][P::place(column, j)] = sum;
    }
  }
  __syncthreads();
  for (int k = threadIdx.x; k < kSums * kNeurons; k += blockDim.x) {
    const int s = k / kNeurons, n = k % kNeurons;
    if (n >= left) continue;
    Sum sum = of_warps[0][s][n];
    for (int w = 1; w < warps; ++w) sum += of_warps[w][s][n];
    if (parts) {
      parts[(std::int64_t{blockIdx.y} * kSums + s) * a.neurons + first + n] = sum;
    } else {
      Sum* const out = reinterpret_cast<Sum*>(a.sums[s / kGradients * 2 + s % kGradients]);
      if (out) out[first + n] += sum;
    }
  }
}

// Thread x, y: neuron and sum.
template <class Sum>
__global__ void add_parts(const NeuronArguments a, const Sum* const parts, const int splits, const int gradients) {
  const std::int64_t neuron = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int s = blockIdx.y, n_sums = 2 * gradients;
  Sum* const out = reinterpret_cast<Sum*>(a.sums[s / gradients * 2 + s % gradients]);
  if (!out || neuron >= a.neurons) return;
  Sum sum = 0;
  for (int part = 0; part < splits; ++part) sum += parts[(std::int64_t{part} * n_sums + s) * a.neurons + neuron];
  out[neuron] += sum;
}

__global__ void count_tokens(const NeuronArguments a) {
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  unsigned long long mine = 0;
  for (std::int64_t token = threadIdx.x; token < a.tokens; token += blockDim.x) {
    mine += !a.mask || a.mask[token * a.mask_stride];
  }
  atomicAdd(&total, mine);  // of integers: exact in any order
  __syncthreads();
  if (threadIdx.x == 0) *a.count += static_cast<std::int64_t>(total);
}

int attribute_of(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), kOperation);
  return value;
}

bool aligned(const NeuronArguments& a) {
  const std::int64_t item = item_size(a.dtype);
  bool all = a.neurons * item % kAccess == 0;
  for (int i = 0; i < 2 + a.gradients(); ++i) {
    all = all && reinterpret_cast<std::intptr_t>(a.inputs[i]) % kAccess == 0 && a.strides[i] * item % kAccess == 0;
  }
  return all;
}

template <class T, class Sum>
void attribute(const NeuronArguments& a, int device, cudaStream_t stream) {
  constexpr std::int64_t kNeurons = kColumns * kAccess / sizeof(T);
  const std::int64_t blocks = (a.neurons + kNeurons - 1) / kNeurons;
  const std::int64_t multiprocessors = attribute_of(cudaDevAttrMultiProcessorCount, device);
  const int warps = blocks <= multiprocessors ? kMostWarps : kMostWarps / 2;
  std::int64_t splits = std::min(multiprocessors / blocks, a.tokens / kLeastTokens);
  if (splits < 2 || !attribute_of(cudaDevAttrMemoryPoolsSupported, device)) splits = 1;
  const std::int64_t split = (a.tokens + splits - 1) / splits;
  const int gradients = a.gradients();
  void* parts = nullptr;  // in the order of the stream, so that neither allocating nor freeing waits
  if (splits > 1) {
    const std::size_t size = static_cast<std::size_t>(splits * 2 * gradients * a.neurons) * sizeof(Sum);
    check_cuda(cudaMallocAsync(&parts, size, stream), kOperation);
  }
  auto* kernel = aligned(a) ? (gradients == 2 ? neuron_kernel<T, Sum, true, 2> : neuron_kernel<T, Sum, true, 1>)
                            : (gradients == 2 ? neuron_kernel<T, Sum, false, 2> : neuron_kernel<T, Sum, false, 1>);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(splits));
  cudaError_t status = launch(kernel, grid, warps * 32, stream, a, static_cast<Sum*>(parts), split);
  if (parts) {
    if (status == cudaSuccess) {
      const dim3 all(static_cast<unsigned>((a.neurons + 255) / 256), 2 * gradients);
      status = launch(add_parts<Sum>, all, 256, stream, a, static_cast<const Sum*>(parts), static_cast<int>(splits),
                      gradients);
    }
    const cudaError_t freed = cudaFreeAsync(parts, stream);
    if (status == cudaSuccess) status = freed;
  }
  check_cuda(status, kOperation);
}

}  // namespace

void neuron_attribution_cuda(const NeuronArguments& a, int device, void* stream) {
  const DeviceGuard guard(device, kOperation);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (a.count && a.tokens > 0) {
    check_cuda(launch(count_tokens, 1, 1024, queue, a), kOperation);
  }
  if (a.tokens == 0 || a.neurons == 0) return;
  switch (a.dtype) {
    case Dtype::kBf16:
      attribute<__nv_bfloat16, float>(a, device, queue);
      break;
    case Dtype::kF16:
      attribute<__half, float>(a, device, queue);
      break;
    case Dtype::kF32:
      attribute<float, float>(a, device, queue);
      break;
    default:
      attribute<double, double>(a, device, queue);
  }
}

}  // namespace clue
