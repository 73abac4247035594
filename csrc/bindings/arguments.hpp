// Checks the arguments of the kernels, the same for CPU and CUDA, and turns them into views. Whatever passes here is
// safe to run: types and shapes fit, memory that is written is nobody else's.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>

#include "attribution/neuron.hpp"
#include "attribution/norm.hpp"
#include "bindings/dlpack.hpp"
#include "update/masked_adamw.hpp"

namespace clue {

struct NamedView {
  const char* name;
  TensorView view;
};

inline std::string shape_of(const TensorView& view) { return describe_shape(view.shape, view.ndim); }

inline void require_dtype(const NamedView& tensor, Dtype dtype) {
  if (tensor.view.dtype != dtype) refuse_type(tensor.name, name_of(dtype), name_of(tensor.view.dtype));
}

inline void require_float(const NamedView& tensor) {
  if (static_cast<int>(tensor.view.dtype) >= kFloatTypes) {
    refuse_type(tensor.name, "bfloat16, float16, float32 or float64",
                std::string(name_of(tensor.view.dtype)) + " type");
  }
}

inline bool has_shape(const TensorView& view, std::initializer_list<std::int64_t> shape) {
  if (view.ndim != static_cast<int>(shape.size())) return false;
  int i = 0;
  for (const std::int64_t size : shape) {
    if (view.shape[i++] != size) return false;
  }
  return true;
}

inline void require_shape(const NamedView& tensor, std::initializer_list<std::int64_t> shape) {
  if (!has_shape(tensor.view, shape)) {
    refuse_value(tensor.name, "shape " + describe_shape(shape.begin(), static_cast<int>(shape.size())),
                 shape_of(tensor.view));
  }
}

inline void require_contiguous(const NamedView& tensor) {
  if (!tensor.view.contiguous()) refuse_value(tensor.name, "contiguous memory", "a strided view");
}

// The loops assume that nothing they write is also something else of theirs.
inline void require_own_memory(std::initializer_list<NamedView> written, std::initializer_list<NamedView> others) {
  for (const NamedView* a = written.begin(); a != written.end(); ++a) {
    for (const NamedView* b = a + 1; b != written.end(); ++b) {
      if (a->view.overlaps(b->view)) refuse_value(b->name, "memory of its own", std::string("that of ") + a->name);
    }
    for (const NamedView& b : others) {
      if (a->view.overlaps(b.view)) refuse_value(b.name, "memory of its own", std::string("that of ") + a->name);
    }
  }
}

inline NormArguments norm_arguments(Borrower& borrower, py::handle grad_object,
                                    const std::optional<py::object>& normal_object, py::handle scale_object,
                                    const std::optional<py::object>& gain_object, bool centre) {
  const NamedView grad{"grad", borrower.borrow(grad_object, "grad", Access::kWrite)};
  const NamedView scale{"scale", borrower.borrow(scale_object, "scale", Access::kRead)};
  const TensorView& g = grad.view;
  if (g.dtype != Dtype::kF32 && g.dtype != Dtype::kF64) refuse_type("grad", "float32 or float64", name_of(g.dtype));
  if (g.ndim != 2) refuse_value("grad", "shape [readers * tokens, width]", shape_of(g));
  require_contiguous(grad);
  if (scale.view.ndim != 1) refuse_value("scale", "shape [tokens]", shape_of(scale.view));
  NormArguments arguments{};
  arguments.tokens = scale.view.shape[0];
  arguments.rows = g.shape[0];
  arguments.width = g.shape[1];
  if (arguments.tokens ? arguments.rows % arguments.tokens : arguments.rows) {
    refuse_value("grad", "a multiple of " + std::to_string(arguments.tokens) + " rows, the tokens of scale",
                 std::to_string(arguments.rows));
  }
  arguments.grad = g.data;
  arguments.centre = centre;
  arguments.dtype = g.dtype;
  const auto read = [&](const NamedView& tensor, std::initializer_list<std::int64_t> shape) {
    require_dtype(tensor, g.dtype);
    require_shape(tensor, shape);
    require_contiguous(tensor);
    require_own_memory({grad}, {tensor});
    return tensor.view.data;
  };
  arguments.scale = read(scale, {arguments.tokens});
  if (normal_object) {
    arguments.normal =
        read({"normal", borrower.borrow(*normal_object, "normal", Access::kRead)}, {arguments.tokens, arguments.width});
  }
  if (gain_object) {
    arguments.gain = read({"gain", borrower.borrow(*gain_object, "gain", Access::kRead)}, {arguments.width});
  }
  return arguments;
}

// The optional arguments come as three: Dn with its gradient, the squares of every score there is, and the count.
inline NeuronArguments neuron_arguments(Borrower& borrower, py::handle clean, py::handle corrupted,
                                        py::handle grad_clean, py::handle grad_corrupted, py::handle out_ns,
                                        py::handle out_dn, py::handle out_sq_ns, py::handle out_sq_dn, py::handle mask,
                                        py::handle out_count) {
  const auto borrow = [&borrower](py::handle object, const char* name, Access access) {
    NamedView found{name, {}};
    if (object.is_none()) {
      found.view.shape[0] = 0;
    } else {
      found.view = borrower.borrow(object, name, access);
    }
    return found;
  };
  const auto require_present = [](const NamedView& tensor, bool wanted, const char* why) {
    if (wanted != (tensor.view.ndim > 0)) {
      refuse_type(tensor.name, std::string(wanted ? "a tensor " : "None ") + why, wanted ? "None" : "a tensor");
    }
  };
  const NamedView inputs[4] = {
      {"clean", borrower.borrow(clean, "clean", Access::kRead)},
      {"corrupted", borrower.borrow(corrupted, "corrupted", Access::kRead)},
      {"grad_clean", borrower.borrow(grad_clean, "grad_clean", Access::kRead)},
      borrow(grad_corrupted, "grad_corrupted", Access::kRead),
  };
  const NamedView sums[4] = {
      {"out_ns", borrower.borrow(out_ns, "out_ns", Access::kWrite)},
      borrow(out_dn, "out_dn", Access::kWrite),
      borrow(out_sq_ns, "out_sq_ns", Access::kWrite),
      borrow(out_sq_dn, "out_sq_dn", Access::kWrite),
  };
  const bool both = inputs[3].view.ndim > 0, squares = sums[2].view.ndim > 0;
  require_present(sums[1], both, both ? "where there is a grad_corrupted" : "without a grad_corrupted");
  require_present(
      sums[3], both && squares,
      both && squares ? "where there are an out_dn and an out_sq_ns" : "without an out_dn and an out_sq_ns");
  const TensorView& first = inputs[0].view;
  require_float(inputs[0]);
  if (first.ndim != 2) refuse_value("clean", "shape [tokens, neurons]", shape_of(first));
  NeuronArguments arguments{};
  arguments.tokens = first.shape[0];
  arguments.neurons = first.shape[1];
  arguments.dtype = first.dtype;
  for (int i = 0; i < (both ? 4 : 3); ++i) {
    require_dtype(inputs[i], first.dtype);
    require_shape(inputs[i], {arguments.tokens, arguments.neurons});
    if (arguments.neurons > 1 && inputs[i].view.strides[1] != 1) {
      refuse_value(inputs[i].name, "neurons next to each other in memory",
                   "stride " + std::to_string(inputs[i].view.strides[1]) + " (pass .contiguous())");
    }
    arguments.inputs[i] = inputs[i].view.data;
    arguments.strides[i] = inputs[i].view.strides[0];
  }
  for (int i = 0; i < 4; ++i) {
    if (sums[i].view.ndim == 0) continue;
    require_dtype(sums[i], first.dtype == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32);
    require_shape(sums[i], {arguments.neurons});
    require_contiguous(sums[i]);
    arguments.sums[i] = sums[i].view.data;
  }
  const NamedView chosen = borrow(mask, "mask", Access::kRead);
  if (chosen.view.ndim > 0) {
    if (chosen.view.dtype != Dtype::kU8 && chosen.view.dtype != Dtype::kBool) {
      refuse_type("mask", "uint8 or bool", name_of(chosen.view.dtype));
    }
    require_shape(chosen, {arguments.tokens});
    arguments.mask = chosen.view.data;
    arguments.mask_stride = chosen.view.strides[0];
  }
  const NamedView count = borrow(out_count, "out_count", Access::kWrite);
  if (count.view.ndim > 0) {
    require_dtype(count, Dtype::kI64);
    require_shape(count, {1});
    arguments.count = reinterpret_cast<std::int64_t*>(count.view.data);
  }
  require_own_memory({sums[0], sums[1], sums[2], sums[3], count}, {inputs[0], inputs[1], inputs[2], inputs[3], chosen});
  return arguments;
}

struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay;
  std::int64_t step;
  double grad_scale;
};

