"""Calls of the host kernels' handlers as no wrapper makes them: good ones, and changes of them.

As a program it makes many at random: a crash ends this process, and not the suite that started it.
"""

import copy
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jmoe import native
from jmoe.native import ops
from jmoe.quant.formats import QuantFormat
from jmoe.quant.layout import ExpertLayout
from jmoe.quant.spec import parse_spec
from tests.quant.cases import quant_format, random_expert_blobs, random_parts

DTYPES = ("float32", "bfloat16", "float16", "uint8", "int8", "int32", "uint32", "bool")


@dataclasses.dataclass
class Call:
    """One call of a handler.

    Attributes:
      target: the handler.
      arrays: its arguments by name, in order.
      result: shape and dtype.
      attributes: int64 numbers, or arrays of them.
    """

    target: str
    arrays: dict[str, np.ndarray]
    result: tuple[tuple[int, ...], str]
    attributes: dict[str, Any]

    def __call__(self) -> np.ndarray:
        shape, dtype = self.result
        call = jax.ffi.ffi_call(self.target, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
        attributes = {
            name: np.int64(value) if isinstance(value, int) else value
            for name, value in self.attributes.items()
        }
        return np.asarray(call(*self.arrays.values(), **attributes))


def linear(text: str) -> Call:
    shape = (6, 128)
    x = np.ones((3, 128), np.float32)
    if text in ("bf16", "f32"):
        w = np.ones(shape, np.dtype(jnp.bfloat16 if text == "bf16" else jnp.float32))
        return Call("jmoe_linear", {"x": x, "w": w}, ((3, 6), "float32"), _linear_attributes())
    fmt = quant_format(text)
    parts = random_parts(fmt, shape, np.random.default_rng(0))
    attributes = _linear_attributes(fmt)
    return Call("jmoe_linear", {"x": x} | parts, ((3, 6), "float32"), attributes)


def _linear_attributes(fmt: QuantFormat | None = None) -> dict[str, int]:
    return {
        "bits": fmt.bits if fmt else 0,
        "group_size": fmt.group_size if fmt else 0,
        "symmetric": int(fmt.symmetric) if fmt else 0,
        "nested": int(fmt.nested) if fmt else 0,
        "activation_bits": 16,
        "num_threads": 2,
    }


def _tokens() -> dict[str, np.ndarray]:
    return {
        "x": np.ones((3, 64), np.float32),
        "expert_ids": np.array([[0, 1], [1, 2], [2, 0]], np.int32),
        "weights": np.ones((3, 2), np.float32),
        "valid": np.ones(3, bool),
    }


def experts(text: str) -> Call:
    layout = ExpertLayout.of(64, 32, parse_spec(text))
    blobs, _ = random_expert_blobs(layout, 3)
    attributes = {
        "layout": ops._layout_numbers(layout),
        "hidden_size": 64,
        "intermediate_size": 32,
        "activation_bits": 16,
        "num_threads": 2,
    }
    return Call("jmoe_experts", _tokens() | {"blobs": blobs}, ((3, 64), "float32"), attributes)


def experts_of_arrays() -> Call:
    w1, w2 = np.ones((3, 32, 64), np.float32), np.ones((3, 64, 32), np.float32)
    arrays = _tokens() | {"w1": w1, "w3": w1, "w2": w2}
    return Call("jmoe_experts_of_arrays", arrays, ((3, 64), "float32"), {"num_threads": 2})


def attend() -> Call:
    q, k = np.ones((2, 3, 4, 8), np.float32), np.ones((2, 2, 5, 8), np.float32)
    arrays = {"q": q, "k": k, "v": k, "start": np.array([0, 2], np.int32)}
    return Call("jmoe_attend", arrays, (q.shape, "float32"), {"window": 2, "num_threads": 2})


def read() -> Call:
    arrays = {"array": np.ones((3, 5), np.float32)}
    return Call("jmoe_read", arrays, ((2,), "uint32"), {"num_threads": 2})


MAKERS = {
    **{f"linear {text}": functools.partial(linear, text) for text in ("8g64sf", "4g16", "3g32")},
    **{f"linear {text}": functools.partial(linear, text) for text in ("2g32f", "bf16", "f32")},
    "experts 4g16": functools.partial(experts, "experts=4g16"),
    "experts mixed": functools.partial(experts, "experts=3g32,experts_down=2g16sf"),
    "experts bf16": functools.partial(experts, "bf16"),
    "experts_of_arrays": experts_of_arrays,
    "attend": attend,
    "read": read,
}


@functools.cache
def _made(name: str) -> Call:
    return MAKERS[name]()


def good_call(name: str) -> Call:
    return copy.deepcopy(_made(name))


def is_refused(call: Call) -> str:
    """The error of a call by the operation's name, or by XLA before the operation; empty if none.

    XLA compares the number of arguments and the types of attributes, and names no operation.
    """
    try:
        y = call()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        assert re.match(rf"INVALID_ARGUMENT: ({call.target}: |\[execute\] )", text), text
        return text
    shape, dtype = call.result
    assert y.shape == shape and y.dtype == jnp.dtype(dtype)
    return ""


# What an attribute, an entry of the layout or an item of an array of ids might be.
NUMBERS = st.one_of(
    st.sampled_from([-(2**63), -(2**31), -1, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1]),
    st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 16, 24, 32, 48, 64, 128, 256, 512, 1024]),
    st.integers(0, 20000),
)


