// AdamW on chosen rows or columns on CUDA. Parameter and gradient go through a tile in shared memory where their slices
// are columns, so that they are read along rows and the state along slices. No workspace, no synchronization.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "launch.cuh"
#include "update/masked_adamw.hpp"

namespace clue {
namespace {

constexpr int kTile = 32;
constexpr int kTileWarps = 8;
constexpr int kThreads = 256;
constexpr std::int64_t kMostBlocks = 1 << 20;

__device__ inline float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float load(__half x) { return __half2float(x); }
__device__ inline float load(float x) { return x; }
__device__ inline double load(double x) { return x; }

__device__ inline void store(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ inline void store(__half& to, float x) { to = __float2half_rn(x); }
__device__ inline void store(float& to, float x) { to = x; }
__device__ inline void store(double& to, double x) { to = x; }

// Only bfloat16 is ever rounded at random (the caller has checked).
template <class P, class State>
__device__ inline void store_at_random(P& to, State x, std::uint32_t) {
  store(to, x);
}
__device__ inline void store_at_random(__nv_bfloat16& to, float x, std::uint32_t random) {
  to = __ushort_as_bfloat16(rounded_at_random(__float_as_uint(x), random));
}

__device__ inline float square_root(float x) { return sqrtf(x); }
__device__ inline double square_root(double x) { return sqrt(x); }

template <class P, class G, class State>
struct Step {
  MaskedAdamWArguments a;
  State decay, one_minus_b1, beta2, one_minus_b2, step_size, second_scale, eps, grad_scale;

  Step(const MaskedAdamWArguments& arguments, const AdamWConstants& c)
      : a(arguments),
        decay(static_cast<State>(c.decay)),
        one_minus_b1(static_cast<State>(c.one_minus_b1)),
        beta2(static_cast<State>(c.beta2)),
        one_minus_b2(static_cast<State>(c.one_minus_b2)),
        step_size(static_cast<State>(c.step_size)),
        second_scale(static_cast<State>(c.second_scale)),
        eps(static_cast<State>(c.eps)),
        grad_scale(static_cast<State>(c.grad_scale)) {}

  __device__ std::int64_t place(std::int64_t slice) const {
    const std::int64_t found = a.index[slice];
    if (found < 0 || found >= a.bound) __trap();
    return found;
  }

  __device__ P* param(std::int64_t slice, std::int64_t element) const {
    return reinterpret_cast<P*>(a.param) + place(slice) * a.param_slice + element * a.param_element;
  }

  __device__ const G* grad(std::int64_t slice, std::int64_t element) const {
    const std::int64_t at = a.grad_compact ? slice : place(slice);
    return reinterpret_cast<const G*>(a.grad) + at * a.grad_slice + element * a.grad_element;
  }

  // The element's new value; its state and master are written.
  __device__ State update(State value, State gradient, std::int64_t slice, std::int64_t element) const {
    const std::int64_t offset = slice * a.length + element;
    State& first = reinterpret_cast<State*>(a.exp_avg)[offset];
    State& second = reinterpret_cast<State*>(a.exp_avg_sq)[offset];
    State* const master = reinterpret_cast<State*>(a.master);
    gradient *= grad_scale;
    if (master) value = master[offset];
    value *= decay;
    const State m = first + one_minus_b1 * (gradient - first);
    const State v = beta2 * second + one_minus_b2 * (gradient * gradient);
    first = m;
    second = v;
    value -= step_size * m / (square_root(v) * second_scale + eps);
    if (master) master[offset] = value;
    return value;
  }

  // Writes a new value to its element, rounded.
  __device__ void put(P& to, State value, std::int64_t slice, std::int64_t element) const {
    if (a.stochastic) {
      const RoundingKey key = rounding_key(a.key, place(slice));
      store_at_random(to, value, rounding_bits(key, static_cast<std::uint32_t>(element)));
    } else {
      store(to, value);
    }
  }
};

template <class P, class G, class State>
__global__ void __launch_bounds__(kThreads) along_kernel(const Step<P, G, State> s) {
  const std::int64_t chunks = (s.a.length + kThreads - 1) / kThreads;
  for (std::int64_t item = blockIdx.x; item < s.a.slices * chunks; item += gridDim.x) {
    const std::int64_t slice = item / chunks, element = item % chunks * kThreads + threadIdx.x;
    if (element >= s.a.length) continue;
    P* const param = s.param(slice, element);
    s.put(*param, s.update(load(*param), load(*s.grad(slice, element)), slice, element), slice, element);
  }
}

template <class P, class G, class State>
__global__ void __launch_bounds__(kTile* kTileWarps) across_kernel(const Step<P, G, State> s) {
  __shared__ State param[kTile][kTile + 1], grad[kTile][kTile + 1];  // [element][slice], padded against bank conflicts
  const std::int64_t tiles = (s.a.length + kTile - 1) / kTile, groups = (s.a.slices + kTile - 1) / kTile;
  const int lane = threadIdx.x;
  for (std::int64_t item = blockIdx.x; item < tiles * groups; item += gridDim.x) {
    const std::int64_t slice0 = item % groups * kTile, element0 = item / groups * kTile;
    for (int e = threadIdx.y; e < kTile; e += kTileWarps) {  // lanes are slices
      if (slice0 + lane < s.a.slices && element0 + e < s.a.length) {
        param[e][lane] = load(*s.param(slice0 + lane, element0 + e));
        grad[e][lane] = load(*s.grad(slice0 + lane, element0 + e));
      }
    }
    __syncthreads();
    for (int k = threadIdx.y; k < kTile; k += kTileWarps) {  // lanes are elements
      if (slice0 + k < s.a.slices && element0 + lane < s.a.length) {
        param[lane][k] = s.update(param[lane][k], grad[lane][k], slice0 + k, element0 + lane);
      }
    }
    __syncthreads();
    for (int e = threadIdx.y; e < kTile; e += kTileWarps) {
      if (slice0 + lane < s.a.slices && element0 + e < s.a.length) {
        s.put(*s.param(slice0 + lane, element0 + e), param[e][lane], slice0 + lane, element0 + e);
      }
    }
    __syncthreads();
  }
}

template <class P, class G, class State>
cudaError_t update(const MaskedAdamWArguments& a, const AdamWConstants& constants, cudaStream_t stream) {
  const Step<P, G, State> step(a, constants);
  if (a.param_element == 1 && a.grad_element == 1) {
    const std::int64_t blocks = a.slices * ((a.length + kThreads - 1) / kThreads);
    return launch(along_kernel<P, G, State>, static_cast<unsigned>(std::min(blocks, kMostBlocks)), kThreads, stream,
                  step);
  }
  const std::int64_t blocks = ((a.slices + kTile - 1) / kTile) * ((a.length + kTile - 1) / kTile);
  return launch(across_kernel<P, G, State>, static_cast<unsigned>(std::min(blocks, kMostBlocks)),
                dim3(kTile, kTileWarps), stream, step);
}

}  // namespace

void masked_adamw_cuda(const MaskedAdamWArguments& a, const AdamWConstants& constants, int device, void* stream) {
  if (a.slices == 0 || a.length == 0) return;
  constexpr const char* operation = "masked_adamw";
  const DeviceGuard guard(device, operation);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  const auto step = [&] {
    switch (a.types) {
      case kBf16Bf16:
        return update<__nv_bfloat16, __nv_bfloat16, float>(a, constants, queue);
      case kBf16F32:
        return update<__nv_bfloat16, float, float>(a, constants, queue);
      case kF16F16:
        return update<__half, __half, float>(a, constants, queue);
      case kF16F32:
        return update<__half, float, float>(a, constants, queue);
      case kF32F32:
        return update<float, float, float>(a, constants, queue);
      default:
        return update<double, double, double>(a, constants, queue);
    }
  };
  check_cuda(step(), operation);
}

}  // namespace clue
