"""Reading ahead on threads: urgent first, always ending, never the owner of an error."""

import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from jmoe.store import page_cache
from jmoe.store.mapped_experts import MappedExperts
from jmoe.store.read_ahead import THREAD_NAME, ReadAhead
from jmoe.store.reading_queue import PIECE_BYTES, BlobKey
from tests.residency.faulty_link import await_true
from tests.store.mapped_files import map_cold, write_layers

_BLOB_BYTES = 2 * PIECE_BYTES


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    gc.collect()
    before = _threads()
    yield
    assert [thread for thread in _threads() if thread not in before] == []


class Disk:
    """Blobs whose first byte is their number, and reads that wait to be allowed.

    Attributes:
      begun: numbers of the blobs, one for each piece that a thread has begun to read.
    """

    def __init__(self, num_allowed: int = 1000, error: type[BaseException] | None = None):
        self.begun: list[int] = []
        self._allowed = threading.Semaphore(num_allowed)
        self._error = error
        self._missing = np.ones(16, bool)

    def blob(self, key: BlobKey) -> np.ndarray:
        blob = np.zeros(_BLOB_BYTES, np.uint8)
        blob[::PIECE_BYTES] = 4 * key[0] + key[1]
        return blob

    def read(self, view: np.ndarray) -> None:
        self.begun.append(int(view[0]))
        self._allowed.acquire()
        if self._error is not None:
            raise self._error("from a broken disk")
        self._missing[view[0]] = False

    def missing_bytes(self, view: np.ndarray) -> int:
        return int(self._missing[view[0]])

    def allow(self, number: int = 1000) -> None:
        self._allowed.release(number)

    def ahead(self, num_threads: int = 1) -> ReadAhead:
        return ReadAhead(
            self.blob,
            self.read,
            self.missing_bytes,
            max_ahead_bytes=1 << 40,
            num_threads=num_threads,
        )


def test_what_is_needed_overtakes_what_is_being_read():
    disk = Disk(num_allowed=0)
    with disk.ahead() as ahead:
        ahead.predict([(0, 1)])
        await_true(lambda: disk.begun == [1])
        ahead.predict([(0, 2)])
        ahead.demand([(0, 3), (1, 0)])
        disk.allow()
        await_true(lambda: len(disk.begun) == 8)
        assert disk.begun == [1, 3, 3, 4, 4, 2, 2, 1]
        await_true(lambda: ahead.is_ready((0, 1)))
        assert (ahead.counters.begun, ahead.counters.useless) == (2, 0)
        ahead.pass_layer(0)
        assert ahead.counters.useless == 2


def test_ready_is_said_when_it_is_there_and_not_before():
    disk = Disk(num_allowed=0)
    told = threading.Event()

    class Listener:
        def hear(self) -> None:
            told.set()

    listener = Listener()
    with disk.ahead() as ahead:
        ahead.on_ready(listener.hear)
        assert not ahead.is_ready((0, 1))  # which asks for it
        await_true(lambda: disk.begun == [1])
        assert not ahead.is_ready((0, 1)) and not told.is_set()
        disk.allow()
        assert told.wait(20)
        assert ahead.is_ready((0, 1))
        del listener  # which is not kept alive, nor missed
        ahead.predict([(0, 2)])
        await_true(lambda: ahead.is_ready((0, 2)))


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("allowed", [0, 3, 1000])
def test_closing_in_the_middle_ends_all_threads(num_threads: int, allowed: int):
    disk = Disk(allowed)
    ahead = disk.ahead(num_threads)
    threads = _threads()[-num_threads:]
    ahead.demand([(0, expert) for expert in range(4)])
    ahead.predict([(1, expert) for expert in range(4)])
    ahead.wish([(2, 0)])
    await_true(lambda: len(disk.begun) >= min(num_threads, 1 + allowed))
    timer = threading.Timer(0.02, disk.allow)  # a disk that answers at last
    timer.start()
    ahead.close()
    assert not any(thread.is_alive() for thread in threads)
    timer.join()
    ahead.close()
    num_begun = len(disk.begun)
    ahead.demand([(3, 0)])
    ahead.predict([(3, 1)])
    ahead.settle()
    assert len(disk.begun) == num_begun


