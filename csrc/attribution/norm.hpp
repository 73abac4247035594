// Norm backward: gradients at a norm's output, pulled back in place to its input.
#pragma once

#include <cstdint>

#include "tensor.hpp"

namespace clue {

// Views of one call, checked by the caller; all contiguous and of one dtype, float32 or float64.
//   y = grad * gain;  grad = scale * (y - normal * <y, normal> / width - mean(y))
struct NormArguments {
  char* grad;          // [readers * tokens, width]: row i is of token i % tokens
  const char* normal;  // [tokens, width]; null holds the scale constant
  const char* scale;   // [tokens]
  const char* gain;    // [width]; may be null
  bool centre;         // whether the norm subtracts the mean
  std::int64_t rows, tokens, width;
  Dtype dtype;
};

// On the CPU, partitioned over rows: the same bits for any number of threads and any instruction set.
void norm_backward(const NormArguments& arguments);

// On a CUDA device and stream (a cudaStream_t); returns after the launch. Throws std::runtime_error.
void norm_backward_cuda(const NormArguments& arguments, int device, void* stream);

}  // namespace clue
