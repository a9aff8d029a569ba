"""Experts from a disk: what is said of them, what is locked, and what is counted."""

from pathlib import Path

import numpy as np
import pytest

from jmoe.store import disk_tier, page_cache
from jmoe.store.disk_tier import DiskTier
from tests.residency.faulty_link import await_true
from tests.store.mapped_files import map_cold, write_layers

_MIB = 1 << 20
_BLOB_BYTES = 3 * _MIB
_LAYERS, _EXPERTS = 2, 8


@pytest.fixture
def tier(tmp_path: Path):
    with_files = write_layers(tmp_path, _LAYERS, _EXPERTS, _BLOB_BYTES)
    made: list[DiskTier] = []

    def make(available_mib: int = 24, **more: bool) -> DiskTier:
        layers = map_cold(with_files, _EXPERTS)
        options = {"is_larger": True, **more}
        made.append(DiskTier(layers, with_files, available_bytes=available_mib * _MIB, **options))
        made[-1].experts.drop()  # what was measured
        return made[-1]

    yield make
    for tier in made:
        tier.close()


def _blobs(directory: Path, layer: int) -> np.ndarray:
    contents = np.fromfile(directory / f"layer{layer}", np.uint8)[4096:]
    return contents.reshape(_EXPERTS, _BLOB_BYTES)


def test_bytes_are_those_of_the_file_whatever_was_said_before(tier, tmp_path: Path):
    disk = tier()
    disk.demand([(0, 1), (0, 2)])
    disk.predict([(1, 3), (1, 4)])
    disk.pass_layer(0)
    for layer, expert in ((0, 1), (0, 2), (1, 3), (1, 7)):
        np.testing.assert_array_equal(disk.read((layer, expert)), _blobs(tmp_path, layer)[expert])
    disk.settle()
    disk.close()
    np.testing.assert_array_equal(disk.read((1, 0)), _blobs(tmp_path, 1)[0])


def test_what_was_missing_and_what_was_read_ahead_is_counted(tier):
    disk = tier()
    before = disk.counts()
    disk.read((0, 0))
    disk.read((0, 0))
    disk.predict([(1, 1), (1, 2)])
    await_true(lambda: disk.is_ready((1, 1)) and disk.is_ready((1, 2)))
    disk.demand([(1, 1)])
    disk.read((1, 1))
    disk.pass_layer(1)
    traffic = disk.counts() - before
    assert (traffic.needed, traffic.waited_for) == (3, 1)
    assert _MIB <= traffic.missing_bytes <= _BLOB_BYTES + page_cache.PAGE_BYTES
    assert traffic.waited_s > 0
    assert (traffic.read_ahead, traffic.useful, traffic.useless) == (2, 1, 1)
    if traffic.read_bytes is not None:  # nothing twice, and little beside
        assert 3 * _MIB <= traffic.read_bytes <= 8 * 3 * _BLOB_BYTES


def test_it_says_what_a_miss_costs(tier):
    disk = tier()
    cost, reading = disk.notes
    assert "48.0 MiB of experts are mapped, and 24.0 MiB of memory are free" in cost
    assert "3.0 MiB at" in cost and "(measured on" in cost
    assert disk.bytes_per_s is not None and disk.bytes_per_s > 0
    assert "are read ahead, by" in reading


def test_a_disk_is_not_measured_where_nothing_is_missing(tmp_path: Path):
    files = write_layers(tmp_path, 1, 2, _BLOB_BYTES)
    layers = map_cold(files, 2)
    page_cache.populate(layers[0])
    with_all = DiskTier(layers, files, available_bytes=1 << 30, is_larger=False)
    with_all.close()
    assert with_all.bytes_per_s is None
    assert "nothing is missing now, so its speed is not known" in with_all.notes[0]


def test_without_reading_ahead_hints_do_nothing(tier):
    disk = tier(has_hints=False)
    before = disk.counts()
    disk.demand([(0, 0)])
    disk.predict([(0, 1)])
    disk.pass_layer(0)
    disk.settle()
    assert disk.is_ready((0, 1))  # or nobody would ever read it
    assert not disk.reads_ahead and "nothing is read ahead" in disk.notes[-1]
    traffic = disk.counts() - before
    assert (traffic.needed, traffic.read_ahead) == (0, 0)


def test_what_is_needed_is_read_by_threads_also_if_nothing_is_read_ahead(tier):
    disk = tier(read_ahead=False)
    assert not disk.reads_ahead and "none ahead" in disk.notes[-1]
    disk.predict([(1, 0)])
    disk.demand([(0, 0)])
    blobs = disk.experts.blob((0, 0)), disk.experts.blob((1, 0))
    await_true(lambda: disk.experts.missing_bytes(blobs[0]) == 0)
    assert disk.experts.missing_bytes(blobs[1]) > 0
    assert disk.is_ready((1, 0))  # or nobody would ever read it


def _can_lock() -> bool:
    memory = np.zeros(64 * _MIB, np.uint8)
    refusal = page_cache.lock(memory)
    page_cache.unlock_all(memory)
    return refusal is None


