#include "attribution/norm.hpp"

#include "isa.hpp"
#include "parallel.hpp"

namespace clue {
namespace {

constexpr std::int64_t kGrain = 1 << 14;  // elements that are worth a thread

template <class T>
void rows(const NormArguments& a, NormLeaf leaf) {
  const std::int64_t grain = kGrain / (a.width + 1) + 1;
  parallel_for(a.rows, grain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      const std::int64_t token = row % a.tokens;
      leaf(reinterpret_cast<T*>(a.grad) + row * a.width, a.gain,
           a.normal ? reinterpret_cast<const T*>(a.normal) + token * a.width : nullptr,
           reinterpret_cast<const T*>(a.scale) + token, a.centre, a.width);
    }
  });
}

}  // namespace

void norm_backward(const NormArguments& a) {
  const bool wide = a.dtype == Dtype::kF64;
  const NormLeaf leaf = kernels().norm[wide];
  wide ? rows<double>(a, leaf) : rows<float>(a, leaf);
}

}  // namespace clue
