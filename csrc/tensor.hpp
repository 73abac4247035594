// Tensors as the native core sees them: a pointer, a shape, strides, a dtype and a device, borrowed through DLPack.
// The ABI is declared from the DLPack 1.x specification (https://dmlc.github.io/dlpack/latest/c_api.html), so that no
// tensor library is needed to build. Nothing here owns memory or knows Python.
#pragma once

#include <cstdint>
#include <string>

namespace clue {

namespace dlpack {

struct Version {
  std::uint32_t major, minor;
};

struct Device {
  std::int32_t type, id;
};

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null means contiguous before DLPack 1.2
  std::uint64_t byte_offset;
};

struct ManagedTensor {  // before DLPack 1.0
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

struct ManagedTensorVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedTensorVersioned*);
  std::uint64_t flags;
  Tensor tensor;
};

constexpr std::uint64_t kReadOnly = 1, kIsCopied = 2;

// The function table a tensor type offers as the capsule __dlpack_c_exchange_api__ (DLPack 1.2).
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  int (*allocate)(Tensor*, ManagedTensorVersioned**, void*, void (*)(void*, const char*, const char*));
  int (*export_managed)(void*, ManagedTensorVersioned**);
  int (*import_managed)(ManagedTensorVersioned*, void**);
  int (*borrow)(void*, Tensor*);  // null where the producer cannot
  int (*current_stream)(std::int32_t, std::int32_t, void**);
};

constexpr std::int32_t kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13;
constexpr std::uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6;

}  // namespace dlpack

// The element types the kernels know; the order of the floating ones indexes the kernel tables.
enum class Dtype : std::uint8_t { kBf16, kF16, kF32, kF64, kI64, kU8, kBool, kOther };
constexpr int kFloatTypes = 4;

constexpr std::int64_t item_size(Dtype dtype) {
  constexpr std::int64_t sizes[] = {2, 2, 4, 8, 8, 1, 1, 1};
  return sizes[static_cast<int>(dtype)];
}

constexpr const char* name_of(Dtype dtype) {
  constexpr const char* names[] = {"bfloat16", "float16", "float32", "float64", "int64", "uint8", "bool", "another"};
  return names[static_cast<int>(dtype)];
}

inline Dtype dtype_of(dlpack::DataType type) {
  if (type.lanes != 1) return Dtype::kOther;
  if (type.code == dlpack::kBfloat && type.bits == 16) return Dtype::kBf16;
  if (type.code == dlpack::kFloat && type.bits == 16) return Dtype::kF16;
  if (type.code == dlpack::kFloat && type.bits == 32) return Dtype::kF32;
  if (type.code == dlpack::kFloat && type.bits == 64) return Dtype::kF64;
  if (type.code == dlpack::kInt && type.bits == 64) return Dtype::kI64;
  if (type.code == dlpack::kUInt && type.bits == 8) return Dtype::kU8;
  if (type.code == dlpack::kBool && type.bits == 8) return Dtype::kBool;
  return Dtype::kOther;
}

// At most two dimensions: everything the kernels take is a vector or a matrix.
struct TensorView {
  static constexpr int kMaxDimensions = 2;

  char* data = nullptr;
  int ndim = 0;
  std::int64_t shape[kMaxDimensions] = {1, 1};
  std::int64_t strides[kMaxDimensions] = {0, 0};  // in elements
  Dtype dtype = Dtype::kOther;
  dlpack::Device device{dlpack::kCpu, 0};

  std::int64_t size() const { return shape[0] * shape[1]; }

  bool contiguous() const {
    std::int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] > 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }

  // Whether the memory that the two views span has a byte in common.
  bool overlaps(const TensorView& other) const {
    return size() > 0 && other.size() > 0 && first() < other.last() && other.first() < last();
  }

 private:
  std::intptr_t first() const { return reach(false); }
  std::intptr_t last() const { return reach(true) + static_cast<std::intptr_t>(item_size(dtype)); }
  std::intptr_t reach(bool up) const {
    std::int64_t offset = 0;
    for (int i = 0; i < ndim; ++i) {
      if ((strides[i] > 0) == up) offset += (shape[i] - 1) * strides[i];
    }
    return reinterpret_cast<std::intptr_t>(data) + static_cast<std::intptr_t>(offset * item_size(dtype));
  }
};

// "[3, 4]"
inline std::string describe_shape(const std::int64_t* shape, int ndim) {
  std::string text = "[";
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace clue
