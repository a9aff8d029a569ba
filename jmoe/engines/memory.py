"""Refusing work that does not fit, before any of it is started."""

import jax

from jmoe.errors import CapacityError
from jmoe.planning import memory


def check_fits(num_bytes: int, device: jax.Device, *, what: str, do: str) -> None:
    """Raises CapacityError if a device has fewer free bytes than are needed.

    The CPU backend's memory is the host's. A device that does not report its memory passes.
    """
    if device.platform == "cpu":
        available = memory.available_host_bytes()
    else:
        limit, in_use, _ = memory.device_memory(device)
        if limit is None:
            return
        available = limit - (in_use or 0)
    if num_bytes > available:
        raise CapacityError(
            f"{what} does not fit into the memory of {device}",
            got=f"{available / 2**30:.2f} GiB available",
            expected=f"{num_bytes / 2**30:.2f} GiB",
            do=do,
        )
