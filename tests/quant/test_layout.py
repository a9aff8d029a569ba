"""Blobs of experts: where the parts lie, and that host and programs read the same bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.errors import ConfigError
from jmoe.quant.formats import BF16, QuantFormat, parse_format
from jmoe.quant.layout import ALIGNMENT, MATRICES, ExpertLayout, aligned_empty, read_rows
from jmoe.quant.quant_array import QuantArray, validate
from jmoe.quant.spec import PRESETS, QuantSpec, parse_spec
from tests.quant import cases
from tests.quant.test_formats import expert_formats

HIDDEN, WIDTH, EXPERTS = 64, 96, 3
SPECS = {
    "bf16": "bf16",
    "f32": "f32",
    "8 bits, symmetric and flat": "experts=8g32sf",
    "4 bits": "experts=4g32",
    "4 bits, flat": "experts=4g16f",
    "4 bits, symmetric": "experts=4g16s",
    "3 bits": "experts=3g32",
    "3 and 4 bits": "experts=3g32,experts_down=4g16f",
    "4 and 8 bits": "experts=4g64,experts_down=8g32sf",
}


@pytest.fixture(params=SPECS.values(), ids=list(SPECS))
def layout(request):
    return ExpertLayout.of(HIDDEN, WIDTH, parse_spec(request.param))


@given(st.integers(1, 5), st.integers(1, 5), expert_formats)
def test_parts_are_aligned_and_never_overlap(hidden, width, formats):
    spec = QuantSpec(experts=formats[0], experts_down=formats[1])
    layout = ExpertLayout.of(hidden * 256, width * 256, spec)
    places = []
    for matrix in MATRICES:
        parts = layout.parts(matrix)
        shape = layout.matrix_shape(matrix)
        assert {name: placed.part for name, placed in parts.items()} == layout.format(matrix).parts(
            *shape
        )
        places += [(placed.offset, placed.part.num_bytes) for placed in parts.values()]
    places.sort()
    assert places[0][0] == 0
    ends = [offset + num_bytes for offset, num_bytes in places]
    for end, next_offset in zip(ends, [*(offset for offset, _ in places[1:]), layout.num_bytes],
                                strict=True):  # fmt: skip
        assert end <= next_offset < end + ALIGNMENT  # no overlap, and padding only
    assert all(offset % ALIGNMENT == 0 for offset, _ in places)
    assert layout.num_bytes % ALIGNMENT == 0
    assert layout.num_items * jnp.dtype(layout.dtype).itemsize == layout.num_bytes


def test_codes_come_first_in_the_order_of_the_matrices():
    layout = ExpertLayout.of(HIDDEN, WIDTH, parse_spec("experts=4g32"))
    order = sorted(
        (placed.offset, matrix, name)
        for matrix in MATRICES
        for name, placed in layout.parts(matrix).items()
    )
    assert [(matrix, name) for _, matrix, name in order] == [
        (matrix, name) for name in ("codes", "scales", "zeros", "nested") for matrix in MATRICES
    ]


def test_dense_experts_take_what_their_weights_take():
    for name, itemsize in (("bf16", 2), ("f32", 4)):
        layout = ExpertLayout.of(HIDDEN, WIDTH, PRESETS[name])
        assert layout.num_items == 3 * HIDDEN * WIDTH
        assert layout.num_bytes == layout.num_items * itemsize


@pytest.mark.parametrize(
    ("hidden", "width", "text"),
    [
        (96, 64, "experts=4g64"),  # rows of w1 and w3
        (64, 96, "experts=4g64"),  # rows of w2
        (64, 96, "experts=4g32,experts_down=2g64"),
        (64, 40, "experts=4g16"),
    ],
)
def test_groups_that_do_not_divide_are_refused(hidden, width, text):
    with pytest.raises(ConfigError, match="does not divide the rows"):
        ExpertLayout.of(hidden, width, parse_spec(text))


def test_any_shape_of_dense_experts_is_aligned():
    layout = ExpertLayout.of(3, 7, QuantSpec())
    assert layout.num_bytes == 3 * ALIGNMENT
    assert all(p.offset % ALIGNMENT == 0 for m in MATRICES for p in layout.parts(m).values())


@functools.partial(jax.jit, static_argnames=("layout", "matrix", "num_rows"))
def read(blobs, expert, first_row, layout, matrix, num_rows):
    return read_rows(blobs, layout, matrix, expert, first_row, num_rows)


def test_programs_and_host_read_the_same_bits(layout):
    generator = np.random.default_rng(0)
    raw = aligned_empty((EXPERTS, layout.num_bytes), np.uint8)
    raw[:] = generator.integers(0, 256, raw.shape, np.uint8)  # any bits, also those of NaN
    blobs = jnp.asarray(raw.view(layout.dtype))
    assert blobs.shape == (EXPERTS, layout.num_items)
    for matrix in MATRICES:
        num_outputs, num_inputs = layout.matrix_shape(matrix)
        for num_rows in (num_outputs, 4):
            for expert, first_row in ((0, 0), (2, num_outputs - num_rows)):
                rows = read(blobs, expert, first_row, layout, matrix, num_rows)
                assert rows.shape == (num_rows, num_inputs)
                if isinstance(rows, QuantArray):
                    validate(rows)
                    assert rows.format == layout.format(matrix)
                    parts = rows.parts()
                else:
                    assert rows.dtype == layout.dtype
                    parts = {"values": rows}
                views = layout.host_views(raw[expert])[matrix]
                assert views.keys() == parts.keys()
                for name, view in views.items():
                    expected = view[first_row : first_row + num_rows]
                    got = np.asarray(parts[name])
                    assert got.dtype == expected.dtype and got.shape == expected.shape
                    assert got.tobytes() == expected.tobytes()


def test_what_is_written_through_views_is_read_back(layout):
    blobs, weights = cases.random_expert_blobs(layout, EXPERTS)
    for matrix in MATRICES:
        num_outputs = layout.matrix_shape(matrix)[0]
        rows = read(jnp.asarray(blobs), 1, 0, layout, matrix, num_outputs)
        back = cases.decode(rows) if isinstance(rows, QuantArray) else rows
        back = np.asarray(back, np.float64)
        np.testing.assert_allclose(back, weights[matrix][1], rtol=1e-5, atol=1e-5)


def test_views_share_memory_and_keep_to_their_blob(layout):
    blobs = aligned_empty((2, layout.num_bytes), np.uint8)
    blobs[:] = 0
    views = layout.host_views(blobs[0])
    for parts in views.values():
        for view in parts.values():
            assert view.ctypes.data % ALIGNMENT == 0
            view.view(np.uint8)[...] = 1
    written = sum(view.nbytes for parts in views.values() for view in parts.values())
    assert int(blobs[0].sum()) == written
    assert not blobs[1].any()


def test_aligned_arrays():
    for shape, dtype in (
        ((3, 5), np.uint8),
        ((), np.float32),
        ((0, 4), np.uint8),
        ((7,), "bfloat16"),
    ):
        array = aligned_empty(shape, dtype)
        assert array.shape == shape and array.dtype == jnp.dtype(dtype)
        assert array.size == 0 or array.ctypes.data % ALIGNMENT == 0
        assert array.flags.c_contiguous and array.flags.writeable


def test_formats_of_a_layout_are_those_of_the_spec():
    layout = ExpertLayout.of(HIDDEN, WIDTH, parse_spec("experts=3g32,experts_down=4g16f"))
    assert layout.format("w1") == layout.format("w3") == parse_format("3g32")
    assert layout.format("w2") == parse_format("4g16f")
    assert isinstance(layout.format("w2"), QuantFormat)
    assert ExpertLayout.of(HIDDEN, WIDTH, QuantSpec()).format("w2") == BF16
