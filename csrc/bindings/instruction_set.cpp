// For `moescale doctor`, read through ctypes.
#include "../include/cpu/kernels.h"

extern "C" __attribute__((visibility("default"))) const char* moescale_instruction_set() { return moescale::instruction_set(); }
