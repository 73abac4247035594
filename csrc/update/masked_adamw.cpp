#include "update/masked_adamw.hpp"

#include <algorithm>

#include "parallel.hpp"

namespace clue {
namespace {

constexpr std::int64_t kGrain = 1 << 14;  // elements worth a thread
constexpr std::int64_t kChunk = 1 << 8;   // elements of a row that go to one leaf call
constexpr std::int64_t kAhead = 2;        // chunks between the one that is fetched and the one that is updated
constexpr std::int64_t kLine = 64;        // bytes
// A tile of columns. Rows are often a power of two apart, so that a column's lines fall into few sets of each cache:
// few columns and many rows were measured best, in float32 on Zen 4 (32 x 64: 1.25 times slower).
constexpr std::int64_t kTileSlices = 16;
constexpr std::int64_t kTileLength = 128;

struct Step {
  const MaskedAdamWArguments& a;
  const AdamWConstants& constants;
  const AdamWLeaf leaf = kernels().adamw[a.types];
  const std::int64_t param_item = item_size(a.param_dtype), grad_item = item_size(a.grad_dtype);
  const std::int64_t state_item = a.param_dtype == Dtype::kF64 ? 8 : 4;

  char* param(std::int64_t slice, std::int64_t element) const {
    return a.param + (a.index[slice] * a.param_slice + element * a.param_element) * param_item;
  }

  const char* grad(std::int64_t slice, std::int64_t element) const {
    const std::int64_t place = a.grad_compact ? slice : a.index[slice];
    return a.grad + (place * a.grad_slice + element * a.grad_element) * grad_item;
  }

  void update(char* p, const char* g, std::int64_t slice, std::int64_t element, std::int64_t count) const {
    const std::int64_t offset = (slice * a.length + element) * state_item;
    char* const master = a.master ? a.master + offset : nullptr;
    const RoundingKey random = a.stochastic ? rounding_key(a.key, a.index[slice]) : RoundingKey{};
    leaf(p, g, a.exp_avg + offset, a.exp_avg_sq + offset, master, count, constants, a.stochastic ? &random : nullptr,
         element);
  }

  // The processor fetches ahead within a row, but cannot know which row is next.
  static void fetch(const char* begin, std::int64_t bytes) {
    for (std::int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(begin + at, 1);
  }

  // Slices whose elements are next to each other: straight through.
  void along() const {
    const std::int64_t chunks = (a.length + kChunk - 1) / kChunk;
    const std::int64_t grain = std::max<std::int64_t>(1, kGrain / std::min(a.length, kChunk));
    parallel_for(a.slices * chunks, grain, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t item = first; item < last; ++item) {
        if (const std::int64_t next = item + kAhead; next < last) {
          const std::int64_t slice = next / chunks, element = next % chunks * kChunk;
          const std::int64_t count = std::min(kChunk, a.length - element);
          fetch(param(slice, element), count * param_item);
          if (!a.grad_compact) fetch(grad(slice, element), count * grad_item);
        }
        const std::int64_t slice = item / chunks, element = item % chunks * kChunk;
        update(param(slice, element), grad(slice, element), slice, element, std::min(kChunk, a.length - element));
      }
    });
  }

  // Slices whose elements lie apart: a tile at a time is turned, updated along its slices, and turned back. Walking a
  // tile across its slices takes what it can from each cache line of the parameter. A gradient kept slices first is
  // used where it is.
  template <class P, class G>
  void across() const {
    const std::int64_t tiles = (a.length + kTileLength - 1) / kTileLength;
    const std::int64_t grain = std::max<std::int64_t>(1, kGrain / (kTileLength * a.slices));
    parallel_for(tiles, grain, [&](std::int64_t first, std::int64_t last) {
      alignas(64) P p[kTileSlices][kTileLength];
      alignas(64) G g[kTileLength];
      for (std::int64_t tile = first; tile < last; ++tile) {
        const std::int64_t element = tile * kTileLength, count = std::min(kTileLength, a.length - element);
        for (std::int64_t slice = 0; slice < a.slices; slice += kTileSlices) {
          const std::int64_t together = std::min(kTileSlices, a.slices - slice);
          for (std::int64_t e = 0; e < count; ++e) {
            const P* const from = reinterpret_cast<const P*>(a.param) + (element + e) * a.param_element;
            for (std::int64_t s = 0; s < together; ++s) p[s][e] = from[a.index[slice + s] * a.param_slice];
          }
          for (std::int64_t s = 0; s < together; ++s) {
            const char* gradient = grad(slice + s, element);
            if (a.grad_element != 1) {
              const G* const from = reinterpret_cast<const G*>(gradient);
              for (std::int64_t e = 0; e < count; ++e) g[e] = from[e * a.grad_element];
              gradient = reinterpret_cast<const char*>(g);
            }
            update(reinterpret_cast<char*>(p[s]), gradient, slice + s, element, count);
          }
          for (std::int64_t e = 0; e < count; ++e) {
            P* const to = reinterpret_cast<P*>(a.param) + (element + e) * a.param_element;
            for (std::int64_t s = 0; s < together; ++s) to[a.index[slice + s] * a.param_slice] = p[s][e];
          }
        }
      }
    });
  }
};

}  // namespace

void masked_adamw(const MaskedAdamWArguments& a, const AdamWConstants& constants) {
  if (a.slices == 0 || a.length == 0) return;
  const Step step{a, constants};
  if (a.length == 1 || (a.param_element == 1 && a.grad_element == 1)) {
    step.along();
  } else if (a.param_dtype == Dtype::kF64) {
    step.across<double, double>();
  } else if (a.param_dtype == Dtype::kF32) {
    step.across<float, float>();
  } else if (a.grad_dtype == Dtype::kF32) {
    step.across<std::uint16_t, float>();
  } else {
    step.across<std::uint16_t, std::uint16_t>();
  }
}

}  // namespace clue
