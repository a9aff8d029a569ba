"""Programs see what the host wrote last."""

import jax
import numpy as np

from jmoe.residency.mailbox import Mailbox


def test_a_program_reads_what_was_posted_last():
    mailbox = Mailbox(jax.local_devices()[0], (2, 3))
    pointer = mailbox.array.unsafe_buffer_pointer()

    @jax.jit
    def double(array):
        return 2 * jax.device_put(array, jax.memory.Space.Device)

    for i in range(5):
        value = np.arange(6, dtype=np.float32).reshape(2, 3) + i
        np.testing.assert_array_equal(double(mailbox.post(value)), 2 * value)
    assert mailbox.array.unsafe_buffer_pointer() == pointer
    assert mailbox.array.sharding.memory_kind == "pinned_host"
