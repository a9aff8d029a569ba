"""Experts in mapped files: their bytes, how the system is to read them, and how fast it does."""

import concurrent.futures
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jmoe.store import page_cache
from jmoe.store.host_memory import FileRange
from jmoe.store.reading_queue import PIECE_BYTES, BlobKey

_MEASURE_S = 0.25
_MAX_MEASURED = 8
_MAX_TRIED = 32


class DiskSpeed(NamedTuple):
    """How fast missing experts came into memory.

    Attributes:
      bytes_per_s: of experts.
      num_experts: that were read for that.
      seconds: that it took.
    """

    bytes_per_s: float
    num_experts: int
    seconds: float


class MappedExperts:
    """Views of every expert's bytes, and their pages.

    The memory lives as long as this, or any view of it.

    Attributes:
      blob_bytes: of an expert.
      reads_exactly: the system was told to read nothing that is not asked for.
      is_told: the system says which pages are in memory.
    """

    def __init__(self, layers: Sequence[np.ndarray], files: Sequence[FileRange]):
        """Args:
        layers: by layer uint8 [num_experts, bytes of a blob], mapped.
        files: where they are.
        """
        self._layers = tuple(layers)
        self._files = tuple(files)
        self.blob_bytes = layers[0].shape[1]
        self.reads_exactly = False
        self.is_told = all(page_cache.is_told(file.path) for file in files)
        self._ask_first = False

    @property
    def num_bytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers)

    @property
    def keys(self) -> Iterator[BlobKey]:
        """All experts, layer by layer."""
        return itertools.product(range(len(self._layers)), range(len(self._layers[0])))

    def blob(self, key: BlobKey) -> np.ndarray:
        """uint8 [blob_bytes]; may not be in memory."""
        return self._layers[key[0]][key[1]]

    def missing_bytes(self, view: np.ndarray) -> int:
        """Of the pages of a view, those that are not in memory; 0 if the system does not say."""
        return page_cache.missing_bytes(view)

    def read(self, view: np.ndarray) -> None:
        """Waits until all pages of a view are in memory, or cannot be read."""
        if self._ask_first:
            page_cache.request(view)
        page_cache.populate(view)

    def lock(self, key: BlobKey) -> str | None:
        """Keeps an expert in memory, from when it is read; returns why that is refused, or None."""
        return page_cache.lock(self.blob(key))

    def unlock(self, key: BlobKey) -> None:
        page_cache.unlock(self.blob(key))

    def unlock_all(self) -> None:
        for layer in self._layers:
            page_cache.unlock_all(layer)

    def drop(self) -> None:
        """Gives up all pages that are not locked: the next use reads the disk."""
        for layer, file in zip(self._layers, self._files, strict=True):
            page_cache.drop(layer, file.path)

    def read_exactly(self) -> None:
        """Lets the system read nothing beside what is asked for: what is read drives out more.

        Left alone it reads up to several MiB around and behind each missing page, a third more than
        an expert of 24 MiB.
        """
        window = next(self._missing_windows(), None)
        if window is not None and page_cache.reads_large(window):
            for layer in self._layers:
                page_cache.advise_random(layer)
        else:
            self._ask_first = True
        self.reads_exactly = True

    def measure(self, num_threads: int) -> DiskSpeed | None:
        """Reads a few experts that are not in memory, for a quarter of a second or little more.

        One after another, each by so many threads.

        Returns:
          None if there were none.
        """
        keys = list(self.keys)
        seconds, num_read = 0.0, 0
        order = np.random.default_rng().permutation(len(keys))
        with concurrent.futures.ThreadPoolExecutor(num_threads, "jmoe-measure") as pool:
            for i in order[:_MAX_TRIED]:
                blob = self.blob(keys[i])
                if self.missing_bytes(blob) < blob.nbytes:
                    continue
                starts = range(0, blob.nbytes, PIECE_BYTES)
                start_s = time.perf_counter()
                list(pool.map(self.read, [blob[start : start + PIECE_BYTES] for start in starts]))
                seconds += time.perf_counter() - start_s
                num_read += 1
                if seconds > _MEASURE_S or num_read == _MAX_MEASURED:
                    break
        if not num_read:
            return None
        return DiskSpeed(num_read * self.blob_bytes / seconds, num_read, seconds)

    def _missing_windows(self) -> Iterator[np.ndarray]:
        """Ranges nothing of which is in memory, as large as ``page_cache.reads_large`` wants."""
        size = page_cache.LARGE_WINDOW_BYTES
        for layer in self._layers:
            flat = layer.reshape(-1)
            for start in {0, max(0, (flat.size - size) // 2), max(0, flat.size - size)}:
                window = flat[start : start + size]
                if window.size == size and self.missing_bytes(window) >= size:
                    yield window
