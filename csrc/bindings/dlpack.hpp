// Borrows tensors of any library from Python through DLPack: the C exchange API where the tensor's type offers it
// (about 0.1 us), else the method __dlpack__. Every refusal reads "<argument>: <expected>, got <actual>".
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "tensor.hpp"

namespace clue {

namespace py = pybind11;

enum class Access { kRead, kWrite };

[[noreturn]] inline void refuse_type(const std::string& name, const std::string& expected, const std::string& actual) {
  throw py::type_error(name + ": " + expected + ", got " + actual);
}

[[noreturn]] inline void refuse_value(const std::string& name, const std::string& expected, const std::string& actual) {
  throw py::value_error(name + ": " + expected + ", got " + actual);
}

[[noreturn]] inline void refuse_buffer(const std::string& name, const std::string& expected,
                                       const std::string& actual) {
  throw py::buffer_error(name + ": " + expected + ", got " + actual);
}

// "torch.Tensor"
inline std::string type_name(py::handle object) {
  const py::object type = py::type::of(object);
  return py::str(type.attr("__module__")).cast<std::string>() + "." +
         py::str(type.attr("__qualname__")).cast<std::string>();
}

inline std::string name_of(dlpack::Device device) {
  if (device.type == dlpack::kCpu || device.type == dlpack::kCudaHost) return "cpu";
  if (device.type == dlpack::kCuda || device.type == dlpack::kCudaManaged) {
    return "cuda:" + std::to_string(device.id);
  }
  return "DLPack device type " + std::to_string(device.type);
}

inline bool on_cpu(dlpack::Device device) { return name_of(device) == "cpu"; }
inline bool on_cuda(dlpack::Device device) {
  return device.type == dlpack::kCuda || device.type == dlpack::kCudaManaged;
}

// Null where there is none.
inline py::object attribute(PyObject* object, PyObject* name) {
  PyObject* const found = PyObject_GetAttr(object, name);
  if (!found) PyErr_Clear();
  return py::reinterpret_steal<py::object>(found);
}

// Borrows the tensors of one call; they stay valid while it lives. On CUDA the first tensor decides device and stream.
class Borrower {
 public:
  enum class Where { kCpu, kCuda };

  explicit Borrower(Where where) : where_(where) {}

  TensorView borrow(py::handle object, const char* name, Access access) {
    // Sharing memory would silently drop both of these; torch is who has them.
    static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
    static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
    if (const py::object found = attribute(object.ptr(), requires_grad); found && py::bool_(found)) {
      refuse_value(name, "a tensor without gradient", "one that requires grad (pass .detach())");
    }
    if (const py::object found = attribute(object.ptr(), is_neg); found && py::bool_(found())) {
      refuse_value(name, "plain memory", "a lazily negated view (pass .resolve_neg())");
    }
    dlpack::Tensor tensor{};
    try {
      if (!borrow_by_api(object, name, tensor)) borrow_by_method(object, name, access, tensor);
    } catch (py::error_already_set& error) {
      if (error.matches(PyExc_KeyboardInterrupt)) throw;
      refuse_buffer(name, "a tensor that shares its memory through DLPack",
                    type_name(object) + ": " + py::str(error.value()).cast<std::string>());
    }
    return view(tensor, object, name);
  }

  dlpack::Device device() const { return device_; }
  void* stream() const { return stream_; }

 private:
  void check_device(const char* name, dlpack::Device device) {
    if (where_ == Where::kCpu) {
      if (!on_cpu(device)) refuse_type(name, "a tensor on the cpu", "one on " + name_of(device));
      return;
    }
    if (!on_cuda(device)) refuse_type(name, "a tensor on a cuda device", "one on " + name_of(device));
    if (started_ && device.id != device_.id) {
      refuse_type(name, "a tensor on " + name_of(device_) + " as the first argument", "one on " + name_of(device));
    }
  }

  bool borrow_by_api(py::handle object, const char* name, dlpack::Tensor& tensor) {
    static PyObject* const attribute_name = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
    const py::object capsule = attribute(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())), attribute_name);
    if (!capsule || !PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return false;
    auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (api && api->version.major != 1) api = api->previous;
    if (!api || !api->borrow) return false;
    if (api->borrow(object.ptr(), &tensor) != 0) throw py::error_already_set();
    check_device(name, tensor.device);
    if (where_ == Where::kCuda && !started_) {
      if (api->current_stream(tensor.device.type, tensor.device.id, &stream_) != 0) throw py::error_already_set();
      start(tensor.device);
    }
    return true;
  }

