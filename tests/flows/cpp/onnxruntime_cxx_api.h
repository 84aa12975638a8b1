// Stands in for ONNX Runtime's C++ header where a test has none: the part of it that a model's page uses, with the
// signatures of the real one. It computes nothing; it tells on standard output what it was given.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iostream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define ORT_TSTR(text) text

struct OrtAllocator {};

namespace Ort {

struct Float16_t {
  explicit Float16_t(float) {}
  Float16_t() = default;
  std::uint16_t val = 0;
};

struct BFloat16_t {
  explicit BFloat16_t(float) {}
  BFloat16_t() = default;
  std::uint16_t val = 0;
};

struct Env {};
struct SessionOptions {};

struct RunOptions {
  explicit RunOptions(std::nullptr_t) {}
};

struct AllocatorWithDefaultOptions {
  operator OrtAllocator*() { return &allocator_; }

 private:
  OrtAllocator allocator_;
};

struct TensorTypeAndShapeInfo {
  std::vector<std::int64_t> GetShape() const { return shape; }
  std::size_t GetElementCount() const {
    std::size_t product = 1;
    for (auto size : shape) product *= static_cast<std::size_t>(size);
    return product;
  }
  std::vector<std::int64_t> shape;
};

template <typename T>
std::string name_of() {
  if (std::is_same_v<T, bool>) return "bool";
  if (std::is_same_v<T, Float16_t>) return "float16";
  const std::string bits = std::to_string(8 * sizeof(T));
  if (std::is_floating_point_v<T>) return "float" + bits;
  return (std::is_signed_v<T> ? "int" : "uint") + bits;
}

struct Value {
  template <typename T>
  static Value CreateTensor(OrtAllocator*, const std::int64_t* shape, std::size_t shape_len) {
    Value made;
    made.info_.shape.assign(shape, shape + shape_len);
    made.data_.resize(made.info_.GetElementCount() * sizeof(T));
    made.told = name_of<T>() + "\t";
    for (auto size : made.info_.shape) made.told += std::to_string(size) + " ";
    return made;
  }
  Value(Value&&) = default;
  Value(const Value&) = delete;
  template <typename T>
  T* GetTensorMutableData() {
    return reinterpret_cast<T*>(data_.data());
  }
  TensorTypeAndShapeInfo GetTensorTypeAndShapeInfo() const { return info_; }
  std::string told;

 private:
  Value() = default;
  TensorTypeAndShapeInfo info_;
  std::vector<unsigned char> data_;
};

struct Session {
  Session(const Env&, const char* path, const SessionOptions&) { std::cout << "model\t" << path << "\n"; }
  std::vector<Value> Run(const RunOptions&, const char* const* inputs, const Value* values, std::size_t count,
                         const char* const* outputs, std::size_t output_count) {
    for (std::size_t at = 0; at < count; ++at) std::cout << "input\t" << inputs[at] << "\t" << values[at].told << "\n";
    for (std::size_t at = 0; at < output_count; ++at) std::cout << "output\t" << outputs[at] << "\n";
    return {};
  }
};

}  // namespace Ort