inline AdamWConstants adamw_constants(const AdamWOptions& o) {
  const auto require = [](bool ok, const char* name, const char* expected, double actual) {
    if (!ok) refuse_value(name, expected, std::to_string(actual));
  };
  require(o.lr >= 0 && std::isfinite(o.lr), "lr", "a number of at least 0", o.lr);
  require(o.beta1 >= 0 && o.beta1 < 1, "beta1", "a number in [0, 1)", o.beta1);
  require(o.beta2 >= 0 && o.beta2 < 1, "beta2", "a number in [0, 1)", o.beta2);
  require(o.eps >= 0 && std::isfinite(o.eps), "eps", "a number of at least 0", o.eps);
  require(o.weight_decay >= 0 && std::isfinite(o.weight_decay), "weight_decay", "a number of at least 0",
          o.weight_decay);
  require(std::isfinite(o.grad_scale), "grad_scale", "a finite number", o.grad_scale);
  if (o.step < 1) refuse_value("step", "a number of at least 1", std::to_string(o.step));
  const double steps = static_cast<double>(o.step);
  return {1 - o.lr * o.weight_decay,
          1 - o.beta1,
          o.beta2,
          1 - o.beta2,
          o.lr / (1 - std::pow(o.beta1, steps)),
          1 / std::sqrt(1 - std::pow(o.beta2, steps)),
          o.eps,
          o.grad_scale};
}

