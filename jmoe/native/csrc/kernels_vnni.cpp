// Kernels for x86 with AVX-512 and its dot products of bytes.
#define JMOE_ISA vnni
#define JMOE_ISA_NAME "vnni"
#define JMOE_TABLE kernels_vnni
#define JMOE_VNNI
#include "simd_avx512.h"

#include "isa_table.inl"
