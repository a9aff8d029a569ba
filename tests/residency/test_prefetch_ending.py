"""The fetcher always ends: closed, abandoned, interrupted, or together with its process."""

import gc
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jmoe.errors import TransferError
from jmoe.residency.eviction import ExpertKey
from jmoe.residency.fetch_thread import THREAD_NAME
from jmoe.residency.link import DeviceLink, LinkCounters, ThrottledLink
from jmoe.residency.prefetch import Fetcher
from tests.residency.faulty_link import HeldLink, await_true, make_blob

_FOREVER_S = 1e9


def _key(expert: int) -> ExpertKey:
    return ExpertKey(3, expert)


def _device_link() -> DeviceLink:
    return DeviceLink(jax.devices()[0])


def _endless_link() -> ThrottledLink:
    return ThrottledLink(_device_link(), 1e9, latency_s=_FOREVER_S)


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    gc.collect()
    before = _threads()
    yield
    assert [thread for thread in _threads() if thread not in before] == []


@pytest.mark.parametrize("link", [HeldLink, _endless_link, _device_link])
def test_closing_ends_the_thread_whatever_it_does(link):
    fetcher = Fetcher(link(), make_blob)
    fetcher.demand([_key(0), _key(1), _key(2)])
    if link is not _device_link:
        await_true(lambda: len(fetcher.in_flight) == 2)
    thread = _threads()[-1]
    fetcher.close()
    assert not thread.is_alive()
    fetcher.close()
    for call in (
        lambda: fetcher.wait(_key(0)),
        lambda: fetcher.wait(_key(9)),
        lambda: fetcher.demand([_key(0)]),
        lambda: fetcher.prefetch([_key(0)]),
    ):
        with pytest.raises(TransferError, match="the engine was closed"):
            call()
    assert not fetcher.cancel(_key(0))
    fetcher.drain()
    assert fetcher.in_flight == frozenset()


def test_a_fetcher_that_was_never_used_has_no_thread():
    before = threading.active_count()
    with Fetcher(_device_link(), make_blob):
        assert threading.active_count() == before


@pytest.mark.parametrize("link", [HeldLink, _endless_link])
@pytest.mark.parametrize("asks", ["wait", "drain"])
def test_closing_wakes_who_waits(link, asks):
    fetcher = Fetcher(link(), make_blob)
    fetcher.demand([_key(0), _key(1), _key(2)])
    await_true(lambda: len(fetcher.in_flight) == 2)
    timer = threading.Timer(0.05, fetcher.close)
    timer.start()
    if asks == "drain":
        fetcher.drain()
    else:
        with pytest.raises(TransferError, match="the engine was closed"):
            fetcher.wait(_key(2))
    timer.join()


def test_a_device_that_does_not_answer_cannot_keep_the_engine_from_closing(monkeypatch):
    released = threading.Event()

    class HungLink(HeldLink):
        def finish(self, array: jax.Array) -> None:
            released.wait()

    monkeypatch.setattr("jmoe.residency.fetch_thread.JOIN_TIMEOUT_S", 0.1)
    fetcher = Fetcher(HungLink(), make_blob)
    fetcher.demand([_key(0)])
    await_true(lambda: len(fetcher.in_flight) == 1)
    timer = threading.Timer(0.05, fetcher.close)
    timer.start()
    with pytest.raises(TransferError, match="the engine was closed"):
        fetcher.wait(_key(0))
    timer.join()
    released.set()
    await_true(lambda: not _threads())


class Owner:
    """What an engine is to a fetcher; in a cycle, so that the collector ends it."""

    def __init__(self, link: Any, closes: bool):
        self.fetcher = Fetcher(link, make_blob)
        self.fetcher.demand([_key(expert) for expert in range(4)])
        self.itself = self
        self._closes = closes

    def __del__(self):
        if self._closes:
            self.fetcher.close()


