// The leaf loops, compiled once per instruction set with CLUE_ISA naming the set
// (CLUE_ISA_NAME is its name for people). Nothing here may have external
// linkage but the table, and no standard template may be used: the linker keeps one copy of an inline function, and it
// could be the one with instructions that this processor lacks.
#include "isa.hpp"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace clue {
namespace CLUE_ISA {
extern const Kernels table;
}

namespace {

struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

inline std::uint32_t bits_of(float x) { return __builtin_bit_cast(std::uint32_t, x); }
inline float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(Bf16 x) { return float_of(std::uint32_t{x.bits} << 16); }

inline float load(F16 x) {
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  // Shifted into place, the exponent is 112 too small; the product mends that for subnormal numbers too.
  const std::uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
  const std::uint32_t special = (magnitude << 13) | 0x7f800000u;
  return float_of((std::uint32_t{x.bits} & 0x8000u) << 16 | (magnitude >= 0x7c00u ? special : finite));
}

inline void store(float& to, float x) { to = x; }
inline void store(double& to, double x) { to = x; }

// To nearest, ties to even, as torch rounds.
inline void store(Bf16& to, float x) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = static_cast<std::uint16_t>(nan ? 0x7fc0u : rounded);
}

inline void store(F16& to, float x) {
  const std::uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the spacing is 2^-24, which is that of floats in [0.5, 1): the addition rounds.
  const std::uint32_t tiny = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const std::uint32_t half = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? tiny : normal;
  to.bits = static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | half);
}

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

// The widest vectors of the instruction set. Every lane is a neuron's, so their width does not show in the results.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t Words __attribute__((vector_size(kVectorBytes)));

template <class Vector>
inline Vector read(const char* from) {
  Vector found;
  __builtin_memcpy(&found, from, sizeof found);
  return found;
}

// How a cache line of a row is read: vector v of kVectors, in the order of the sums.
template <class T>
struct Line {
  using Vector = Floats;
  static constexpr int kVectors = kNeuronLine / kVectorBytes;
  static Vector at(const char* line, int v) { return read<Floats>(line + v * kVectorBytes); }
};

template <>
struct Line<double> {
  using Vector = Doubles;
  static constexpr int kVectors = kNeuronLine / kVectorBytes;
  static Vector at(const char* line, int v) { return read<Doubles>(line + v * kVectorBytes); }
};

// Two numbers in a word: all the even ones come first, which takes one operation each and no shuffle.
template <>
struct Line<Bf16> {
  using Vector = Floats;
  static constexpr int kVectors = 2 * kNeuronLine / kVectorBytes;
  static Vector at(const char* line, int v) {
    constexpr int kHalf = kVectors / 2;
    const Words words = read<Words>(line + v % kHalf * kVectorBytes);
    return reinterpret_cast<Floats>(v < kHalf ? words << 16 : words & 0xffff0000u);
  }
};

template <>
struct Line<F16> {
  using Vector = Floats;
  static constexpr int kVectors = 2 * kNeuronLine / kVectorBytes;
  static Vector at(const char* line, int v) {
    line += v * kVectorBytes / 2;
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_maskz_cvtph_ps(0xffff, read<__m256i>(line)));
#elif defined(__F16C__)
    return reinterpret_cast<Floats>(_mm256_cvtph_ps(read<__m128i>(line)));
#else
    typedef std::uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    const Words number = __builtin_convertvector(read<Halves>(line), Words),
                magnitude = number & 0x7fffu;  // as load(F16)
    const Words finite = reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude << 13) * 0x1p112f);
    const Words special = reinterpret_cast<Words>(magnitude >= 0x7c00u) & 0x7f800000u;
    return reinterpret_cast<Floats>((number & 0x8000u) << 16 | finite | special);
#endif
  }
};