@st.composite
def _shapes(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Another shape: some other sizes, or another rank."""
    sizes = list(shape)
    place = draw(st.integers(0, len(sizes) - 1))
    change = draw(st.sampled_from(["size", "size", "size", "drop", "insert", "swap"]))
    if change == "size":
        changed = [0, 1, sizes[place] - 1, sizes[place] + 1, 2 * sizes[place], sizes[place] // 2]
        sizes[place] = draw(st.sampled_from(changed))
    elif change == "drop":
        del sizes[place]
    elif change == "insert":
        sizes.insert(place, draw(st.sampled_from([0, 1, 2])))
    else:
        sizes.reverse()
    return tuple(sizes)


@st.composite
def changed_calls(draw: st.DrawFn) -> Call:
    call = good_call(draw(st.sampled_from(sorted(MAKERS))))
    kinds = ("shape", "dtype", "drop", "repeat", "ids", "result", "attribute", "attribute")
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3)):
        if kind == "attribute":
            name = draw(st.sampled_from(sorted(call.attributes)))
            value = call.attributes[name]
            if isinstance(value, int):
                call.attributes[name] = draw(NUMBERS)
            elif draw(st.integers(0, 9)) == 0:
                call.attributes[name] = np.resize(value, draw(st.sampled_from([0, 1, 23, 25, 48])))
            else:
                value[draw(st.integers(0, len(value) - 1))] = draw(NUMBERS)
        elif kind == "result":
            shape, dtype = call.result
            if draw(st.booleans()):
                call.result = draw(_shapes(shape)), dtype
            else:
                call.result = shape, draw(st.sampled_from(DTYPES))
        elif call.arrays:
            name = draw(st.sampled_from(sorted(call.arrays)))
            array = call.arrays[name]
            if kind == "shape":
                call.arrays[name] = np.resize(array, draw(_shapes(array.shape or (1,))))
            elif kind == "dtype":
                dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
                call.arrays[name] = np.resize(array.view(np.uint8), array.nbytes).astype(dtype)
                call.arrays[name] = np.resize(call.arrays[name], array.shape)
            elif kind == "drop":
                del call.arrays[name]
            elif kind == "repeat":
                call.arrays[f"{name} again"] = array
            elif array.dtype == np.int32 and array.size:
                number = draw(NUMBERS.filter(lambda n: -(2**31) <= n < 2**31))
                array[(0,) * array.ndim] = number
    return call


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(changed_calls())
def make_calls(call: Call) -> None:
    counts["refused" if is_refused(call) else "accepted"] += 1


counts = {"refused": 0, "accepted": 0}

if __name__ == "__main__":
    native.require()
    make_calls()
    print(f"{counts['refused']} calls refused, {counts['accepted']} accepted")
