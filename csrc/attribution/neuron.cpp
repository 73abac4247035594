#include "attribution/neuron.hpp"

#include <algorithm>
#include <vector>

#include "isa.hpp"
#include "parallel.hpp"

namespace clue {
namespace {

constexpr std::int64_t kSumBytes = 4096;  // of one of the four sums of a strip: together they stay in the L1 cache
constexpr std::int64_t kMinStrip = 64;    // neurons

template <class Sum>
void add_strip(const NeuronArguments& a, const std::vector<std::int64_t>& tokens, std::int64_t begin,
               std::int64_t count) {
  alignas(64) Sum strip[4][kSumBytes / sizeof(Sum)] = {};
  void* const sums[4] = {strip[0], strip[1], strip[2], strip[3]};
  const Kernels& table = kernels();
  const int type = static_cast<int>(a.dtype);
  const std::int64_t item = item_size(a.dtype);
  NeuronRow rows[2];
  for (std::size_t t = 0; t < tokens.size(); t += 2) {
    const std::size_t together = std::min<std::size_t>(2, tokens.size() - t);
    for (std::size_t r = 0; r < together; ++r) {
      for (int i = 0; i < 4; ++i) rows[r].values[i] = a.inputs[i] + (tokens[t + r] * a.strides[i] + begin) * item;
    }
    (together == 2 ? table.neuron_two : table.neuron_one)[type](rows, sums, count);
  }
  for (int i = 0; i < 4; ++i) {
    Sum* const out = reinterpret_cast<Sum*>(a.sums[i]) + begin;
    for (std::int64_t j = 0; j < count; ++j) out[j] += strip[i][j];
  }
}

}  // namespace

void neuron_attribution(const NeuronArguments& a) {
  std::vector<std::int64_t> tokens;
  tokens.reserve(static_cast<std::size_t>(a.tokens));
  for (std::int64_t t = 0; t < a.tokens; ++t) {
    if (!a.mask || a.mask[t * a.mask_stride]) tokens.push_back(t);
  }
  if (tokens.empty()) return;
  const bool wide = a.dtype == Dtype::kF64;
  const std::int64_t most = kSumBytes / (wide ? 8 : 4);
  const std::int64_t fair = (a.neurons / openmp_threads() + kMinStrip - 1) / kMinStrip * kMinStrip;
  const std::int64_t width = std::clamp(fair, kMinStrip, most);
  const std::int64_t strips = (a.neurons + width - 1) / width;
  parallel_for(strips, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t s = first; s < last; ++s) {
      const std::int64_t begin = s * width, count = std::min(width, a.neurons - begin);
      if (wide) {
        add_strip<double>(a, tokens, begin, count);
      } else {
        add_strip<float>(a, tokens, begin, count);
      }
    }
  });
}

}  // namespace clue
