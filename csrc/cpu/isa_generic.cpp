// Any processor: what the compiler's own default target vectorises.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#define MOESCALE_ISA generic
#include "../include/cpu/isa.h"
