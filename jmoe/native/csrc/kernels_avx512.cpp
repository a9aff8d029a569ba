// Kernels for x86 with AVX-512 (F, BW, DQ, VL).
#define JMOE_ISA avx512
#define JMOE_ISA_NAME "avx512"
#define JMOE_TABLE kernels_avx512
#include "simd_avx512.h"

#include "isa_table.inl"
