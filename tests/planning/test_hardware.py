"""What a machine can do, as numbers: curves, experts, and the JSON of both."""

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.errors import ConfigError
from jmoe.planning.hardware import Curve, HardwareSpec, formats_text
from jmoe.quant.layout import ExpertLayout
from jmoe.quant.spec import parse_spec
from tests.planning.hardware import small_experts, small_spec

SIZES = st.lists(st.integers(1, 1 << 30), min_size=1, max_size=8, unique=True).map(sorted)
SECONDS = st.floats(0, 100, allow_subnormal=False)


def layout(quant: str, hidden_size: int = 64, intermediate_size: int = 128) -> ExpertLayout:
    return ExpertLayout.of(hidden_size, intermediate_size, parse_spec(quant))


@given(SIZES, st.data())
def test_a_curve_goes_through_its_points_and_stays_between_neighbours(sizes, data):
    seconds = data.draw(st.lists(SECONDS, min_size=len(sizes), max_size=len(sizes)))
    curve = Curve(points=tuple(zip(sizes, seconds, strict=True)))
    for size, second in curve.points:
        assert curve(size) == pytest.approx(second, rel=1e-9, abs=1e-12)
    size = data.draw(st.floats(sizes[0], sizes[-1]))
    below = max(i for i, x in enumerate(sizes) if x <= size)
    pair = seconds[below : below + 2]
    assert min(pair) - 1e-9 <= curve(size) <= max(pair) + 1e-9


@given(SIZES, st.data(), st.lists(st.floats(0, 1 << 31), min_size=2, max_size=8).map(sorted))
def test_a_curve_of_growing_times_never_falls_and_is_never_negative(sizes, data, asked):
    seconds = sorted(data.draw(st.lists(SECONDS, min_size=len(sizes), max_size=len(sizes))))
    curve = Curve(points=tuple(zip(sizes, seconds, strict=True)))
    values = [curve(size) for size in asked]
    assert all(b >= a - 1e-9 * (1 + abs(a)) for a, b in itertools.pairwise(values))
    assert values[0] >= -1e-9


@given(SIZES, st.data(), st.floats(0, 1 << 32))
def test_noise_makes_no_size_negative(sizes, data, asked):
    seconds = data.draw(st.lists(SECONDS, min_size=len(sizes), max_size=len(sizes)))
    assert Curve(points=tuple(zip(sizes, seconds, strict=True)))(asked) >= -1e-9


@given(st.lists(st.floats(1e-6, 100), min_size=1, max_size=8))
def test_a_rising_curve_never_falls_and_keeps_what_did_not_fall(seconds):
    points = list(enumerate(seconds))
    rising = [y for _, y in Curve.rising(points).points]
    assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(rising))
    assert min(seconds) * (1 - 1e-9) <= min(rising) and max(rising) <= max(seconds) * (1 + 1e-9)
    assert math.prod(rising) == pytest.approx(math.prod(seconds))
    ascending = sorted(seconds)
    assert Curve.rising(list(enumerate(ascending))).points == tuple(enumerate(ascending))


def test_neighbours_that_fall_share_their_mean():
    curve = Curve.rising([(1, 1.0), (2, 8.0), (4, 2.0), (8, 5.0)])
    assert [y for _, y in curve.points] == pytest.approx([1, 4, 4, 5])


def test_beyond_its_ends_a_curve_goes_on_as_it_ended():
    curve = Curve(points=((10, 3.0), (20, 4.0), (40, 5.0)))
    assert (curve(0), curve(5), curve(15), curve(60)) == (2.0, 2.5, 3.5, 6.0)
    assert Curve(points=((10, 1.0), (20, 4.0)))(0) == 0.0  # not -2
    assert Curve(points=((10, 4.0), (20, 1.0)))(5) == 4.0  # no more than a larger size
    assert Curve(points=((10, 4.0), (20, 1.0)))(100) == 1.0
    assert Curve(points=((10, 4.0),))(1e9) == 4.0


def test_points_of_equal_size_are_replaced():
    curve = Curve(points=((1, 1.0), (2, 2.0))).with_points([(2, 3.0), (4, 5.0)])
    assert curve.points == ((1, 1.0), (2, 3.0), (4, 5.0))


@pytest.mark.parametrize(
    "points",
    [
        (),
        ((1, 1.0), (1, 2.0)),
        ((2, 1.0), (1, 2.0)),
        ((1, -1.0),),
        ((1, math.nan),),
        ((1, math.inf),),
        ((1, 10**400),),
        ((1, True),),
        ((1, "1"),),
        ((1,),),
    ],
)
def test_no_curve_has_such_points(points):
    with pytest.raises(ConfigError, match="curve is not usable"):
        Curve(points=points)


def test_the_host_is_sooner_below_so_many_tokens():
    experts = small_experts()  # 0.5 + 0.5 s ms on the host, 0.1 on the device
    assert experts.tokens_worth_copying(copy_s=1.9e-3 + 1e-9) == 4
    assert experts.tokens_worth_copying(copy_s=1.8e-3) == 3
    assert experts.tokens_worth_copying(copy_s=0.0) == 1
    assert experts.tokens_worth_copying(copy_s=50e-3) == 100  # beyond the last point
    as_fast = small_experts(device=experts.host)
    assert as_fast.tokens_worth_copying(copy_s=1e-6) is None


