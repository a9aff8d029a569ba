"""bench.py --suite=disk: that every way reads what it says, and that a limit of memory is one."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.scripts.processes import ROOT, assert_one_error, environment, run_script

sys.path.insert(0, str(ROOT / "scripts"))

from _bench.settings import PARTS, check_parts
from _bench.wide_model import WideSource

from jmoe.loading import EMBEDDED_MODEL
from jmoe.store.source import CheckpointSource

_NEW_TOKENS = 3
_QUICK = ("--suite=disk", "--expert_times=2", f"--new_tokens={_NEW_TOKENS}", "--repeats=1")
_NUM_EXPERTS, _NUM_LAYERS, _TOP_K = 96, 12, 2


@pytest.fixture(scope="module")
def summary():
    result = run_script("bench.py", *_QUICK, "--warmup=0")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_every_way_makes_the_same_text_and_asks_for_every_expert_once(summary: dict):
    rows = {row["what"]: row for row in summary["rows"]["decode"]}
    assert [name.split(",")[0] for name in rows] == ["resident"] * 2 + ["offload"] * 5
    assert all(row["same_text"] and row["tok_per_s"]["median"] > 0 for row in rows.values())
    for name, row in rows.items():
        if "left alone" in name:
            assert row["disk"] is None
        elif name.startswith("resident"):
            assert row["disk"]["decode"]["needed"] == 0
        else:
            needed = row["disk"]["decode"]["needed"]
            assert needed >= _NEW_TOKENS * _NUM_LAYERS * _TOP_K  # and what was predicted wrongly
            assert ("locked" in name) >= (row["disk"]["locked_experts"] > 0)
            assert ("read ahead" in name) >= (row["disk"]["decode"]["read_ahead"] > 0)
    assert summary["subject"]["num_experts"] == _NUM_EXPERTS
    assert summary["subject"]["experts_bytes"] == _NUM_EXPERTS * summary["subject"]["expert_bytes"]
    assert summary["memory"]["limit_bytes"] is None


def test_every_way_of_reading_has_a_speed(summary: dict):
    rows = summary["rows"]["read"]
    assert len(rows) == 6
    assert all(row["bytes_per_s"]["median"] > 0 for row in rows)


def test_a_limit_of_memory_holds_the_page_cache_too(tmp_path):
    code = """if True:
        import sys
        sys.path.insert(0, "scripts")
        from _bench.memory_limit import limited_memory
        from jmoe.errors import RequestError
        from jmoe.planning.memory import available_host_bytes, host_memory_bytes
        before = host_memory_bytes()
        try:
            with limited_memory(300 << 20):
                print(host_memory_bytes() >> 20, available_host_bytes() >> 20)
                data = open(sys.argv[1], "rb").read(16 << 20)
        except RequestError as error:
            print("refused:", error.do)
        assert host_memory_bytes() == before
        with limited_memory(None) as group:
            assert group is None
    """
    path = tmp_path / "file"
    path.write_bytes(bytes(16 << 20))
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    assert result.returncode == 0, result.stderr
    if result.stdout.startswith("refused: "):
        assert "MemoryMax" in result.stdout
        pytest.skip("this process may make no control group")
    limit, available = map(int, result.stdout.split())
    assert limit == 300 and 200 < available <= 300


@pytest.mark.parametrize("times", [1, 4])
def test_wide_experts_compute_what_they_did(times: int):
    narrow, wide = CheckpointSource(EMBEDDED_MODEL), WideSource(times)
    assert wide.config.intermediate_size == times * narrow.config.intermediate_size
    x_D = np.random.default_rng(0).standard_normal(192).astype(np.float32)

    def compute(source) -> np.ndarray:
        w1, w3, w2 = (
            source.read(f"layers.3.experts.{name}", 5).astype(np.float32)
            for name in ("w1", "w3", "w2")
        )
        gate_F = w1 @ x_D
        return w2 @ (gate_F / (1 + np.exp(-gate_F)) * (w3 @ x_D))

    np.testing.assert_allclose(compute(wide), compute(narrow), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(wide.read("layers.3.router"), narrow.read("layers.3.router"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--expert_times=3",), ("power of two", "3")),
        (("--memory_gib=0",), ("--memory_gib", "above 0")),
        (("--host_memory=ram",), ("chooses --host_memory itself",)),
        (("--policy=resident",), ("chooses --policy itself",)),
        (("--parts=overlap",), ("read,decode",)),
    ],
)
def test_flags_that_make_no_sense(flags: tuple[str, ...], words: tuple[str, ...]):
    assert_one_error(run_script("bench.py", "--suite=disk", *flags), *words)


def test_the_suite_has_parts():
    assert check_parts(None, "disk") == PARTS["disk"] == ("read", "decode")
