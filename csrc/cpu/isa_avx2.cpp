// x86-64 with AVX2 and FMA.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#define MOESCALE_ISA avx2
#define MOESCALE_VECTOR 32
// Behind the standard headers, so that none of their functions is compiled for processors that may not be there.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
#include "../include/cpu/isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
