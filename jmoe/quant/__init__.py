"""Numbers in few bits: formats, packing, solvers, and products that dequantize as they go."""

from jmoe.quant.formats import DenseFormat, QuantFormat, parse_format
from jmoe.quant.matmul import dequantized_product, reduce_product
from jmoe.quant.quant_array import QuantArray, dequantize, validate
from jmoe.quant.solver import quantize
from jmoe.quant.spec import PRESETS, QuantSpec, parse_spec

__all__ = [
    "PRESETS",
    "DenseFormat",
    "QuantArray",
    "QuantFormat",
    "QuantSpec",
    "dequantize",
    "dequantized_product",
    "parse_format",
    "parse_spec",
    "quantize",
    "reduce_product",
    "validate",
]
