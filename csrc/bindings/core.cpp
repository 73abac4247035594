// The module clue._core: one register function per area, nothing else.
#include <pybind11/pybind11.h>

void register_logic(pybind11::module_& module);
void register_kernels(pybind11::module_& module);
void register_sat(pybind11::module_& module);

PYBIND11_MODULE(_core, module) {
  module.doc() = "CLUE's native core: the logic of circuits, and the CPU kernels.";
  register_logic(module);
  register_kernels(module);
  register_sat(module);
}
