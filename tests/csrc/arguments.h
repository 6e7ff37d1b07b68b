// What the test programs read and write: numbers from the command line, arrays from files of raw elements.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "simt.h"

/// `program FOLDER seed=3 name=number ...`; array `x` is FOLDER/x. Arrays have exactly their size on the heap, so that
/// AddressSanitizer sees every access beyond one; an empty one is null, as torch's are on a GPU.
class Arguments {
 public:
  Arguments(int count, char** values) : folder_(values[1]) {
    for (int i = 2; i < count; ++i) {
      const char* const equals = std::strchr(values[i], '=');
      numbers_[std::string(values[i], equals - values[i])] = std::atof(equals + 1);
    }
    simt::set_seed(integer("seed"));
  }
  ~Arguments() {
    for (const Output& output : outputs_) {
      FILE* const file = std::fopen(path(output.name).c_str(), "wb");
      if (output.bytes != 0) std::fwrite(output.data, 1, output.bytes, file);
      std::fclose(file);
    }
    for (void* const array : arrays_) std::free(array);
  }

  double number(const std::string& name) const { return numbers_.at(name); }
  int64_t integer(const std::string& name) const { return static_cast<int64_t>(number(name)); }

  /// The array in a file, or null where there is no such file.
  template <typename T>
  T* input(const std::string& name) {
    FILE* const file = std::fopen(path(name).c_str(), "rb");
    if (file == nullptr) return nullptr;
    std::fseek(file, 0, SEEK_END);
    const size_t bytes = std::ftell(file);
    std::rewind(file);
    void* const data = allocate(bytes);
    if (bytes != 0 && std::fread(data, 1, bytes, file) != bytes) std::abort();
    std::fclose(file);
    return static_cast<T*>(data);
  }

  /// An array that is written to a file in the end. Filled with what no kernel returns unless `zeroed`.
  template <typename T>
  T* output(const std::string& name, int64_t size, bool zeroed = false) {
    T* const data = scratch<T>(size);
    if (zeroed && size != 0) std::memset(static_cast<void*>(data), 0, size * sizeof(T));
    return written(name, data, size);
  }

  /// An input that the kernel overwrites.
  template <typename T>
  T* overwritten(const std::string& name, int64_t size) {
    return written(name, input<T>(name), size);
  }

  template <typename T>
  T* scratch(int64_t size) {
    void* const data = allocate(size * sizeof(T));
    if (size != 0) std::memset(data, 0xcb, size * sizeof(T));
    return static_cast<T*>(data);
  }

 private:
  struct Output {
    std::string name;
    void* data;
    size_t bytes;
  };

  std::string path(const std::string& name) const { return folder_ + "/" + name; }
  void* allocate(size_t bytes) { return bytes == 0 ? nullptr : arrays_.emplace_back(std::malloc(bytes)); }
  template <typename T>
  T* written(const std::string& name, T* data, int64_t size) {
    outputs_.push_back({name, data, size * sizeof(T)});
    return data;
  }

  std::string folder_;
  std::map<std::string, double> numbers_;
  std::vector<Output> outputs_;
  std::vector<void*> arrays_;
};
