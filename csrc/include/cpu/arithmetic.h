// Element types and exp(), written so that loops over them vectorise. Included inside each instruction set's namespace
// (see isa.h), so that no two translation units share one compiled copy.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace moescale::MOESCALE_ISA {

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void store(float* to, float x) { *to = x; }
inline void store(double* to, double x) { *to = x; }
// Round to nearest, ties to even; a NaN stays one.
inline void store(Bf16* to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40);
}

// e^x to 2 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial of degree 6 in r (Cephes), and n put into the
// exponent. x is clamped to +-64, where a sigmoid or a probability has long become 0 or 1 (e^-64 = 1.6e-28): products
// with what lies further out would be subnormal numbers, which cost a hundred cycles each.
inline float fast_exp(float x) {
  x = x < -64.0f ? -64.0f : x;
  x = x > 64.0f ? 64.0f : x;
  constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const float shifted = x * 1.44269504f + to_integer;
  const float n = shifted - to_integer;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const uint32_t power_bits = (bits + 127) << 23;
  float power;
  std::memcpy(&power, &power_bits, sizeof power);
  return p * power;
}
inline double fast_exp(double x) { return std::exp(x); }

template <class S>
inline S sigmoid(S x) {
  return S(1) / (S(1) + fast_exp(-x));
}

// Reductions in kLanes partial results: their order is fixed by the code, not by the width of the vector unit.
constexpr int kLanes = 32;

// Calls body(place, lane) for each place < count. The inner loop has a fixed length, so that compilers unroll it into
// whole vectors; what the body writes must not be what it reads at another place.
template <class Body>
inline void for_each_place(int64_t count, const Body& body) {
  int64_t first = 0;
  for (; first + kLanes <= count; first += kLanes) {
#pragma GCC ivdep
    for (int i = 0; i < kLanes; ++i) body(first + i, i);
  }
  for (int i = 0; first + i < count; ++i) body(first + i, i);
}

template <class S>
inline S sum_lanes(const S (&lanes)[kLanes]) {
  S total = 0;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

// The sum over i < count of term(i).
template <class S, class Term>
inline S sum_over(int64_t count, const Term& term) {
  S lanes[kLanes] = {};
  for_each_place(count, [&](int64_t place, int lane) { lanes[lane] += term(place); });
  return sum_lanes(lanes);
}

// The largest of `count` values; NaNs lose. -infinity where there is none.
template <class S>
inline S largest_of(const S* values, int64_t count) {
  S lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = -std::numeric_limits<S>::infinity();
  for_each_place(count, [&](int64_t place, int lane) {
    lanes[lane] = values[place] > lanes[lane] ? values[place] : lanes[lane];
  });
  for (int i = 1; i < kLanes; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}

// Where the largest of `count` values stands, the first of equal ones; NaNs lose. -1 where all are -infinity.
template <class S>
inline int64_t place_of_largest(const S* values, int64_t count) {
  S lanes[kLanes];
  int32_t places[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = -std::numeric_limits<S>::infinity(), places[i] = -1;
  for_each_place(count, [&](int64_t place, int lane) {
    const bool larger = values[place] > lanes[lane];
    lanes[lane] = larger ? values[place] : lanes[lane];
    places[lane] = larger ? static_cast<int32_t>(place) : places[lane];
  });
  int best = 0;
  for (int i = 1; i < kLanes; ++i) {
    const bool earlier = lanes[i] == lanes[best] && places[i] >= 0 && places[i] < places[best];
    if (lanes[i] > lanes[best] || earlier) best = i;
  }
  return places[best];
}

}  // namespace moescale::MOESCALE_ISA
