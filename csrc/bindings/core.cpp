// The module clue._core: one register function per area, nothing else.
#include <pybind11/pybind11.h>

void register_logic(pybind11::module_ &module);
#ifdef CLUE_KERNELS
void register_kernels(pybind11::module_ &module);
#endif

PYBIND11_MODULE(_core, module) {
  module.doc() = "CLUE's native core: the logic of circuits, and the CPU kernels.";
  register_logic(module);
#ifdef CLUE_KERNELS
  register_kernels(module);
#endif
}
