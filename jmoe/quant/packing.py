"""Codes to bytes and back: one packing for XLA and for host kernels with wide vectors.

Within a group of Q codes, and nowhere beyond it:

* 8 bits: byte j is code j.
* 4 bits: byte j of Q/2 holds codes j (low half) and j + Q/2.
* 2 bits: byte j of Q/4 holds codes j, j + Q/4, j + 2Q/4, j + 3Q/4, from the low bits up.
* 3 bits: the row is two planes. The first K/4 bytes are the low two bits of all codes, as
  with 2 bits; the other K/8 bytes their high bits: byte j of Q/8 holds those of codes
  j + i*Q/8, i = 0..7, from the low bit up.

So unpacking is a shift and a mask of a whole vector of bytes, never a shuffle: field i of
neighbouring bytes are neighbouring codes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from jmoe.quant.formats import QuantFormat


def planes(fmt: QuantFormat) -> tuple[tuple[int, int], ...]:
    """Bits of a plane and the bit of the code that they start at, plane by plane."""
    return ((2, 0), (1, 2)) if fmt.bits == 3 else ((fmt.bits, 0),)


def pack(codes: UInt8[Array, "*rows K"], fmt: QuantFormat) -> UInt8[Array, "*rows bytes"]:
    """Packs codes of 0 to 2^bits - 1. K must be a multiple of the group size."""
    packed = [
        _pack_fields((codes >> first) & ((1 << bits) - 1), bits, fmt.group_size)
        for bits, first in planes(fmt)
    ]
    return packed[0] if len(packed) == 1 else jnp.concatenate(packed, axis=-1)


def unpack(packed: UInt8[Array, "*rows bytes"], fmt: QuantFormat) -> UInt8[Array, "*rows K"]:
    """The inverse of ``pack``."""
    *rows, num_bytes = packed.shape
    num_columns = num_bytes * 8 // fmt.bits
    codes = jnp.zeros((*rows, num_columns), jnp.uint8)
    offset = 0
    for bits, first in planes(fmt):
        plane_bytes = num_columns * bits // 8
        plane = packed[..., offset : offset + plane_bytes]
        codes |= _unpack_fields(plane, bits, fmt.group_size) << first
        offset += plane_bytes
    return codes


def _pack_fields(fields: jax.Array, bits: int, group_size: int) -> jax.Array:
    num_fields = 8 // bits
    *rows, num_columns = fields.shape
    num_groups = num_columns // group_size
    fields = fields.reshape(*rows, num_groups, num_fields, group_size // num_fields)
    packed = fields[..., 0, :]
    for i in range(1, num_fields):
        packed |= fields[..., i, :] << (i * bits)
    return packed.reshape(*rows, num_columns // num_fields)


def _unpack_fields(packed: jax.Array, bits: int, group_size: int) -> jax.Array:
    num_fields = 8 // bits
    *rows, num_bytes = packed.shape
    width = group_size // num_fields
    grouped = packed.reshape(*rows, num_bytes // width, 1, width)
    shifts = jnp.arange(num_fields, dtype=jnp.uint8)[:, None] * jnp.uint8(bits)
    fields = (grouped >> shifts) & jnp.uint8((1 << bits) - 1)
    return fields.reshape(*rows, num_bytes * num_fields)
