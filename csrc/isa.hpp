// The leaf loops of the CPU kernels, one table per instruction set. kernels.cpp is compiled once per set; the best set
// this processor has is chosen at run time. Every set gives the same bits (no fused multiply-add, no reassociation).
#pragma once

#include <cstdint>

#include "update/rounding.hpp"

namespace clue {

// Neurons are taken by cache lines of their rows.
constexpr std::int64_t kNeuronLine = 64;  // bytes
constexpr int kNeuronRows = 3;            // tokens that one call can take

// One token's rows: clean, corrupted, gradient at the clean run, gradient at the corrupted run (unread for one
// gradient).
struct NeuronRow {
  const char* values[4];
};

// Adds the terms of 1 to kNeuronRows tokens for `lines` cache lines of neurons. For each line in turn sums has, aligned
// to 64 bytes, its neurons' Ns, with two gradients Dn, and with squares the squares of the same: float, or double for
// double inputs. Of bfloat16 inputs the even neurons of a line come before the odd ones.
using NeuronLeaf = void (*)(const NeuronRow* rows, int count, void* sums, std::int64_t lines);

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
// receives it, rounded. random may be null, which rounds to nearest; otherwise param is bfloat16, is rounded at random
// by the key, and its first element is number `element` of its slice.
using AdamWLeaf = void (*)(void* param, const void* grad, void* exp_avg, void* exp_avg_sq, void* master,
                           std::int64_t count, const AdamWConstants& constants, const RoundingKey* random,
                           std::int64_t element);

// Which gradient goes with which parameter; the order indexes Kernels::adamw.
enum AdamWTypes { kBf16Bf16, kBf16F32, kF16F16, kF16F32, kF32F32, kF64F64, kAdamWTypes };

struct Kernels {
  const char* isa;
  NeuronLeaf neuron[2][2][4];    // by gradients less one, squares, Dtype
  AdamWLeaf adamw[kAdamWTypes];  // state is float, for double parameters double
  NormLeaf norm[2];              // float, double
};

// The table in use.
const Kernels& kernels() noexcept;

// The table of index i among those this processor can run, slowest first; null after the last.
const Kernels* kernels_at(int i) noexcept;

// Use this table from now on.
void use_kernels(const Kernels& table) noexcept;

}  // namespace clue
