"""What the programs write to memory on an H100, by the compiler's account."""

import pytest

from tests.hlo.cases import CASES

MIB = 2**20
FLOATS = ("bf16", "f16", "f32")
BYTES = ("u8", "s8", "u4", "s4", "u32", "s32")


@pytest.mark.parametrize("case", CASES)
def test_no_copy_of_weights_is_written(case, compiled):
    limits, report = CASES[case], compiled(case)
    assert report.temp_bytes <= limits.temp_mib * MIB, report
    assert report.largest_bytes(FLOATS, limits.besides) <= limits.float_mib * MIB, report
    assert report.largest_bytes(BYTES, limits.besides) <= limits.codes_mib * MIB, report


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].donated_bytes])
def test_the_cache_is_updated_in_place(case, compiled):
    # Nor is a copy of it written, or it would be among the arrays above.
    assert compiled(case).donated_bytes >= CASES[case].donated_bytes


@pytest.mark.parametrize("case", CASES)
def test_few_tokens_never_wait_for_the_host(case, compiled):
    assert compiled(case).num_host_loops <= CASES[case].host_loops
