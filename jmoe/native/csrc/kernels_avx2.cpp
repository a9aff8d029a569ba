// Kernels for x86 with AVX2 and FMA.
#define JMOE_ISA avx2
#define JMOE_ISA_NAME "avx2"
#define JMOE_TABLE kernels_avx2
#include "simd_avx2.h"

#include "isa_table.inl"
