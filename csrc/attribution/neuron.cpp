// Neuron attribution on the CPU: as fast as one core reads memory, as long as it reads a few long streams. So a strip
// of neurons is as wide as its sums still fit the second-level cache, and the tokens of one step lie far apart: every
// one of their streams goes on into the next row at its end.
#include "attribution/neuron.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.hpp"
#include "parallel.hpp"

namespace clue {
namespace {

constexpr std::int64_t kMostLines = 512;  // of a strip: 128 KiB of sums of float32 inputs, 256 of 16-bit ones
constexpr std::int64_t kLeastLines = 4;   // of a strip that is one of several

struct alignas(kNeuronLine) CacheLine {
  char bytes[kNeuronLine];
};

// What the leaf needs of a call, and room for its sums.
struct Call {
  const NeuronArguments& a;
  NeuronLeaf leaf;
  std::vector<std::int64_t> tokens;  // that enter
  std::int64_t item, neurons;        // bytes of one input, and neurons of a cache line
  std::int64_t wide;                 // cache lines of one sum of a line's neurons
  char* outs[4];                     // the sums that are asked for, in the leaf's order
  int n_outs = 0;
  int together_at_most;

  explicit Call(const NeuronArguments& arguments) : a(arguments), item(item_size(a.dtype)) {
    leaf = kernels().neuron[a.gradients() - 1][a.squares()][static_cast<int>(a.dtype)];
    neurons = kNeuronLine / item;
    wide = item == 2 ? 2 : 1;
    // More tokens mean less traffic of sums but more streams, and the processor follows only so many: measured.
    together_at_most = item == 2 && a.gradients() == 2 ? 2 : kNeuronRows;
    for (char* sum : a.sums) {
      if (sum) outs[n_outs++] = sum;
    }
    tokens.reserve(static_cast<std::size_t>(a.tokens));
    for (std::int64_t t = 0; t < a.tokens; ++t) {
      if (!a.mask || a.mask[t * a.mask_stride]) tokens.push_back(t);
    }
  }

  // Sums of cache lines `first` up to `last`, into sums, which start as zeros.
  void add_strip(std::int64_t first, std::int64_t last, CacheLine* sums) const {
    const std::int64_t count = static_cast<std::int64_t>(tokens.size());
    const std::int64_t part = (count + together_at_most - 1) / together_at_most;
    const std::int64_t whole = std::min(last, a.neurons / neurons) - first;
    const std::size_t rest = static_cast<std::size_t>(last - first == whole ? 0 : a.neurons % neurons * item);
    NeuronRow rows[kNeuronRows], padded[kNeuronRows];
    CacheLine pad[kNeuronRows][4] = {};
    for (std::int64_t t = 0; t < part; ++t) {
      int together = 0;
      for (; together < together_at_most && t + together * part < count; ++together) {
        const std::int64_t token = tokens[static_cast<std::size_t>(t + together * part)];
        for (int i = 0; i < 2 + a.gradients(); ++i) {
          const char* const row = a.inputs[i] + token * a.strides[i] * item + first * kNeuronLine;
          rows[together].values[i] = row;
          padded[together].values[i] = pad[together][i].bytes;
          if (rest) std::memcpy(pad[together][i].bytes, row + whole * kNeuronLine, rest);
        }
      }
      leaf(rows, together, sums, whole);
      if (rest) leaf(padded, together, sums + whole * n_outs * wide, 1);
    }
  }

  template <class Sum>
  void hand_out(std::int64_t first, std::int64_t last, const CacheLine* sums) const {
    for (std::int64_t line = first; line < last; ++line) {
      for (int s = 0; s < n_outs; ++s, sums += wide) {
        Sum* const out = reinterpret_cast<Sum*>(outs[s]) + line * neurons;
        const Sum* const from = reinterpret_cast<const Sum*>(sums);
        for (std::int64_t j = 0; j < std::min(neurons, a.neurons - line * neurons); ++j) {
          out[j] += from[a.dtype == Dtype::kBf16 ? j % 2 * (neurons / 2) + j / 2 : j];
        }
      }
    }
  }
};

}  // namespace

void neuron_attribution(const NeuronArguments& a) {
  const Call call(a);
  if (a.count) *a.count += static_cast<std::int64_t>(call.tokens.size());
  if (call.tokens.empty()) return;
  const std::int64_t lines = (a.neurons + call.neurons - 1) / call.neurons;
  const std::int64_t threads = openmp_threads();
  const std::int64_t most = std::min(kMostLines, std::max(kLeastLines, (lines + threads - 1) / threads));
  const std::int64_t strips = (lines + most - 1) / most;
  std::vector<CacheLine> sums(static_cast<std::size_t>(lines * call.n_outs * call.wide));
  parallel_for(strips, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t s = begin; s < end; ++s) {
      const std::int64_t first = lines * s / strips, last = lines * (s + 1) / strips;
      CacheLine* const own = sums.data() + first * call.n_outs * call.wide;
      call.add_strip(first, last, own);
      a.dtype == Dtype::kF64 ? call.hand_out<double>(first, last, own) : call.hand_out<float>(first, last, own);
    }
  });
}

}  // namespace clue
