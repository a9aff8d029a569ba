"""Reading ranges of files into memory, and how readers tell of their progress."""

import os
from collections.abc import Callable
from pathlib import Path

from jmoe.errors import CheckpointError

# Told the size of every piece, once it is read.
OnBytes = Callable[[int], object]


def ignore_bytes(num_bytes: int) -> None:
    """An OnBytes that does nothing."""


def read_range(path: Path, offset: int, destination: memoryview, *, do: str) -> None:
    """Fills memory from a file.

    Args:
      path: the file.
      offset: of the first byte to read.
      destination: bytes, as many as to read.
      do: the remedy if the file is too short.

    Raises:
      CheckpointError: the file is too short, or cannot be read.
    """
    done, num_bytes = 0, len(destination)
    try:
        with open(path, "rb", buffering=0) as file:
            while done < num_bytes:  # one call reads at most 2 GiB, and may read less
                count = os.preadv(file.fileno(), [destination[done:]], offset + done)
                if count == 0:
                    raise too_short(path, offset + done, offset + num_bytes, do)
                done += count
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be read", where=path.parent, got=error.strerror
        ) from None


def too_short(path: Path, num_bytes: int, expected_bytes: int, do: str) -> CheckpointError:
    """The error for a file that was longer when its header was read."""
    return CheckpointError(
        f"{path.name} became shorter after it was opened",
        where=path.parent,
        got=f"{num_bytes} bytes",
        expected=f"at least {expected_bytes}",
        do=do,
    )