@given(
    st.lists(st.integers(0, 100), min_size=3, max_size=3).map(sorted),
    st.lists(st.integers(0, 100), min_size=3, max_size=3).map(sorted),
    st.integers(0, 50),
)
def test_that_number_is_the_least_one(host, device, copy_s):
    sizes = (1, 5, 21)  # and whole seconds: without rounding
    host, device = (Curve(points=tuple(zip(sizes, y, strict=True))) for y in (host, device))
    worth = small_experts(host=host, device=device).tokens_worth_copying(copy_s)
    first = next((s for s in range(1, 200) if host(s) >= copy_s + device(s)), None)
    assert worth == first or (first is None and worth is not None and worth >= 200)


def test_experts_are_found_by_shape_format_and_arithmetic():
    int4, f32 = layout("int4"), layout("f32")
    dense = small_experts(formats="f32", activation_bits=0)
    spec = small_spec(experts=(small_experts(), dense))
    assert spec.experts_of(int4, activation_bits=8, dtype="float32") is spec.experts[0]
    assert spec.experts_of(f32, activation_bits=16, dtype="float32") is dense  # has no such bits
    for other, bits, dtype in [
        (int4, 16, "float32"),
        (int4, 8, "bfloat16"),
        (layout("int4", 128), 8, "float32"),
        (layout("bf16"), 0, "float32"),
    ]:
        assert spec.experts_of(other, activation_bits=bits, dtype=dtype) is None
    mixed = layout("experts=3g32,experts_down=4g64", 64, 128)
    assert formats_text(mixed.formats) == "3g32,3g32,4g64"
    times = small_experts(formats="3g32,3g32,4g64")
    assert times.layout == mixed
    assert spec.with_experts(times).experts_of(mixed, activation_bits=8, dtype="float32") is times


def test_times_of_the_same_experts_are_replaced():
    other = small_experts(hidden_size=128)
    newer = small_experts(host=Curve(points=((1, 9.0),)))
    spec = small_spec(experts=(small_experts(), other)).with_experts(newer)
    assert spec.experts == (other, newer)


def test_other_shapes_are_estimated_from_the_most_similar_experts():
    spec = small_spec(experts=(small_experts(), small_experts(formats="f32", activation_bits=0)))
    wide = layout("int4", 64, 256)
    estimate = spec.estimate_experts(wide, activation_bits=8, dtype="float32")
    assert estimate.formats == "4g64" and estimate.intermediate_size == 256
    assert estimate.host(1) == pytest.approx(2e-3, rel=0.1)
    assert estimate.host(9) == pytest.approx(10e-3, rel=0.1)
    exact = spec.estimate_experts(layout("int4"), activation_bits=8, dtype="float32")
    assert exact is spec.experts[0]
    # The weights of another format are as many, but not its bytes.
    bf16 = spec.estimate_experts(layout("bf16"), activation_bits=8, dtype="float32")
    assert bf16.formats == "bf16" and bf16.activation_bits == 0
    with pytest.raises(ConfigError, match="no times of experts"):
        small_spec(experts=()).estimate_experts(wide, activation_bits=8, dtype="float32")


@pytest.mark.parametrize(
    "spec",
    [
        small_spec(),
        small_spec(device_memory_bytes=None, experts=(), fingerprint=""),
        small_spec(experts=(small_experts(), small_experts(formats="bf16", activation_bits=0))),
    ],
)
def test_a_machine_is_read_as_it_was_written(spec: HardwareSpec):
    assert HardwareSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 3}, ["another version", '"version": 2']),
        ({"version": None}, ["another version", "none"]),
        ({"num_cores": 0}, ["num_cores", "whole number"]),
        ({"num_cores": 2.5}, ["num_cores"]),
        ({"name": 3}, ["name", "a text"]),
        ({"host_bytes_per_s": 0}, ["host_bytes_per_s", "more than 0"]),
        ({"host_bytes_per_s": "fast"}, ["host_bytes_per_s"]),
        ({"round_trip_s": -1e-6}, ["round_trip_s"]),
        ({"device_memory_bytes": 0}, ["device_memory_bytes"]),
        ({"to_device": []}, ["curve"]),
        ({"to_device": {"a": 1}}, ["curve"]),
        ({"to_device": [[2, 1.0], [1, 2.0]]}, ["curve", "ascending"]),
        ({"experts": {}}, ["experts", "list"]),
        ({"experts": [3]}, ["experts"]),
        ({"experts": [{"formats": "4g64"}]}, ["lacks", "hidden_size"]),
        ({"speed": 1}, ["no such field", "'speed'"]),
        ({"spread": None}, ["lacks", "spread"]),
    ],
    ids=str,
)
def test_what_is_wrong_in_a_file_is_named(changes: dict[str, Any], words: list[str]):
    value = small_spec().to_json() | changes
    value = {name: item for name, item in value.items() if item is not None}
    with pytest.raises(ConfigError) as caught:
        HardwareSpec.from_json(value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"formats": "4g65"}, "quantization group"),
        ({"formats": "5"}, "number format"),
        ({"formats": "4g64,4g64"}, "formats"),
        ({"formats": None}, "formats"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 72}, "group"),
        ({"activation_bits": -8}, "activation_bits"),
        ({"dtype": "float64"}, "dtype"),
    ],
    ids=str,
)
def test_no_experts_are_of_such_a_kind(changes: dict[str, Any], word: str):
    with pytest.raises(ConfigError, match=word):
        small_experts(**changes)