  void borrow_by_method(py::handle object, const char* name, Access access, dlpack::Tensor& tensor) {
    if (!py::hasattr(object, "__dlpack__") || !py::hasattr(object, "__dlpack_device__")) {
      refuse_type(name, "a tensor (torch, NumPy or another with __dlpack__)", type_name(object));
    }
    const auto place = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
    const dlpack::Device device{place.first, place.second};
    check_device(name, device);
    py::dict options;
    if (where_ == Where::kCuda) {
      if (!started_) start_by_method(object, device);
      // The producer makes this stream wait for its own; the numbers 1 and 2 are the two default streams.
      options["stream"] = stream_ ? reinterpret_cast<std::intptr_t>(stream_) : 1;
    }
    py::object capsule;
    try {
      options["max_version"] = py::make_tuple(1, 1);
      capsule = object.attr("__dlpack__")(**options);
    } catch (py::error_already_set& error) {  // from before DLPack 1.0
      if (!error.matches(PyExc_TypeError)) throw;
      options.attr("pop")("max_version");
      capsule = object.attr("__dlpack__")(**options);
    }
    // The capsule is kept and not renamed: it frees what it holds when the call is over.
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
      const auto* managed =
          static_cast<dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
      if (managed->version.major != 1) {
        refuse_buffer(name, "DLPack version 1", "version " + std::to_string(managed->version.major));
      }
      if (access == Access::kWrite && (managed->flags & dlpack::kReadOnly)) {
        refuse_buffer(name, "writable memory", "a read-only tensor");
      }
      if (access == Access::kWrite && (managed->flags & dlpack::kIsCopied)) {
        refuse_buffer(name, "the tensor's own memory", "a copy");
      }
      tensor = managed->tensor;
    } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
      tensor = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor;
    } else {
      refuse_type(name, "a DLPack capsule from __dlpack__", type_name(capsule));
    }
    capsules_.push_back(std::move(capsule));
  }

  // torch before it had the exchange API still tells its current stream; others get the legacy default stream.
  void start_by_method(py::handle object, dlpack::Device device) {
    const py::dict modules = py::module_::import("sys").attr("modules");
    if (modules.contains("torch") && py::isinstance(object, modules["torch"].attr("Tensor"))) {
      const py::object current = modules["torch"].attr("cuda").attr("current_stream")(device.id);
      stream_ = reinterpret_cast<void*>(current.attr("cuda_stream").cast<std::intptr_t>());
    }
    start(device);
  }

  void start(dlpack::Device device) {
    started_ = true;
    device_ = device;
  }

  static TensorView view(const dlpack::Tensor& tensor, py::handle object, const char* name) {
    if (tensor.ndim < 1 || tensor.ndim > TensorView::kMaxDimensions) {
      refuse_value(name, "1 or 2 dimensions", std::to_string(tensor.ndim));
    }
    TensorView found;
    found.ndim = tensor.ndim;
    found.dtype = dtype_of(tensor.dtype);
    found.device = tensor.device;
    std::int64_t contiguous = 1;
    for (int i = tensor.ndim - 1; i >= 0; --i) {
      found.shape[i] = tensor.shape[i];
      found.strides[i] = tensor.strides ? tensor.strides[i] : contiguous;
      contiguous *= tensor.shape[i];
    }
    if (!tensor.data && found.size() > 0) {
      refuse_type(name, "a tensor with memory", type_name(object) + " without (fake, meta or a wrapper)");
    }
    found.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    if (found.size() > 0 && reinterpret_cast<std::uintptr_t>(found.data) % item_size(found.dtype) != 0) {
      refuse_value(name, "memory aligned to its elements", "unaligned memory (pass a copy)");
    }
    return found;
  }

  Where where_;
  bool started_ = false;
  dlpack::Device device_{dlpack::kCpu, 0};
  void* stream_ = nullptr;
  std::vector<py::object> capsules_;
};

}  // namespace clue
