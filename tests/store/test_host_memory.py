"""Host memory: chosen with a reason, filled in parallel, given back with its last view."""

import os
from pathlib import Path

import numpy as np
import pytest

from jmoe.errors import CapacityError, CheckpointError, ConfigError
from jmoe.store import host_memory
from jmoe.store.host_memory import FileRange

_GIB = 1 << 30


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _file(directory: Path, num_bytes: int) -> tuple[Path, np.ndarray]:
    contents = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8)
    (directory / "file").write_bytes(contents.tobytes())
    return directory / "file", contents


@pytest.mark.parametrize(
    ("num_bytes", "requested", "available", "kind", "words"),
    [
        (20 * _GIB, "auto", 64 * _GIB, "ram", "20.0 GiB of experts, 64.0 GiB of memory free"),
        (20 * _GIB, "auto", 22 * _GIB, "mmap", "too little to hold them with a margin"),
        (20 * _GIB, "auto", 16 * _GIB, "mmap", "16.0 GiB of memory free, too little"),
        (_GIB // 2, "auto", 2 * _GIB, "ram", "512.0 MiB of experts"),
        (_GIB // 2, "auto", _GIB, "mmap", "margin"),
        (20 * _GIB, "mmap", 64 * _GIB, "mmap", "as asked for"),
        (20 * _GIB, "ram", 20 * _GIB, "ram", "as asked for"),
    ],
)
def test_choice(num_bytes: int, requested: str, available: int, kind: str, words: str):
    chosen, reason = host_memory.choose_host_memory(num_bytes, requested, available)
    assert chosen == kind
    assert words in reason


def test_choices_that_cannot_be():
    with pytest.raises(CapacityError, match="do not fit") as caught:
        host_memory.choose_host_memory(20 * _GIB, "ram", 20 * _GIB - 1)
    assert caught.value.do is not None and "--host_memory=mmap" in caught.value.do
    with pytest.raises(ConfigError, match="unknown kind") as config_error:
        host_memory.choose_host_memory(1, "hugetlb", _GIB)
    assert config_error.value.expected == "one of auto, mmap, ram"


def test_a_mapped_range_is_the_file(tmp_path: Path):
    path, contents = _file(tmp_path, 3 * 4096)
    mapped = host_memory.map_file(FileRange(path, 4096, 5000))
    assert not mapped.flags.writeable
    assert mapped.ctypes.data % 4096 == 0
    np.testing.assert_array_equal(mapped, contents[4096:9096])
    # The pages are those of the file: a change of it is seen.
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), b"\x07" * 8, 4096)
    assert mapped[:8].tolist() == [7] * 8


def test_a_mapping_survives_the_removal_of_its_file(tmp_path: Path):
    path, contents = _file(tmp_path, 8192)
    mapped = host_memory.map_file(FileRange(path, 0, 8192))
    path.unlink()
    np.testing.assert_array_equal(mapped, contents)


@pytest.mark.parametrize("num_bytes", [1, 4096, (1 << 21) + 5])
def test_allocated_memory_starts_at_a_huge_page(num_bytes: int):
    memory = host_memory.allocate(num_bytes)
    assert memory.ctypes.data % host_memory.HUGE_PAGE_BYTES == 0
    assert memory.shape == (num_bytes,)
    assert not memory.any()
    memory[:] = 1


def test_memory_goes_with_its_last_view():
    num_bytes = 64 << 20
    before = _resident_bytes()
    memory = host_memory.allocate(num_bytes)
    memory[:] = 1
    view = memory.reshape(2, -1)[1].view(np.uint16)
    del memory
    assert view[-1] == 0x0101
    assert _resident_bytes() > before + num_bytes // 2
    del view
    assert _resident_bytes() < before + num_bytes // 2


@pytest.mark.parametrize("num_threads", [1, 4])
def test_files_are_read_piece_by_piece(num_threads: int, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(host_memory, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(host_memory, "_MAX_THREADS", num_threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_threads)))
    path, contents = _file(tmp_path, 10_000)
    first, second = np.zeros((2, 1750), np.uint8), np.zeros(600, np.float32)
    pieces: list[int] = []
    host_memory.read_files(
        [(FileRange(path, 7, 3500), first), (FileRange(path, 5000, 2400), second)], pieces.append
    )
    np.testing.assert_array_equal(first.reshape(-1), contents[7:3507])
    np.testing.assert_array_equal(second.view(np.uint8), contents[5000:7400])
    assert sorted(pieces) == [400, 500, 1000, 1000, 1000, 1000, 1000]


def test_a_file_that_became_shorter(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(host_memory, "_PIECE_BYTES", 1000)
    path, _ = _file(tmp_path, 5000)
    source = FileRange(path, 100, 5000)
    for read in (
        lambda: host_memory.read_files([(source, np.zeros(5000, np.uint8))]),
        lambda: host_memory.map_file(source),
    ):
        with pytest.raises(CheckpointError, match="file became shorter") as caught:
            read()
        assert caught.value.got == "5000 bytes"


def test_a_file_that_is_gone(tmp_path: Path):
    source = FileRange(tmp_path / "file", 0, 10)
    with pytest.raises(CheckpointError, match="file cannot be read"):
        host_memory.read_files([(source, np.zeros(10, np.uint8))])
    with pytest.raises(CheckpointError, match="file cannot be mapped") as caught:
        host_memory.map_file(source)
    assert caught.value.got == "No such file or directory"


def test_an_error_while_reading_leaves_no_thread_behind(tmp_path: Path, monkeypatch):
    import threading

    monkeypatch.setattr(host_memory, "_PIECE_BYTES", 100)
    path, _ = _file(tmp_path, 10_000)

    def interrupt(num_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host_memory.read_files(
            [(FileRange(path, 0, 10_000), np.zeros(10_000, np.uint8))], interrupt
        )
    assert not [t for t in threading.enumerate() if t.name.startswith("jmoe-read")]
