// What every CUDA launch needs: the right device for its duration, and errors that carry the operation's name.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace clue {

inline void check_cuda(cudaError_t status, const char* operation) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch of anybody would report this one's error again
  throw std::runtime_error(std::string(operation) + ": " + cudaGetErrorString(status));
}

// Makes a device current and restores the one before.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* operation) {
    check_cuda(cudaGetDevice(&before_), operation);
    check_cuda(cudaSetDevice(device), operation);
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// Starts a kernel and returns. A function and not <<<...>>>, so that ordinary compilers read the sources, too:
// tests/native/emulation runs them without a GPU.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  const cudaLaunchConfig_t config{blocks, threads, 0, stream};
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace clue
