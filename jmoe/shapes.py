"""The dimension key: one letter per dimension, the same in annotations, names and einsum strings.

======  ==================================================================
letter  dimension
======  ==================================================================
B       sequences
L       positions of a sequence in this call
M       positions that the KV cache has room for
T       tokens in this call, B * L
D       hidden size (the residual stream)
F       width of an expert (intermediate size)
E       experts of a layer
K       experts per token
A       assignments of tokens to experts, T * K
S       slots: places for experts in device memory
H       query heads
G       key and value heads
R       query heads per key and value head, H / G
P       width of a head
V       vocabulary
Q       quantisation group
======  ==================================================================

Functions that cross a module annotate arrays with jaxtyping, for example
``Float[Array, "T D"]``; the test suite checks the annotations with beartype. In the maths
rooms (models, quant) variables carry the letters as a suffix: ``hidden_TD``.
"""