def test_a_disk_that_does_not_answer_cannot_keep_it_from_closing(monkeypatch):
    monkeypatch.setattr("jmoe.store.read_ahead.JOIN_TIMEOUT_S", 0.05)
    disk = Disk(num_allowed=0)
    ahead = disk.ahead()
    thread = _threads()[-1]
    ahead.demand([(0, 1)])
    await_true(lambda: disk.begun == [1])
    ahead.close()
    assert thread.is_alive()
    disk.allow()
    thread.join(20)
    assert not thread.is_alive()


def test_reads_that_fail_are_somebody_elses_business():
    disk = Disk(error=OSError)
    with disk.ahead(2) as ahead:
        ahead.predict([(0, 1), (0, 2)])
        ahead.demand([(0, 3)])
        await_true(lambda: len(disk.begun) == 6)
        await_true(lambda: ahead.counters.begun == 2)
        ahead.settle()
        disk._error = None
        ahead.predict([(0, 4)])  # and later ones go on
        await_true(lambda: ahead.is_ready((0, 4)))


def test_an_abandoned_one_ends():
    class Owner:
        def __init__(self):
            self.ahead = Disk().ahead(2)
            self.ahead.predict([(0, 1)])
            self.itself = self

    Owner()
    threads = _threads()[-2:]
    gc.collect()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_a_prediction_that_is_used_has_come_true():
    disk = Disk()
    with disk.ahead() as ahead:
        ahead.predict([(0, 1), (0, 2)])
        await_true(lambda: ahead.is_ready((0, 1)) and ahead.is_ready((0, 2)))
        ahead.use((0, 1))  # copied before its layer came
        ahead.use((0, 3))
        ahead.pass_layer(0)
        assert (ahead.counters.useful, ahead.counters.useless) == (1, 1)
        assert 3 not in disk.begun


def test_settling_forgets_what_waits_and_keeps_wishes():
    disk = Disk(num_allowed=0)
    with disk.ahead() as ahead:
        ahead.predict([(0, 1)])
        await_true(lambda: disk.begun == [1])
        ahead.demand([(0, 2)])
        ahead.predict([(0, 3)])
        ahead.wish([(1, 0), (1, 1)])
        ahead.settle()
        disk.allow()
        await_true(lambda: disk.begun == [1, 4, 4, 5, 5])
        assert ahead.counters.useless == 1


def test_a_predicted_expert_is_in_memory_afterwards(tmp_path: Path):
    blob_bytes = (5 << 20) + 320  # neither pieces nor pages
    files = write_layers(tmp_path, 2, 4, blob_bytes)
    experts = MappedExperts(map_cold(files, 4), files)
    with ReadAhead(
        experts.blob, experts.read, experts.missing_bytes, max_ahead_bytes=1 << 40
    ) as ahead:
        ahead.predict([(1, 2)])
        await_true(lambda: ahead.is_ready((1, 2)))
        assert experts.missing_bytes(experts.blob((1, 2))) == 0
        assert experts.missing_bytes(experts.blob((0, 0))) > 0
        ahead.predict([(0, 0)])
        ahead.demand([(0, 3)])
        await_true(lambda: experts.missing_bytes(experts.blob((0, 3))) == 0)
        await_true(lambda: ahead.is_ready((0, 0)))
    contents = files[1].path.read_bytes()[files[1].offset :]
    expected = np.frombuffer(contents, np.uint8).reshape(4, blob_bytes)[2]
    np.testing.assert_array_equal(experts.blob((1, 2)), expected)
    assert page_cache.missing_bytes(experts.blob((1, 2))) == 0


def test_a_process_ends_while_it_reads():
    code = """if True:
        import threading
        import numpy as np
        from jmoe.store.read_ahead import ReadAhead
        never = threading.Event()
        ahead = ReadAhead(
            lambda key: np.zeros(8, np.uint8), lambda view: never.wait(), lambda view: 1,
            max_ahead_bytes=9,
        )
        ahead.demand([(0, 0)])
        print("last words")
    """
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "last words\n", "")