// A function of its own because gcc makes much slower code of the loop once it is inlined into its callers. Its speed
// is that of reading: the sums of a few tokens meet in registers, since writing them back costs as much as a token.
template <class T, int kGradients, bool kSquares, int kRows>
[[gnu::noinline]] void add_rows(const NeuronRow* rows, typename Line<T>::Vector* __restrict sums, std::int64_t lines) {
  using Vector = typename Line<T>::Vector;
  constexpr int kVectors = Line<T>::kVectors, kSums = kGradients * (kSquares ? 2 : 1);
  NeuronRow row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = rows[r];
  for (std::int64_t at = 0; at < lines * kNeuronLine; at += kNeuronLine, sums += kSums * kVectors) {
    Vector total[kSums][kVectors] = {};
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kVectors; ++i) {
        const int v = i / 2 + i % 2 * (kVectors / 2);  // the two halves of a word one after the other
        const Vector difference = Line<T>::at(row[r].values[1] + at, v) - Line<T>::at(row[r].values[0] + at, v);
        for (int g = 0; g < kGradients; ++g) {
          const Vector term = difference * Line<T>::at(row[r].values[2 + g] + at, v);
          total[g][v] += term;
          if (kSquares) total[kGradients * kSquares + g][v] += term * term;
        }
      }
    }
    for (int s = 0; s < kSums; ++s) {
      for (int v = 0; v < kVectors; ++v) sums[s * kVectors + v] += total[s][v];
    }
  }
}

template <class T, int kGradients, bool kSquares>
void neuron(const NeuronRow* rows, int count, void* sums, std::int64_t lines) {
  static_assert(kNeuronRows == 3);
  const auto total = static_cast<typename Line<T>::Vector*>(sums);
  if (count == 3) {
    add_rows<T, kGradients, kSquares, 3>(rows, total, lines);
  } else if (count == 2) {
    add_rows<T, kGradients, kSquares, 2>(rows, total, lines);
  } else {
    add_rows<T, kGradients, kSquares, 1>(rows, total, lines);
  }
}

template <class T>
[[gnu::noinline]] void times(T* __restrict x, const T* __restrict y, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] *= y[i];
}

constexpr int kPartial =
    32;  // partial sums of a reduction: fixed, so that every instruction set adds in the same order

template <class T>
inline T folded(T* partial) {
  for (int half = kPartial / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) partial[j] += partial[j + half];
  }
  return partial[0];
}

template <class T>
[[gnu::noinline]] T dot(const T* __restrict x, const T* __restrict y, std::int64_t count) {
  T partial[kPartial] = {};
  std::int64_t i = 0;
  for (; i + kPartial <= count; i += kPartial) {
    for (int j = 0; j < kPartial; ++j) partial[j] += x[i + j] * y[i + j];
  }
  for (int j = 0; i + j < count; ++j) partial[j] += x[i + j] * y[i + j];
  return folded(partial);
}

template <class T>
[[gnu::noinline]] T total(const T* __restrict x, std::int64_t count) {
  T partial[kPartial] = {};
  std::int64_t i = 0;
  for (; i + kPartial <= count; i += kPartial) {
    for (int j = 0; j < kPartial; ++j) partial[j] += x[i + j];
  }
  for (int j = 0; i + j < count; ++j) partial[j] += x[i + j];
  return folded(partial);
}

template <class T>
[[gnu::noinline]] void less_along(T* __restrict x, const T* __restrict y, T along, T mean, T scale,
                                  std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] = scale * (x[i] - y[i] * along - mean);
}

template <class T>
[[gnu::noinline]] void less(T* __restrict x, T mean, T scale, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] = scale * (x[i] - mean);
}

template <class T>
void norm_row(void* grad, const void* gain, const void* normal, const void* scale, bool centre, std::int64_t width) {
  T* const x = static_cast<T*>(grad);
  const T* const n = static_cast<const T*>(normal);
  const T factor = *static_cast<const T*>(scale);
  if (gain) times<T>(x, static_cast<const T*>(gain), width);
  const T mean = centre ? total<T>(x, width) / static_cast<T>(width) : T{0};
  if (n) {
    less_along<T>(x, n, dot<T>(x, n, width) / static_cast<T>(width), mean, factor, width);
  } else {
    less<T>(x, mean, factor, width);
  }
}

template <class State>
struct Scalars {
  State decay, one_minus_b1, beta2, one_minus_b2, step_size, second_scale, eps, grad_scale;

