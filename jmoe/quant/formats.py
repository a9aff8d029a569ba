"""How a weight matrix is stored: in a float type, or as groups of integer codes.

A format and a shape say everything about the arrays of a matrix and their bytes: the
planner, the layout of an expert's blob and QuantArray all ask ``parts`` here. No arrays.
"""

import dataclasses
import math
import re
from typing import Literal, NamedTuple

from jmoe.errors import ConfigError

MIN_GROUP_SIZE = 16
MAX_GROUP_SIZE = 256
# Groups that share a second-level scale and offset, at most: paper A has 128 or 256.
MAX_NESTED_GROUP = 128


class Part(NamedTuple):
    """One of the arrays that store a matrix."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


_ITEM_BYTES = {"uint8": 1, "bfloat16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True, slots=True)
class DenseFormat:
    """Weights as they are, in a float type."""

    dtype: Literal["bfloat16", "float32"]

    def parts(self, num_rows: int, num_columns: int) -> dict[str, Part]:
        """The one array of a matrix [num_rows, num_columns]."""
        return {"values": Part((num_rows, num_columns), self.dtype)}

    def __str__(self) -> str:
        return {"bfloat16": "bf16", "float32": "f32"}[self.dtype]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuantFormat:
    """Integer codes in groups along a row: weight = (code - zero point) * scale.

    Attributes:
      bits: of a code: 8, 4, 3 or 2.
      group_size: neighbouring weights of a row (inputs of one output) with one scale and
        one zero point: a power of two from 16 to 256.
      symmetric: the zero point is 2^(bits-1), and not stored.
      nested: scales and zero points are 8-bit codes themselves, with a float32 step and
        offset for up to 128 neighbouring groups; else they are bfloat16.

    Text form: ``4g64`` is 4 bits in groups of 64, nested; ``s`` behind it is symmetric,
    ``f`` flat, that is not nested: ``8g64sf``.
    """

    bits: Literal[2, 3, 4, 8]
    group_size: int
    symmetric: bool = False
    nested: bool = True

    def __post_init__(self):
        if self.bits not in (2, 3, 4, 8):
            raise ConfigError("quantization is to 8, 4, 3 or 2 bits", got=self.bits)
        size = self.group_size
        if size & (size - 1) or not MIN_GROUP_SIZE <= size <= MAX_GROUP_SIZE:
            raise ConfigError(
                "a quantization group has another size",
                got=size,
                expected=f"a power of two from {MIN_GROUP_SIZE} to {MAX_GROUP_SIZE}",
            )

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def symmetric_zero(self) -> int:
        return 1 << (self.bits - 1)

    def num_groups(self, num_columns: int) -> int:
        """Groups of a row (ConfigError if the row is not a whole number of them)."""
        if num_columns % self.group_size:
            fitting = math.gcd(num_columns, MAX_GROUP_SIZE)
            raise ConfigError(
                "the quantization group does not divide the rows of the weights",
                got=f"groups of {self.group_size} in rows of {num_columns}",
                expected=f"a group size of at most {fitting}"
                if fitting >= MIN_GROUP_SIZE
                else f"rows of a multiple of {MIN_GROUP_SIZE}",
                do=f"choose a smaller group, such as {self.bits}g{fitting}"
                if fitting >= MIN_GROUP_SIZE
                else "leave this component in bf16",
            )
        return num_columns // self.group_size

    def nested_group(self, num_columns: int) -> int:
        """How many groups of a row share second-level parameters: their largest divisor <= 128."""
        groups = self.num_groups(num_columns)
        return max(d for d in range(1, min(groups, MAX_NESTED_GROUP) + 1) if groups % d == 0)

    def parts(self, num_rows: int, num_columns: int) -> dict[str, Part]:
        """The arrays of a matrix [num_rows, num_columns], by their name in QuantArray."""
        groups = self.num_groups(num_columns)
        parts = {"codes": Part((num_rows, num_columns * self.bits // 8), "uint8")}
        parameter = Part((num_rows, groups), "uint8" if self.nested else "bfloat16")
        parts["scales"] = parameter
        if not self.symmetric:
            parts["zeros"] = parameter
        if self.nested:
            num_nested = groups // self.nested_group(num_columns)
            values = 2 if self.symmetric else 4
            parts["nested"] = Part((num_rows, num_nested, values), "float32")
        return parts

    def __str__(self) -> str:
        flags = "s" * self.symmetric + "f" * (not self.nested)
        return f"{self.bits}g{self.group_size}{flags}"


Format = DenseFormat | QuantFormat

BF16 = DenseFormat("bfloat16")
F32 = DenseFormat("float32")


def parse_format(text: str) -> Format:
    """The inverse of ``str`` (ConfigError)."""
    for dense in (BF16, F32):
        if text == str(dense):
            return dense
    match = re.fullmatch(r"([0-9]{1,3})g([0-9]{1,6})(s?)(f?)", text)
    if match is None:
        raise ConfigError(
            "unknown number format",
            got=repr(text),
            expected="bf16, f32, or bits and group size such as 4g64, with s for symmetric and "
            "f for scales that are not quantized themselves",
        )
    bits, group_size, symmetric, flat = match.groups()
    return QuantFormat(
        bits=int(bits),  # type: ignore[arg-type]  (checked by the class)
        group_size=int(group_size),
        symmetric=bool(symmetric),
        nested=not flat,
    )