inline AdamWTypes adamw_types(const NamedView& param, const NamedView& grad) {
  require_float(param);
  const Dtype p = param.view.dtype, g = grad.view.dtype;
  if (g == p) {
    return p == Dtype::kBf16 ? kBf16Bf16 : p == Dtype::kF16 ? kF16F16 : p == Dtype::kF32 ? kF32F32 : kF64F64;
  }
  if (g == Dtype::kF32 && p == Dtype::kBf16) return kBf16F32;
  if (g == Dtype::kF32 && p == Dtype::kF16) return kF16F32;
  const bool half = p == Dtype::kBf16 || p == Dtype::kF16;
  refuse_type(grad.name, std::string(name_of(p)) + (half ? " as param, or float32" : " as param"), name_of(g));
}

inline MaskedAdamWArguments masked_adamw_arguments(Borrower& borrower, py::handle param_object, py::handle grad_object,
                                                   py::handle exp_avg_object, py::handle exp_avg_sq_object,
                                                   py::handle index_object, std::int64_t axis,
                                                   const std::optional<py::object>& master_object,
                                                   const std::optional<std::uint64_t>& rounding_key) {
  const NamedView param{"param", borrower.borrow(param_object, "param", Access::kWrite)};
  const NamedView grad{"grad", borrower.borrow(grad_object, "grad", Access::kRead)};
  const NamedView exp_avg{"exp_avg", borrower.borrow(exp_avg_object, "exp_avg", Access::kWrite)};
  const NamedView exp_avg_sq{"exp_avg_sq", borrower.borrow(exp_avg_sq_object, "exp_avg_sq", Access::kWrite)};
  const NamedView index{"index", borrower.borrow(index_object, "index", Access::kRead)};
  const TensorView &p = param.view, &g = grad.view;
  if (axis < 0 || axis >= p.ndim) {
    refuse_value("axis", p.ndim == 1 ? "0 for a param of one dimension" : "0 (rows) or 1 (columns)",
                 std::to_string(axis));
  }
  const int along = static_cast<int>(axis);
  const int element = 1 - along;  // for one dimension the second has size 1
  for (int i = 0; i < p.ndim; ++i) {
    if (p.shape[i] > 1 && p.strides[i] == 0) refuse_value("param", "memory for every element", "an expanded view");
  }
  MaskedAdamWArguments arguments{};
  arguments.types = adamw_types(param, grad);
  arguments.param_dtype = p.dtype;
  arguments.grad_dtype = g.dtype;
  arguments.bound = p.shape[along];
  arguments.length = p.shape[element];

  require_dtype(index, Dtype::kI64);
  if (index.view.ndim != 1) refuse_value("index", "one dimension", shape_of(index.view));
  require_contiguous(index);
  arguments.slices = index.view.shape[0];
  arguments.index = reinterpret_cast<const std::int64_t*>(index.view.data);

  std::int64_t compact[2] = {p.shape[0], p.shape[1]};
  compact[along] = arguments.slices;
  bool full = g.ndim == p.ndim, small = g.ndim == p.ndim;
  for (int i = 0; i < p.ndim && g.ndim == p.ndim; ++i) {
    full = full && g.shape[i] == p.shape[i];
    small = small && g.shape[i] == compact[i];
  }
  if (!full && !small) {
    refuse_value("grad", "shape " + shape_of(p) + " or, on the slices alone, " + describe_shape(compact, p.ndim),
                 shape_of(g));
  }
  arguments.param = p.data;
  arguments.param_slice = p.strides[along];
  arguments.param_element = p.strides[element];
  arguments.grad = g.data;
  arguments.grad_slice = g.strides[along];
  arguments.grad_element = g.strides[element];
  arguments.grad_compact = !full;

  const Dtype state = p.dtype == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32;
  const auto check_state = [&](const NamedView& tensor) {
    require_dtype(tensor, state);
    if (p.ndim == 1) {
      require_shape(tensor, {arguments.slices});
    } else {
      require_shape(tensor, {arguments.slices, arguments.length});
    }
    require_contiguous(tensor);
    return tensor.view.data;
  };
  arguments.exp_avg = check_state(exp_avg);
  arguments.exp_avg_sq = check_state(exp_avg_sq);
  NamedView master{"master", {}};
  if (master_object) {
    if (p.dtype != Dtype::kBf16 && p.dtype != Dtype::kF16) {
      refuse_type("master", std::string("None for a param in ") + name_of(p.dtype), type_name(*master_object));
    }
    master.view = borrower.borrow(*master_object, "master", Access::kWrite);
    arguments.master = check_state(master);
  } else {
    master.view.shape[0] = 0;
  }
  if (rounding_key) {
    if (p.dtype != Dtype::kBf16) {
      refuse_type("rounding_key", std::string("None for a param in ") + name_of(p.dtype), "a key");
    }
    if (master_object) refuse_value("rounding_key", "None for a param with a master, which loses nothing", "a key");
    arguments.stochastic = true;
    arguments.key = *rounding_key;
  }
  require_own_memory({param, exp_avg, exp_avg_sq, master}, {grad, index});
  return arguments;
}

}  // namespace clue
