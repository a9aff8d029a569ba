// Kernels for any machine.
#define JMOE_ISA portable
#define JMOE_ISA_NAME "portable"
#define JMOE_TABLE kernels_portable
#include "simd_portable.h"

#include "isa_table.inl"
