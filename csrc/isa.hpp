// The leaf loops of the CPU kernels, one table per instruction set. kernels.cpp is compiled once per set; the best set
// this processor has is chosen at run time. Every set gives the same bits (no fused multiply-add, no reassociation).
#pragma once

#include <cstdint>

namespace clue {

// One token's four rows: clean, corrupted, gradient at the clean run, gradient at the corrupted run.
struct NeuronRow {
  const void* values[4];
};

// sums[0..3] += terms of one or two tokens for `count` neurons: Ns, Dn, squares of Ns, squares of Dn.
using NeuronLeaf = void (*)(const NeuronRow* rows, void* const sums[4], std::int64_t count);

// One row of norm_backward (see attribution/norm.hpp); gain and normal may be null, scale is one number.
using NormLeaf = void (*)(void* grad, const void* gain, const void* normal, const void* scale, bool centre,
                          std::int64_t width);

// AdamW's scalars of one step, worked out in double precision.
struct AdamWConstants {
  double decay;         // 1 - lr * weight_decay
  double one_minus_b1;  // 1 - beta1
  double beta2;
  double one_minus_b2;  // 1 - beta2
  double step_size;     // lr / (1 - beta1^step)
  double second_scale;  // 1 / sqrt(1 - beta2^step)
  double eps;
  double grad_scale;
};

// One AdamW step on `count` contiguous elements. master may be null; where it is not, it is the value and param only
// receives it, rounded.
using AdamWLeaf = void (*)(void* param, const void* grad, void* exp_avg, void* exp_avg_sq, void* master,
                           std::int64_t count, const AdamWConstants& constants);

// Which gradient goes with which parameter; the order indexes Kernels::adamw.
enum AdamWTypes { kBf16Bf16, kBf16F32, kF16F16, kF16F32, kF32F32, kF64F64, kAdamWTypes };

struct Kernels {
  const char* isa;
  NeuronLeaf neuron_one[4], neuron_two[4];  // by Dtype; sums are float, for double inputs double
  AdamWLeaf adamw[kAdamWTypes];             // state is float, for double parameters double
  NormLeaf norm[2];                         // float, double
};

// The table in use.
const Kernels& kernels() noexcept;

// The table of index i among those this processor can run, slowest first; null after the last.
const Kernels* kernels_at(int i) noexcept;

// Use this table from now on.
void use_kernels(const Kernels& table) noexcept;

}  // namespace clue
