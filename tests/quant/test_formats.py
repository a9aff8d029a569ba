"""Formats and specs: their text forms, their sizes, and what they refuse."""

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jmoe.errors import ConfigError
from jmoe.quant.formats import BF16, F32, Format, QuantFormat, parse_format
from jmoe.quant.spec import PRESETS, QuantSpec, parse_spec
from tests.quant.cases import quant_format

quant_formats = st.builds(
    QuantFormat,
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([16, 32, 64, 128, 256]),
    symmetric=st.booleans(),
    nested=st.booleans(),
)
formats = st.sampled_from([BF16, F32]) | quant_formats
expert_formats = st.tuples(quant_formats, st.none() | quant_formats) | st.sampled_from(
    [(BF16, None), (F32, None), (BF16, BF16)]
)
specs = st.builds(
    lambda attention, experts, embeddings, head: QuantSpec(
        attention=attention,
        experts=experts[0],
        experts_down=experts[1],
        embeddings=embeddings,
        head=head,
    ),
    formats,
    expert_formats,
    formats,
    formats,
)


@given(formats)
def test_formats_survive_their_text(fmt):
    assert parse_format(str(fmt)) == fmt


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "bf17", "BF16", "float32", "4", "g64", "4g", "4g64fs", "4g64ss", "4g64x"),
        *("4 g64", " 4g64", "4g64 ", "4g64\n", "-4g64", "4g-64", "4.0g64", "٤g64"),
        *("4g" + "9" * 7, "9999g64"),
    ],
)
def test_other_text_is_no_format(text):
    with pytest.raises(ConfigError, match="unknown number format") as caught:
        parse_format(text)
    assert "4g64" in str(caught.value.expected)


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 7, 9, 16])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ConfigError, match="8, 4, 3 or 2 bits"):
        parse_format(f"{bits}g64")


@pytest.mark.parametrize("size", [0, 1, 8, 24, 48, 65, 512, 999999])
def test_other_group_sizes_are_refused(size):
    with pytest.raises(ConfigError, match="group") as caught:
        parse_format(f"4g{size}")
    assert caught.value.expected == "a power of two from 16 to 256"


def _matrix_bytes(fmt: Format, num_rows: int, num_columns: int) -> int:
    return sum(part.num_bytes for part in fmt.parts(num_rows, num_columns).values())


def test_bytes_of_a_matrix():
    assert _matrix_bytes(BF16, 8, 64) == 8 * 64 * 2
    assert _matrix_bytes(F32, 8, 64) == 8 * 64 * 4
    assert _matrix_bytes(parse_format("8g64sf"), 8, 64) == 8 * (64 + 2)
    assert _matrix_bytes(parse_format("4g64f"), 8, 128) == 8 * (64 + 2 * 2 * 2)
    # Codes, scales and zero points of 4 groups, and four floats for them.
    assert _matrix_bytes(parse_format("3g32"), 8, 128) == 8 * (48 + 4 + 4 + 16)
    assert _matrix_bytes(parse_format("2g16s"), 8, 128) == 8 * (32 + 8 + 8)


@pytest.mark.parametrize(
    ("text", "num_columns", "expected"),
    [
        ("4g64", 64, 1),
        ("4g64", 4096, 64),  # all groups of the row
        ("2g16", 4096, 128),
        ("4g64", 14336, 112),  # of 224
        ("2g16", 14336, 128),  # of 896
        ("4g64", 64 * 131, 1),  # a prime
    ],
)
def test_groups_that_share_second_level_parameters(text, num_columns, expected):
    fmt = quant_format(text)
    assert fmt.nested_group(num_columns) == expected
    groups = num_columns // fmt.group_size
    assert fmt.parts(2, num_columns)["nested"].shape == (2, groups // expected, 4)


@given(specs)
def test_specs_survive_their_text_and_their_json(spec):
    back = parse_spec(str(spec))
    assert back.experts_formats == spec.experts_formats
    assert dataclasses.replace(back, experts_down=None) == dataclasses.replace(
        spec, experts_down=None
    )
    assert parse_spec(",".join(f"{k}={v}" for k, v in spec.to_json().items())) == spec


@given(st.permutations(["attention=4g64", "experts=3g32", "experts_down=4g64", "head=8g64sf"]))
def test_components_come_in_any_order(items):
    assert parse_spec(",".join(items)) == parse_spec(", ".join(sorted(items)))


def test_what_is_not_named_is_bf16():
    assert parse_spec("experts=4g64") == QuantSpec(experts=parse_format("4g64"))
    assert QuantSpec() == parse_spec("bf16")
    assert QuantSpec().experts_formats == (BF16, BF16, BF16)


@pytest.mark.parametrize(
    "text",
    [
        *("", ",", "attention", "attention=", "=4g64", "attn4-experts5", "BF16"),
        *("attention=4g64,", "attention=4g64,attention=4g64", "router=4g64", "attention:4g64"),
        *("bf16,attention=4g64", "attention=4g64;experts=4g64"),
    ],
)
def test_other_text_is_no_spec(text):
    with pytest.raises(ConfigError) as caught:
        parse_spec(text)
    assert caught.value.expected


@given(formats, formats)
def test_an_expert_is_all_quantized_or_all_of_one_float_type(experts, down):
    assume(experts != down)
    mixed = isinstance(experts, QuantFormat) and isinstance(down, QuantFormat)
    if mixed:
        assert QuantSpec(experts=experts, experts_down=down).experts_formats[2] == down
    else:
        with pytest.raises(ConfigError, match="all of one float type") as caught:
            QuantSpec(experts=experts, experts_down=down)
        assert str(experts) in str(caught.value.got) and str(down) in str(caught.value.got)


def test_presets_have_the_papers_mixes():
    paper = {f"attn{a}-experts{e}" for a in (16, 4, 3, 2) for e in (16, 4, 3, 2)}
    assert paper - set(PRESETS) == {"attn16-experts16"}  # that is bf16
    for name, preset in PRESETS.items():
        assert parse_spec(name) is preset
        assert str(preset) == name
        assert parse_spec(str(preset)) == preset
    for name in paper & set(PRESETS):
        attention, experts = (part.removeprefix("attn").removeprefix("experts")
                              for part in name.split("-"))  # fmt: skip
        for bits, fmt in ((attention, PRESETS[name].attention), (experts, PRESETS[name].experts)):
            if isinstance(fmt, QuantFormat):
                assert int(bits) == fmt.bits
            else:
                assert bits == "16" and fmt == BF16
        assert PRESETS[name].embeddings == PRESETS[name].head == BF16
    assert len(set(PRESETS.values())) == len(PRESETS)
    assert PRESETS["int8"].experts.symmetric  # type: ignore[union-attr]
