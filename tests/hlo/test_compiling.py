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

%fused_insert (i0: f32[32,32], i1: f32[2,32]) -> f32[32,32] {
  %i0 = f32[32,32]{1,0} parameter(0)
  %i1 = f32[2,32]{1,0} parameter(1)
  ROOT %insert = f32[32,32]{1,0} dynamic-update-slice(%i0, %i1)
}

%body (state: (s32[], f32[16,16], f32[32,32])) -> (s32[], f32[16,16], f32[32,32]) {
  %state = (s32[], f32[16,16]{1,0}, f32[32,32]{1,0}) parameter(0)
  %carried = f32[32,32]{1,0} get-tuple-element(%state), index=2
  %item = f32[16,16]{1,0:T(8,128)S(1)} get-tuple-element(%state), index=1
  %product = f32[16,16]{1,0} custom-call(%item), custom_call_target="gemm"
  %inserted = f32[32,32]{1,0} fusion(%carried, %item), kind=kLoop, calls=%fused_insert
  %aside = f32[32,32]{1,0} fusion(%inserted, %item), kind=kLoop, calls=%fused_insert
  ROOT %next = (s32[], f32[16,16]{1,0}, f32[32,32]{1,0}) tuple(%zero, %product, %inserted)
}

%body2 (state: (s32[], f32[16,16])) -> (s32[], f32[16,16]) {
  ROOT %again = f32[16,16]{1,0} custom-call(%item), custom_call_target="gemm"
}

ENTRY %main (cache: bf16[4,8], new: bf16[1,8]) -> (bf16[4,8], u8[100]) {
  %cache = bf16[4,8]{1,0} parameter(0), metadata={op_name="cache"}
  %new = bf16[1,8]{1,0} parameter(1)
  %moved = (f32[64,64]{1,0:S(5)}, f32[64,64]{1,0}, u32[]) copy-start(%new)
  %host = f32[64,64]{1,0:S(5)} copy-done(%moved)
  %updated = bf16[4,8]{1,0} fusion(%cache, %new), kind=kLoop, calls=%fused_update
  %loop = (s32[], f32[16,16]{1,0}) while(%start), condition=%c, body=%body
  %known = (s32[], f32[16,16]{1,0}) while(%start), condition=%c, body=%body2, \
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
                                  num_kernels=1, num_launches=1, num_host_loops=0,
                                  compile_s=0.1)), flush=True)
"""


def test_written_arrays_are_those_of_scheduled_instructions():
    # Neither what a fusion holds inside, nor the donated cache, nor host memory; a loop's body is
    # one. Of what the loop carries and updates it is what is new.
    arrays = {str(array): array.num_bytes for array in optimized.written_arrays(HLO)}
    assert arrays == {"f32[32,32]": 4096, "f32[16,16]": 1024, "f32[2,32]": 256, "u8[100]": 100}
    assert len(optimized.written_arrays(HLO)) == len(arrays) + 1  # of two loops


def test_kernels_and_loops_are_counted():
    assert optimized.num_kernels(HLO) == 6
    assert optimized.num_launches(HLO) == 2 + 8
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
