// What a call hears of Python while it runs without the GIL: signals, and the function that is told of its bounds.
#pragma once

#include <pybind11/pybind11.h>

#include "logic/limits.hpp"

namespace clue {

namespace py = pybind11;

// True when a signal's handler raised; the error is then set.
inline bool signalled() {
  const py::gil_scoped_acquire held;
  return PyErr_CheckSignals() != 0;
}

// Calls a Python function, or nothing for None. What it raises interrupts the search, as a signal does.
inline logic::OnBounds on_bounds_of(const py::object& function) {
  if (function.is_none()) return nullptr;
  return [call = py::handle(function)](std::int64_t lower_bound, std::int64_t cost) {
    const py::gil_scoped_acquire held;
    try {
      call(lower_bound, cost);
    } catch (py::error_already_set& error) {
      error.restore();
      return false;
    }
    return true;
  };
}

// What an interrupted call was interrupted by; None for the others. Clears the error.
inline py::object raised(bool interrupted) {
  if (!interrupted) return py::none();
  const py::error_already_set error;
  if (error.trace()) PyException_SetTraceback(error.value().ptr(), error.trace().ptr());
  return error.value();
}

}  // namespace clue
