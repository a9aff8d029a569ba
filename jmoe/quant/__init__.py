"""Numbers in few bits: formats, packing, solvers, and products that dequantize as they go."""