def test_the_most_used_are_locked_within_the_share(tier):
    if not _can_lock():
        pytest.skip("the system lets too little be locked")
    disk = tier()
    disk.lock_most_used(lambda: 40 * _MIB)
    # Three quarters would be 30 MiB, but six experts must have room besides.
    assert disk.notes[-1] == (
        "disk: the 7 of 16 most used experts are, as that is learnt, locked in memory "
        "(40.0 MiB are free, less 6 experts that come and go)"
    )
    for expert in range(8):
        disk.read((0, expert))
    stats = disk.stats(disk.counts() - disk.counts(), disk.counts() - disk.counts())
    assert (stats.locked_experts, stats.locked_bytes) == (7, 7 * _BLOB_BYTES)
    disk.experts.drop()
    missing = [disk.experts.missing_bytes(disk.experts.blob((0, e))) for e in range(8)]
    # A large page at the end of what is locked may be a neighbour's, and not be locked.
    assert all(num_bytes < _BLOB_BYTES for num_bytes in missing[:7])
    assert sum(missing[:7]) <= 7 * _BLOB_BYTES / 2


def test_recorded_popularity_is_read_in_the_background(tier):
    if not _can_lock():
        pytest.skip("the system lets too little be locked")
    disk = tier()
    disk.lock_most_used(lambda: 1 << 30, [((1, 5), 0.5), ((0, 2), 0.25)], max_bytes=7 * _MIB)
    assert disk.notes[-1] == (
        "disk: the 2 of 16 most used experts are, first those of the recorded routing, locked in "
        "memory (7.0 MiB asked for)"
    )
    blobs = [disk.experts.blob(key) for key in ((1, 5), (0, 2))]
    await_true(lambda: all(disk.experts.missing_bytes(blob) == 0 for blob in blobs))


def test_locks_are_given_back_when_memory_becomes_scarce(tier):
    if not _can_lock():
        pytest.skip("the system lets too little be locked")
    disk, free_mib = tier(), [42]
    disk.lock_most_used(lambda: free_mib[0] * _MIB, reserve_bytes=2 * _MIB)
    for expert in range(4):
        disk.read((0, expert))
    disk.settle()
    assert _num_locked(disk) == 4
    free_mib[0] = 7  # a batch took the rest, and more
    disk.read((0, 5))
    assert _num_locked(disk) == 4  # there is no room for another one
    disk.settle()
    assert _num_locked(disk) == 0
    disk.read((0, 5))
    assert _num_locked(disk) == 0
    free_mib[0] = 42
    disk.read((0, 6))
    assert _num_locked(disk) == 1


def _num_locked(disk: DiskTier) -> int:
    return disk.stats(*[disk.counts() - disk.counts()] * 2).locked_experts


@pytest.mark.parametrize(
    ("available_mib", "max_mib", "words"),
    [
        (10, None, "nothing is locked in memory (10.0 MiB are free, less 6 experts"),
        (0, None, "nothing is locked in memory (0.0 MiB are free, less 6 experts"),
        (-5, 3, "nothing is locked in memory (0.0 MiB are free, less 6 experts"),
        (99, 0, "nothing is locked in memory (0.0 MiB asked for)"),
    ],
)
def test_without_room_nothing_is_locked(tier, available_mib, max_mib, words):
    disk = tier()
    max_bytes = None if max_mib is None else max_mib * _MIB
    disk.lock_most_used(lambda: available_mib * _MIB, max_bytes=max_bytes)
    assert words in disk.notes[-1]
    disk.read((0, 0))
    assert disk.stats(*[disk.counts() - disk.counts()] * 2).locked_experts == 0


def test_a_refusal_is_said_and_nothing_else_happens(tier, monkeypatch):
    disk = tier()
    monkeypatch.setattr(page_cache, "lock", lambda view: "EPERM, Operation not permitted")
    disk.lock_most_used(lambda: 1 << 30, [((0, 0), 1.0)])
    assert disk.notes[-1] == (
        "disk: nothing is locked in memory (the system refuses more: EPERM, Operation not "
        "permitted; ulimit -l says what it allows)"
    )
    disk.read((0, 0))


def test_files_of_others_are_not_read_ahead_and_not_called_present(tier, monkeypatch):
    monkeypatch.setattr(page_cache, "is_told", lambda path: False)
    disk = tier()
    assert not disk.reads_ahead and "files of another user" in disk.notes[-1]
    disk.read((0, 0))
    assert (disk.counts() - disk.counts()).waited_for is None


def test_small_experts_have_no_share_of_large_pages(tmp_path: Path, monkeypatch):
    """Without huge pages for files every range is asked for before it is touched."""
    monkeypatch.setattr(page_cache, "reads_large", lambda window: False)
    files = write_layers(tmp_path, 1, 4, _BLOB_BYTES)
    disk = DiskTier(map_cold(files, 4), files, available_bytes=_MIB, is_larger=True)
    disk.experts.drop()
    np.testing.assert_array_equal(disk.read((0, 2)), _blobs_of(files[0].path)[2])
    assert disk.experts.missing_bytes(disk.experts.blob((0, 2))) == 0
    disk.close()
    assert disk_tier.LOCKED_SHARE < 1


def _blobs_of(path: Path) -> np.ndarray:
    return np.fromfile(path, np.uint8)[4096:].reshape(4, _BLOB_BYTES)
