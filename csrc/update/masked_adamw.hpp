// AdamW on chosen rows or columns of a parameter: nothing outside them is read or written.
#pragma once

#include <cstdint>

#include "isa.hpp"
#include "tensor.hpp"

namespace clue {

// Views of one call, checked by the caller. A slice is a row or a column; slice k of the state is contiguous at
// k * length, whichever it is.
struct MaskedAdamWArguments {
  char* param;
  std::int64_t param_slice, param_element;  // strides between slices and along a slice, in elements
  const char* grad;
  std::int64_t grad_slice, grad_element;
  bool grad_compact;  // slice k of the gradient is at k, not at index[k]
  char *exp_avg, *exp_avg_sq;
  char* master;  // may be null
  const std::int64_t* index;
  std::int64_t slices, length;
  std::int64_t bound;  // number of rows or columns of the parameter
  AdamWTypes types;
  Dtype param_dtype, grad_dtype;
  bool stochastic;    // the parameter is bfloat16 and is rounded at random
  std::uint64_t key;  // of the random numbers; a slice draws by its place in the parameter
};

// On the CPU, partitioned over elements: the same bits for any number of threads.
void masked_adamw(const MaskedAdamWArguments& arguments, const AdamWConstants& constants);

// On a CUDA device and stream (a cudaStream_t); returns after the launch. Throws std::runtime_error. An index outside
// [0, bound) stops the device with a trap, since looking at it beforehand would wait for the stream.
void masked_adamw_cuda(const MaskedAdamWArguments& arguments, const AdamWConstants& constants, int device,
                       void* stream);

}  // namespace clue
