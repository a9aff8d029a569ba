"""Pages of mapped files: what is said to be in memory is, and what is locked stays."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jmoe.store import page_cache
from jmoe.store.page_cache import PAGE_BYTES
from tests.store.mapped_files import map_cold, write_layers

_MIB = 1 << 20


@pytest.fixture
def cold(tmp_path: Path) -> np.ndarray:
    files = write_layers(tmp_path, 1, 1, 16 * _MIB)
    return map_cold(files, 1)[0][0]


def _locked_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmLck"))


def test_nothing_is_in_memory_before_it_is_read_and_everything_after(cold: np.ndarray):
    view = cold[5 * _MIB : 6 * _MIB]
    assert page_cache.missing_bytes(view) == view.nbytes
    assert page_cache.populate(view)
    assert page_cache.missing_bytes(view) == 0


def test_a_request_reads_in_the_background_and_nothing_else(cold: np.ndarray):
    view = cold[8 * _MIB - 100 : 11 * _MIB + 100]  # parts of pages at both ends
    page_cache.request(view)
    # Of pages under way the system says that they are there, or will soon.
    for _ in range(1000):
        if page_cache.missing_bytes(view) == 0:
            break
        view.max()  # which waits for them
    assert page_cache.missing_bytes(view) == 0


def test_missing_pages_are_counted_whole(cold: np.ndarray):
    assert page_cache.missing_bytes(cold[10 : PAGE_BYTES + 10]) == 2 * PAGE_BYTES
    assert page_cache.missing_bytes(cold[:1]) == PAGE_BYTES


def test_memory_that_is_no_mapping_is_missing_and_cannot_be_read():
    nowhere = np.lib.stride_tricks.as_strided(np.empty(0, np.uint8), (0,), (1,))
    assert page_cache.missing_bytes(nowhere) == 0
    start = 1 << 46  # nobody maps there
    assert page_cache._call("mincore", start, PAGE_BYTES, None) != 0
    assert page_cache._call("madvise", start, PAGE_BYTES, page_cache.ctypes.c_int(22)) != 0


def test_large_reads_leave_the_mapping_readable(cold: np.ndarray):
    window = cold[8 * _MIB : 12 * _MIB]
    is_large = page_cache.reads_large(window)
    found_bytes = window.nbytes - page_cache.missing_bytes(window)
    assert found_bytes > 0
    if is_large:
        assert _MIB <= found_bytes <= 2 * _MIB
        page_cache.advise_random(cold)
        other = cold[2 * _MIB : 3 * _MIB]
        page_cache.populate(other[:1])
        assert page_cache.missing_bytes(cold[4 * _MIB : 8 * _MIB]) > 0
    assert cold.max() == 255


def test_locked_pages_stay_and_neighbours_keep_theirs(cold: np.ndarray):
    before = _locked_bytes()
    first, second = cold[: _MIB + 100], cold[_MIB + 100 : 2 * _MIB]  # they share a page
    if (refusal := page_cache.lock(first)) is not None:
        pytest.skip(f"the system lets nothing be locked: {refusal}")
    assert page_cache.missing_bytes(first) > 0  # locking reads nothing
    assert page_cache.lock(second) is None
    assert _locked_bytes() - before == 2 * _MIB
    page_cache.unlock(first)
    assert _locked_bytes() - before == _MIB
    page_cache.unlock_all(cold)
    assert _locked_bytes() == before


def test_locked_pages_are_not_dropped(tmp_path: Path):
    files = write_layers(tmp_path, 1, 1, 4 * _MIB)
    layer = map_cold(files, 1)[0][0]
    view = layer[_MIB : 2 * _MIB]
    if (refusal := page_cache.lock(view)) is not None:
        pytest.skip(f"the system lets nothing be locked: {refusal}")
    page_cache.populate(layer)
    page_cache.drop(layer, files[0].path)
    assert page_cache.missing_bytes(view) == 0
    page_cache.unlock_all(view)


def test_a_refused_lock_says_why_and_leaves_nothing_locked():
    code = """if True:
        import os, resource
        import numpy as np
        from jmoe.store import page_cache
        view = np.zeros(1 << 20, np.uint8)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
        if os.geteuid() == 0:  # whom no limit holds
            os.setresuid(65534, 65534, 65534)
        print(page_cache.lock(view))
        print([line for line in open("/proc/self/status") if line.startswith("VmLck")])
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    refusal, locked = result.stdout.splitlines()
    assert refusal.startswith(("ENOMEM, ", "EPERM, ", "EAGAIN, "))
    assert locked.split()[1] == "0"


def test_files_of_others_are_not_told_of(tmp_path: Path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    assert page_cache.is_told(path)
    monkeypatch.setattr("os.geteuid", lambda: path.stat().st_uid + 1)
    monkeypatch.setattr("os.access", lambda *_: False)
    assert not page_cache.is_told(path)
    assert not page_cache.is_told(tmp_path / "gone")


def test_what_was_read_is_counted_by_the_system(cold: np.ndarray):
    before = page_cache.read_bytes_so_far()
    page_cache.populate(cold)
    after = page_cache.read_bytes_so_far()
    if before is None or after is None:
        pytest.skip("the system does not say what a process reads")
    assert after >= before