  explicit Scalars(const AdamWConstants& c)
      : decay(static_cast<State>(c.decay)),
        one_minus_b1(static_cast<State>(c.one_minus_b1)),
        beta2(static_cast<State>(c.beta2)),
        one_minus_b2(static_cast<State>(c.one_minus_b2)),
        step_size(static_cast<State>(c.step_size)),
        second_scale(static_cast<State>(c.second_scale)),
        eps(static_cast<State>(c.eps)),
        grad_scale(static_cast<State>(c.grad_scale)) {}
};

// AdamW (arXiv 1711.05101) as torch.optim.AdamW orders it: decay, moments, then the step with eps after the root.
template <class State>
inline State step(State value, State grad, State& first, State& second, const Scalars<State>& c) {
  grad *= c.grad_scale;
  value *= c.decay;
  first += c.one_minus_b1 * (grad - first);
  second = c.beta2 * second + c.one_minus_b2 * (grad * grad);
  return value - c.step_size * first / (square_root(second) * c.second_scale + c.eps);
}

template <class P, class G, class State>
[[gnu::noinline]] void adamw_plain(P* __restrict param, const G* __restrict grad, State* __restrict first,
                                   State* __restrict second, std::int64_t count, const Scalars<State> c) {
  for (std::int64_t i = 0; i < count; ++i) {
    store(param[i], step<State>(load(param[i]), load(grad[i]), first[i], second[i], c));
  }
}

template <class G>
[[gnu::noinline]] void adamw_random(Bf16* __restrict param, const G* __restrict grad, float* __restrict first,
                                    float* __restrict second, std::int64_t count, const Scalars<float> c,
                                    const RoundingKey key, const std::uint32_t element) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = step<float>(load(param[i]), load(grad[i]), first[i], second[i], c);
    const std::uint32_t random = rounding_bits(key, element + static_cast<std::uint32_t>(i));
    param[i].bits = rounded_at_random(bits_of(value), random);
  }
}

template <class P, class G, class State>
[[gnu::noinline]] void adamw_master(P* __restrict param, const G* __restrict grad, State* __restrict first,
                                    State* __restrict second, State* __restrict master, std::int64_t count,
                                    const Scalars<State> c) {
  for (std::int64_t i = 0; i < count; ++i) {
    master[i] = step<State>(master[i], load(grad[i]), first[i], second[i], c);
    store(param[i], master[i]);
  }
}

template <class P, class G, class State>
void adamw(void* param, const void* grad, void* first, void* second, void* master, std::int64_t count,
           const AdamWConstants& constants, const RoundingKey* random, std::int64_t element) {
  const Scalars<State> c(constants);
  P* const p = static_cast<P*>(param);
  const G* const g = static_cast<const G*>(grad);
  State *const m = static_cast<State*>(first), *const v = static_cast<State*>(second);
  if constexpr (__is_same(P, Bf16)) {
    if (random) return adamw_random<G>(p, g, m, v, count, c, *random, static_cast<std::uint32_t>(element));
  }
  if (master) {
    adamw_master<P, G, State>(p, g, m, v, static_cast<State*>(master), count, c);
  } else {
    adamw_plain<P, G, State>(p, g, m, v, count, c);
  }
}

}  // namespace

const Kernels CLUE_ISA::table = {
    CLUE_ISA_NAME,
    {{{neuron<Bf16, 1, false>, neuron<F16, 1, false>, neuron<float, 1, false>, neuron<double, 1, false>},
      {neuron<Bf16, 1, true>, neuron<F16, 1, true>, neuron<float, 1, true>, neuron<double, 1, true>}},
     {{neuron<Bf16, 2, false>, neuron<F16, 2, false>, neuron<float, 2, false>, neuron<double, 2, false>},
      {neuron<Bf16, 2, true>, neuron<F16, 2, true>, neuron<float, 2, true>, neuron<double, 2, true>}}},
    {adamw<Bf16, Bf16, float>, adamw<Bf16, float, float>, adamw<F16, F16, float>, adamw<F16, float, float>,
     adamw<float, float, float>, adamw<double, double, double>},
    {norm_row<float>, norm_row<double>},
};

}  // namespace clue