@pytest.mark.parametrize("closes", [False, True], ids=["abandoned", "closed in a finalizer"])
@pytest.mark.parametrize("link", [HeldLink, _endless_link, _device_link])
def test_an_abandoned_fetcher_ends(link, closes):
    Owner(link(), closes)
    thread = _threads()[-1]
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_a_fetcher_may_be_collected_by_its_own_thread():
    owners = []

    class CollectingLink(DeviceLink):
        def start(self, blob: np.ndarray) -> jax.Array:
            while owners:
                time.sleep(0.001)
            gc.collect()
            return super().start(blob)

    owners.append(Owner(CollectingLink(jax.devices()[0]), closes=True))
    thread = _threads()[-1]
    gc.disable()
    try:
        owners.clear()
        thread.join(20)
    finally:
        gc.enable()
    assert not thread.is_alive()


@pytest.mark.parametrize("link", ["endless", "device"])
def test_a_process_ends_although_copies_are_under_way(link):
    program = f"""
import jax
from jmoe.residency.prefetch import Fetcher
from tests.residency.faulty_link import make_blob
from tests.residency.test_prefetch_ending import _{link}_link, _key
fetcher = Fetcher(_{link}_link(), lambda key: make_blob(key, 1 << 27))
fetcher.demand([_key(0), _key(1), _key(2)])
print("asked", flush=True)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "asked\n", "")


def _interrupt_in(seconds: float, handler: Callable | None = None):
    signal.signal(signal.SIGALRM, handler or signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)


@pytest.fixture
def alarms():
    old = signal.getsignal(signal.SIGALRM)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


def test_ctrl_c_ends_waiting_at_once_and_the_fetcher_goes_on(alarms):
    link = HeldLink()
    with Fetcher(link, make_blob) as fetcher:
        fetcher.demand([_key(0), _key(1), _key(2)])
        for ask in (lambda: fetcher.wait(_key(1)), fetcher.drain):
            _interrupt_in(0.05)
            with pytest.raises(KeyboardInterrupt):
                ask()
            fetcher.demand([_key(0), _key(1), _key(2)])
        link.let_arrive(3)
        for expert in range(3):
            np.testing.assert_array_equal(fetcher.wait(_key(expert)), make_blob(_key(expert)))
        fetcher.drain()
        assert len(link.started) == 3


class InstantLink:
    """No JAX, and nothing to wait for: it is the fetcher that is interrupted, not the backend."""

    hands_out_early = False

    def __init__(self):
        self.counters = LinkCounters()

    def start(self, blob: np.ndarray) -> Any:
        return blob

    def remaining_s(self, array: jax.Array) -> float:
        return 0.0

    def finish(self, array: jax.Array) -> None:
        pass

    def close(self) -> None:
        pass


class Interrupted(BaseException):
    pass


def test_an_interrupt_anywhere_leaves_a_fetcher_that_works(alarms):
    rng = random.Random(0)
    num_interrupts = 0

    def interrupt(*_):
        nonlocal num_interrupts
        num_interrupts += 1
        raise Interrupted

    def work(fetcher: Fetcher) -> None:
        keys = [_key(rng.randrange(20)) for _ in range(4)]
        fetcher.prefetch(keys)
        fetcher.demand(keys[:2])
        fetcher.cancel(keys[3])
        for key in dict.fromkeys(keys[:2]):
            if key != keys[3]:
                np.testing.assert_array_equal(fetcher.wait(key), make_blob(key))
        fetcher.drain()

    gc.disable()  # an interrupt in a finalizer would be a warning
    try:
        with Fetcher(InstantLink(), make_blob) as fetcher:
            work(fetcher)  # Thread.start() itself does not survive every interrupt
            end_s = time.monotonic() + 3
            while time.monotonic() < end_s:
                try:
                    _interrupt_in(rng.uniform(1e-5, 1e-3), interrupt)
                    while True:
                        work(fetcher)
                except Interrupted:
                    pass
                # As an engine does; nothing interrupts it now.
                fetcher.drain()
                assert fetcher.in_flight == frozenset()
                work(fetcher)
    finally:
        gc.enable()
    assert num_interrupts > 100
