"""The tool itself, without a compiler: reading HLO, and outliving a compiler that aborts."""

import sys

import pytest

from tests.hlo import optimized
from tests.hlo.compiling import CompilationFailed, Compilations

HLO = """\
HloModule step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }, num_partitions=1

%fused_update (p0: bf16[4,8], p1: bf16[1,8]) -> bf16[4,8] {
  %p0 = bf16[4,8]{1,0} parameter(0)
  %p1 = bf16[1,8]{1,0} parameter(1)
  %inside = bf16[512,512]{1,0} broadcast(%p0), dimensions={}
  ROOT %update = bf16[4,8]{1,0} dynamic-update-slice(%p0, %p1)
}

%body (state: (s32[], f32[16,16])) -> (s32[], f32[16,16]) {
  %state = (s32[], f32[16,16]{1,0}) parameter(0)
  %item = f32[16,16]{1,0:T(8,128)S(1)} get-tuple-element(%state), index=1
  %product = f32[16,16]{1,0} custom-call(%item), custom_call_target="gemm"
  ROOT %next = (s32[], f32[16,16]{1,0}) tuple(%state, %product)
}

ENTRY %main (cache: bf16[4,8], new: bf16[1,8]) -> (bf16[4,8], u8[100]) {
  %cache = bf16[4,8]{1,0} parameter(0), metadata={op_name="cache"}
  %new = bf16[1,8]{1,0} parameter(1)
  %updated = bf16[4,8]{1,0} fusion(%cache, %new), kind=kLoop, calls=%fused_update
  %loop = (s32[], f32[16,16]{1,0}) while(%start), condition=%c, body=%body
  %known = (s32[], f32[16,16]{1,0}) while(%start), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"8"}}
  %codes = u8[100]{0} copy(%new)
  %all = (bf16[4,8]{1,0}, u8[100]{0}) tuple(%updated, %codes)
  %first = bf16[4,8]{1,0} get-tuple-element(%all), index=0
  %second = u8[100]{0} get-tuple-element(%all), index=1
  ROOT %result = (bf16[4,8]{1,0}, u8[100]{0}) tuple(%first, %second)
}
"""

# Answers as a worker does, except where it ends without an answer.
WORKER = """
import json, sys
for line in sys.stdin:
    match line.strip():
        case "aborts":
            sys.exit("Check failed: a form it cannot handle")
        case "refused":
            print(json.dumps({"error": "XlaRuntimeError: no"}), flush=True)
        case _:
            print(json.dumps(dict(temp_bytes=1, donated_bytes=0, arrays=[["u8", "u8[9]", 9]],
                                  num_kernels=1, num_host_loops=0, compile_s=0.1)), flush=True)
"""


def test_written_arrays_are_those_of_scheduled_instructions():
    # Neither what a fusion holds inside, nor the donated cache; a loop's body is one.
    assert [str(array) for array in optimized.written_arrays(HLO)] == ["f32[16,16]", "u8[100]"]
    assert [array.num_bytes for array in optimized.written_arrays(HLO)] == [1024, 100]


def test_kernels_and_loops_are_counted():
    assert optimized.num_kernels(HLO) == 3
    assert optimized.num_host_loops(HLO) == 1


def test_a_compiler_that_ends_fails_one_case_only():
    cases = ["first", "aborts", "refused", "last"]
    compilations = Compilations(cases, num_workers=1, command=(sys.executable, "-c", WORKER))
    try:
        for case in ("first", "last"):
            assert compilations.report(case).largest_bytes(("u8", "s8")) == 9
        with pytest.raises(CompilationFailed, match=r"(?s)exit status 1.*Check failed: a form"):
            compilations.report("aborts")
        with pytest.raises(CompilationFailed, match="XlaRuntimeError: no"):
            compilations.report("refused")
    finally:
        compilations.close()
