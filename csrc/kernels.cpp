// The leaf loops, compiled once per instruction set with CLUE_ISA naming the set
// (CLUE_ISA_NAME is its name for people). Nothing here may have external
// linkage but the table, and no standard template may be used: the linker keeps one copy of an inline function, and it
// could be the one with instructions that this processor lacks.
#include "isa.hpp"

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

// The loops are functions of their own because gcc vectorises them badly once they are inlined into their callers.
template <class T, class Sum>
[[gnu::noinline]] void one_token(const T* __restrict clean, const T* __restrict corrupted,
                                 const T* __restrict grad_clean, const T* __restrict grad_corrupted, Sum* __restrict ns,
                                 Sum* __restrict dn, Sum* __restrict sq_ns, Sum* __restrict sq_dn, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const Sum difference = load(corrupted[i]) - load(clean[i]);
    const Sum noising = difference * load(grad_clean[i]), denoising = difference * load(grad_corrupted[i]);
    ns[i] += noising;
    dn[i] += denoising;
    sq_ns[i] += noising * noising;
    sq_dn[i] += denoising * denoising;
  }
}

// Two tokens at once halve the traffic of the sums; more would run out of registers for the pointers.
template <class T, class Sum>
[[gnu::noinline]] void two_tokens(const T* __restrict clean0, const T* __restrict corrupted0,
                                  const T* __restrict grad_clean0, const T* __restrict grad_corrupted0,
                                  const T* __restrict clean1, const T* __restrict corrupted1,
                                  const T* __restrict grad_clean1, const T* __restrict grad_corrupted1,
                                  Sum* __restrict ns, Sum* __restrict dn, Sum* __restrict sq_ns, Sum* __restrict sq_dn,
                                  std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const Sum difference0 = load(corrupted0[i]) - load(clean0[i]);
    const Sum difference1 = load(corrupted1[i]) - load(clean1[i]);
    const Sum noising0 = difference0 * load(grad_clean0[i]), denoising0 = difference0 * load(grad_corrupted0[i]);
    const Sum noising1 = difference1 * load(grad_clean1[i]), denoising1 = difference1 * load(grad_corrupted1[i]);
    ns[i] += noising0 + noising1;
    dn[i] += denoising0 + denoising1;
    sq_ns[i] += noising0 * noising0 + noising1 * noising1;
    sq_dn[i] += denoising0 * denoising0 + denoising1 * denoising1;
  }
}

template <class T, class Sum>
void neuron_one(const NeuronRow* rows, void* const sums[4], std::int64_t count) {
  const auto at = [rows](int i) { return static_cast<const T*>(rows[0].values[i]); };
  const auto sum = [sums](int i) { return static_cast<Sum*>(sums[i]); };
  one_token<T, Sum>(at(0), at(1), at(2), at(3), sum(0), sum(1), sum(2), sum(3), count);
}

template <class T, class Sum>
void neuron_two(const NeuronRow* rows, void* const sums[4], std::int64_t count) {
  const auto at = [rows](int row, int i) { return static_cast<const T*>(rows[row].values[i]); };
  const auto sum = [sums](int i) { return static_cast<Sum*>(sums[i]); };
  two_tokens<T, Sum>(at(0, 0), at(0, 1), at(0, 2), at(0, 3), at(1, 0), at(1, 1), at(1, 2), at(1, 3), sum(0), sum(1),
                     sum(2), sum(3), count);
}

template <class T>
[[gnu::noinline]] void times(T* __restrict x, const T* __restrict y, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] *= y[i];
}

constexpr int kPartial = 32;  // partial sums of a reduction: fixed, so that every instruction set adds in the same order

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
[[gnu::noinline]] void less_along(T* __restrict x, const T* __restrict y, T along, T mean, T scale, std::int64_t count) {
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
           const AdamWConstants& constants) {
  const Scalars<State> c(constants);
  P* const p = static_cast<P*>(param);
  const G* const g = static_cast<const G*>(grad);
  State *const m = static_cast<State*>(first), *const v = static_cast<State*>(second);
  if (master) {
    adamw_master<P, G, State>(p, g, m, v, static_cast<State*>(master), count, c);
  } else {
    adamw_plain<P, G, State>(p, g, m, v, count, c);
  }
}

}  // namespace

const Kernels CLUE_ISA::table = {
    CLUE_ISA_NAME,
    {neuron_one<Bf16, float>, neuron_one<F16, float>, neuron_one<float, float>, neuron_one<double, double>},
    {neuron_two<Bf16, float>, neuron_two<F16, float>, neuron_two<float, float>, neuron_two<double, double>},
    {adamw<Bf16, Bf16, float>, adamw<Bf16, float, float>, adamw<F16, F16, float>, adamw<F16, float, float>,
     adamw<float, float, float>, adamw<double, double, double>},
    {norm_row<float>, norm_row<double>},
};

}  // namespace clue
