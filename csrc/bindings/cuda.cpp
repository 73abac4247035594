// The module clue._cuda: the kernels of clue._core for CUDA tensors, on the caller's stream. It imports without a GPU.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/arguments.hpp"

namespace py = pybind11;

namespace {

void neuron_attribution(const py::object& clean, const py::object& corrupted, const py::object& grad_clean,
                        const py::object& grad_corrupted, const py::object& out_ns, const py::object& out_dn,
                        const py::object& out_sq_ns, const py::object& out_sq_dn, const py::object& mask,
                        const py::object& out_count) {
  clue::Borrower borrower(clue::Borrower::Where::kCuda);
  const clue::NeuronArguments arguments = clue::neuron_arguments(borrower, clean, corrupted, grad_clean, grad_corrupted,
                                                                 out_ns, out_dn, out_sq_ns, out_sq_dn, mask, out_count);
  const py::gil_scoped_release release;
  clue::neuron_attribution_cuda(arguments, borrower.device().id, borrower.stream());
}

void norm_backward(const py::object& grad, const std::optional<py::object>& normal, const py::object& scale,
                   const std::optional<py::object>& gain, bool centre) {
  clue::Borrower borrower(clue::Borrower::Where::kCuda);
  const clue::NormArguments arguments = clue::norm_arguments(borrower, grad, normal, scale, gain, centre);
  const py::gil_scoped_release release;
  clue::norm_backward_cuda(arguments, borrower.device().id, borrower.stream());
}

void masked_adamw(const py::object& param, const py::object& grad, const py::object& exp_avg,
                  const py::object& exp_avg_sq, const py::object& index, std::int64_t axis, double lr, double beta1,
                  double beta2, double eps, double weight_decay, std::int64_t step, double grad_scale,
                  const std::optional<py::object>& master, const std::optional<std::uint64_t>& rounding_key) {
  const clue::AdamWConstants constants = clue::adamw_constants({lr, beta1, beta2, eps, weight_decay, step, grad_scale});
  clue::Borrower borrower(clue::Borrower::Where::kCuda);
  const clue::MaskedAdamWArguments arguments =
      clue::masked_adamw_arguments(borrower, param, grad, exp_avg, exp_avg_sq, index, axis, master, rounding_key);
  const py::gil_scoped_release release;
  clue::masked_adamw_cuda(arguments, constants, borrower.device().id, borrower.stream());
}

// No driver and no device both mean that there is none to use.
int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // clears it, so that no later launch is blamed
  return 0;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  using namespace py::literals;
  module.doc() = "CLUE's CUDA kernels.";
  module.def("neuron_attribution", neuron_attribution, "clean"_a, "corrupted"_a, "grad_clean"_a, "grad_corrupted"_a,
             "out_ns"_a, "out_dn"_a = py::none(), "out_sq_ns"_a = py::none(), "out_sq_dn"_a = py::none(),
             "mask"_a = py::none(), "out_count"_a = py::none(),
             "Add every neuron's noising and denoising terms, and their squares, over tokens to up to four sums.");
  module.def("norm_backward", norm_backward, "grad"_a, "normal"_a, "scale"_a, "gain"_a, "centre"_a,
             "Pull gradients at a norm's output back to its input, in place.");
  module.def("masked_adamw", masked_adamw, "param"_a, "grad"_a, "exp_avg"_a, "exp_avg_sq"_a, "index"_a, "axis"_a,
             py::kw_only(), "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "step"_a, "grad_scale"_a,
             "master"_a = py::none(), "rounding_key"_a = py::none(),
             "One AdamW step on some rows or columns of a parameter, in place.");
  module.def("device_count", device_count, "CUDA devices this process can use; 0 without a driver.");
}
