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

}  // namespace clue
