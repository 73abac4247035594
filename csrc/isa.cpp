#include "isa.hpp"

#include <atomic>

namespace clue {

namespace portable {
extern const Kernels table;
}
#ifdef CLUE_X86_LEVELS
namespace x86_64_v2 {
extern const Kernels table;
}
namespace x86_64_v3 {
extern const Kernels table;
}
namespace x86_64_v4 {
extern const Kernels table;
}
#endif

namespace {

struct Available {
  const Kernels* tables[4] = {&portable::table};
  int count = 1;

  Available() {
#ifdef CLUE_X86_LEVELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v2")) tables[count++] = &x86_64_v2::table;
    if (__builtin_cpu_supports("x86-64-v3")) tables[count++] = &x86_64_v3::table;
    if (__builtin_cpu_supports("x86-64-v4")) tables[count++] = &x86_64_v4::table;
#endif
  }
};

const Available& available() noexcept {
  static const Available found;
  return found;
}

std::atomic<const Kernels*>& current() noexcept {
  static std::atomic<const Kernels*> table{available().tables[available().count - 1]};
  return table;
}

}  // namespace

const Kernels& kernels() noexcept { return *current().load(); }

const Kernels* kernels_at(int i) noexcept { return i < available().count ? available().tables[i] : nullptr; }

void use_kernels(const Kernels& table) noexcept { current() = &table; }

}  // namespace clue
