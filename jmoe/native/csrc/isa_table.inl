// Everything that is compiled once per instruction set. A file that includes this one defines JMOE_ISA (a namespace)
// and includes a simd_*.h first.
#include "kernels.h"
#include "math.inl"
#include "quant.inl"
#include "dense.inl"
#include "attention.inl"

namespace jmoe {

extern const Kernels JMOE_TABLE;
const Kernels JMOE_TABLE = {
    JMOE_ISA_NAME,
    &JMOE_ISA::quant_rows_bytes,
    &JMOE_ISA::make_quant_rows,
    &JMOE_ISA::quantize_rows,
    &JMOE_ISA::quant_product,
    &JMOE_ISA::dense_product,
    &JMOE_ISA::swiglu,
    &JMOE_ISA::to_float32,
    &JMOE_ISA::from_float32,
    &JMOE_ISA::attend,
    &JMOE_ISA::read_bytes,
};

}  // namespace jmoe
