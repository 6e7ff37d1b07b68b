// Any processor: what the compiler's own default target vectorises.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#define MOESCALE_ISA generic
#define MOESCALE_VECTOR 16
#include "../include/cpu/isa.h"
