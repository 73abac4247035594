// Neuron attribution: for every hidden unit the sums over tokens of (corrupted - clean) * gradient, and of its square.
#pragma once

#include <cstdint>

#include "tensor.hpp"

namespace clue {

// Views of one call, checked by the caller. Inputs are [tokens, neurons] of one floating dtype with unit stride along
// neurons; sums are contiguous [neurons], float32, or float64 for float64 inputs, and added to.
struct NeuronArguments {
  const char* inputs[4];    // clean, corrupted, gradient at the clean run, gradient at the corrupted run (may be null)
  std::int64_t strides[4];  // between tokens, in elements
  char* sums[4];            // Ns, Dn, squares of Ns, squares of Dn; Dn is null without the second gradient, and squares
                            // are all null or all that have a gradient
  std::int64_t* count;      // the number of tokens that entered is added to it; may be null
  const char* mask;         // one byte per token, zero leaves the token out; may be null
  std::int64_t mask_stride;
  std::int64_t tokens, neurons;
  Dtype dtype;

  int gradients() const { return inputs[3] ? 2 : 1; }
  bool squares() const { return sums[2] != nullptr; }
};

// On the CPU, partitioned over neurons: the same bits for any number of threads.
void neuron_attribution(const NeuronArguments& arguments);

// On a CUDA device and stream (a cudaStream_t); returns after the launch. Throws std::runtime_error.
void neuron_attribution_cuda(const NeuronArguments& arguments, int device, void* stream);

}  // namespace clue
