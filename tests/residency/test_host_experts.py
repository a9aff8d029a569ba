"""Experts computed in the background: results, counters, and what happens if that goes wrong."""

import gc
import threading
import weakref

import numpy as np
import pytest

from jmoe.errors import ComputeError
from jmoe.residency.host_experts import THREAD_NAME, HostExperts, ThrottledCompute
from jmoe.residency.timeline import Timeline

BLOB_BYTES = 100


def product(layer, x_TD, rows_R, ids_R):
    """Rows times expert plus layer; zeros without expert."""
    x_RD = np.asarray(x_TD)[rows_R]
    return np.where(ids_R[:, None] >= 0, x_RD * ids_R[:, None] + layer, 0).astype(np.float32)


def start(host: HostExperts, layer: int = 1):
    x_TD = np.ones((3, 2), np.float32)
    return host.start(layer, x_TD, np.array([0, 1, 2]), np.array([5, -1, 7], np.int32))


def test_results_and_counters():
    with_timeline = Timeline()
    host = HostExperts(product, BLOB_BYTES, with_timeline)
    y_RD = host.wait(start(host))
    np.testing.assert_array_equal(y_RD, [[6, 6], [0, 0], [8, 8]])
    counters = host.counters
    assert (counters.experts, counters.rows, counters.bytes) == (2, 2, 2 * BLOB_BYTES)
    assert counters.busy_s > 0
    host.close()


def test_a_failure_is_an_error_that_names_the_experts_and_the_next_job_works():
    fails = [True]

    def compute(*arguments):
        if fails:
            fails.clear()
            raise ValueError("no luck")
        return product(*arguments)

    host = HostExperts(compute, BLOB_BYTES)
    job = start(host)
    with pytest.raises(ComputeError, match=r"layer 1, experts 5, 7") as error:
        host.wait(job)
    assert "no luck" in str(error.value)
    assert host.counters.experts == 0
    assert host.wait(start(host)).any()
    host.close()


def test_a_job_that_does_not_end_is_an_error_and_no_hang():
    released = threading.Event()

    def compute(*arguments):
        released.wait()
        return product(*arguments)

    host = HostExperts(compute, BLOB_BYTES, stall_s=0.01)
    job = start(host)
    for _ in range(2):
        with pytest.raises(ComputeError, match="come to a halt"):
            host.wait(job)
    with pytest.raises(ComputeError, match="come to a halt"):
        start(host)  # the thread is still busy
    released.set()
    job.done.acquire()
    job.done.release()
    assert host.wait(start(host)).any()
    host.close()


def test_a_job_that_nobody_waited_for_does_not_disturb_the_next():
    host = HostExperts(product, BLOB_BYTES)
    start(host, layer=1)
    np.testing.assert_array_equal(host.wait(start(host, layer=3))[0], [8, 8])
    start(host)
    host.settle()
    host.close()


def test_closed_is_an_error():
    host = HostExperts(product, BLOB_BYTES)
    host.close()
    host.close()
    with pytest.raises(ComputeError, match="closed"):
        start(host)


def test_closing_ends_whoever_waits():
    begun, released = threading.Event(), threading.Event()

    def compute(*arguments):
        begun.set()
        released.wait()
        return product(*arguments)

    host = HostExperts(compute, BLOB_BYTES, stall_s=0.01)
    job = start(host)
    begun.wait()
    host._worker.stop()
    with pytest.raises(ComputeError, match="closed"):
        host.wait(job)
    released.set()
    host.close()


def test_one_that_is_dropped_ends_its_thread():
    host = HostExperts(product, BLOB_BYTES)
    thread = host._worker._thread
    assert thread.name == THREAD_NAME and thread.is_alive()
    reference = weakref.ref(host)
    del host
    gc.collect()
    assert reference() is None
    thread.join(10)
    assert not thread.is_alive()


def test_a_throttled_host_computes_the_same():
    compute = ThrottledCompute(product, BLOB_BYTES, bytes_per_s=1e6)
    arguments = 2, np.ones((3, 2), np.float32), np.array([0, 1, 2]), np.array([5, -1, 7])
    np.testing.assert_array_equal(compute(*arguments), product(*arguments))
