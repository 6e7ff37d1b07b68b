// Weighted sums of rows, a register's width at a time, in the vector types of GCC and clang. MOESCALE_VECTOR is the bytes
// of the instruction set's registers; wider types would be passed in ways that depend on the target.
#pragma once

#include "arithmetic.h"

namespace moescale::MOESCALE_ISA {

constexpr int64_t kVector = MOESCALE_VECTOR;

template <class S>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float type __attribute__((vector_size(kVector)));
};
template <>
struct LanesOf<double> {
  typedef double type __attribute__((vector_size(kVector)));
};
template <class S>
using Lanes = typename LanesOf<S>::type;
typedef uint32_t Words __attribute__((vector_size(kVector)));

// The weighted sum of kVector bytes of rows of T.
template <class T>
struct VectorSum {
  Lanes<T> sum{};

  void add(const T* row, T weight) {
    Lanes<T> values;
    std::memcpy(&values, row, kVector);
    sum += weight * values;
  }
  void save(T* row) const { std::memcpy(row, &sum, kVector); }
};

// Two bf16 share a word: the upper is a float once the lower is cleared, the lower once it is shifted up. So they are
// widened and narrowed without moving anything between lanes.
template <>
struct VectorSum<Bf16> {
  static constexpr uint32_t kUpper = 0xffff0000u;
  Lanes<float> lower{}, upper{};

  void add(const Bf16* row, float weight) {
    Words pairs;
    std::memcpy(&pairs, row, kVector);
    lower += weight * floats(pairs << 16);
    upper += weight * floats(pairs & kUpper);
  }
  void save(Bf16* row) const {
    const Words pairs = (rounded(lower) >> 16) | (rounded(upper) & kUpper);
    std::memcpy(row, &pairs, kVector);
  }

 private:
  static Lanes<float> floats(Words words) {
    Lanes<float> values;
    std::memcpy(&values, &words, kVector);
    return values;
  }
  // As store(Bf16*, float) in arithmetic.h: the upper half of each word is the result.
  static Words rounded(Lanes<float> values) {
    Words bits;
    std::memcpy(&bits, &values, kVector);
    const Words nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Words is_nan = reinterpret_cast<Words>(values != values);
    return (nearest & ~is_nan) | ((bits | 0x400000u) & is_nan);
  }
};

}  // namespace moescale::MOESCALE_ISA
