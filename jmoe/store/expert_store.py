"""All experts of a model in host memory, as blobs: one copy, for everyone who needs them.

Knows bytes, not arithmetic. The CPU backend computes from these bytes, transfers to a device
start from them, and if they are mapped they are those of the file.
"""

from collections.abc import Sequence
from typing import Self

import jax
import numpy as np

from jmoe.quant.layout import ALIGNMENT, ExpertLayout
from jmoe.store.disk_tier import DiskTier
from jmoe.store.host_memory import (
    FileRange,
    HostMemory,
    allocate,
    choose_host_memory,
    map_file,
    read_files,
)
from jmoe.store.page_lock import PageLock, lock_pages
from jmoe.store.reading import OnBytes, ignore_bytes


class ExpertStore:
    """Blobs of every expert, layer by layer.

    Attributes:
      layout: of each blob.
      num_layers: of the model.
      num_experts: per layer.
      memory: "mmap" (pages of the files) or "ram".
      memory_reason: why that, for the user.
      disk: what brings mapped experts into memory; None before ``open_disk``.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        layers: Sequence[np.ndarray],
        memory: HostMemory,
        memory_reason: str,
        spare_bytes: int = 0,
        files: Sequence[FileRange] = (),
    ):
        """Takes over arrays that are in memory; they must not be changed afterwards.

        Args:
          layout: of each blob.
          layers: by layer uint8 [num_experts, layout.num_bytes], C-contiguous and at a multiple
            of 64, so that the CPU backend takes them without a copy.
          memory: what kind of memory this is.
          memory_reason: why.
          spare_bytes: memory that is free besides, for moving them (``lock_pages``); below 0 is
            what is missing for them.
          files: by layer what is mapped.
        """
        self.layout = layout
        self.num_layers = len(layers)
        self.num_experts = layers[0].shape[0]
        self.memory: HostMemory = memory
        self.memory_reason = memory_reason
        self._layers: list[np.ndarray] = [self._read_only(layer) for layer in layers]
        self.disk: DiskTier | None = None
        self._files = files
        self._spare_bytes = spare_bytes
        self._page_lock: PageLock | None = None

    @classmethod
    def open(
        cls,
        layout: ExpertLayout,
        files: Sequence[FileRange],
        *,
        host_memory: str,
        available_bytes: int,
        on_bytes: OnBytes = ignore_bytes,
    ) -> Self:
        """Maps or loads the experts of a model.

        Args:
          layout: of each blob.
          files: by layer where its blobs are, one after another.
          host_memory: "auto", "mmap" or "ram".
          available_bytes: free memory.
          on_bytes: told how much was loaded, piece by piece; not called for a mapping.

        Raises:
          ConfigError: unknown kind of memory.
          CapacityError: not enough memory.
          CheckpointError: a file became shorter or unreadable.
        """
        num_bytes = sum(file.num_bytes for file in files)
        memory, reason = choose_host_memory(num_bytes, host_memory, available_bytes)
        if memory == "mmap":
            layers = [map_file(file) for file in files]
        else:
            # By layer and not in one piece, so that layers can move one by one (lock_pages).
            layers = [allocate(file.num_bytes) for file in files]
            read_files(list(zip(files, layers, strict=True)), on_bytes)
        shape = (-1, layout.num_bytes)
        layers = [layer.reshape(shape) for layer in layers]
        spare_bytes = available_bytes - num_bytes
        return cls(layout, layers, memory, reason, spare_bytes=spare_bytes, files=files)

    @property
    def num_bytes(self) -> int:
        """Of all blobs."""
        return self.num_layers * self.num_experts * self.layout.num_bytes

    def layer(self, layer: int) -> np.ndarray:
        """The blobs of a layer: uint8 [num_experts, layout.num_bytes], never a copy.

        C-contiguous, read-only, at a multiple of 64. The memory lives as long as any view of it.
        """
        assert self._layers, "the expert store is closed"
        return self._layers[layer]

    def blob(self, key: tuple[int, int]) -> np.ndarray:
        """The bytes of an expert, by layer and number; from a disk when they have come."""
        if self.disk is not None:
            return self.disk.read(key)
        return self.layer(key[0])[key[1]]

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """Says that experts will be read where they lie, now; see ``bring``."""
        if self.disk is not None:
            self.disk.demand([(layer, expert) for expert in experts])

    def bring(self, layer: int, experts: Sequence[int]) -> None:
        """Waits until experts are in memory that will be read where they lie."""
        if self.disk is not None:
            for expert in experts:
                self.disk.read((layer, expert))

    def open_disk(
        self, available_bytes: int, *, has_hints: bool = True, read_ahead: bool = True
    ) -> DiskTier | None:
        """Takes care of what is in memory and what is not, from now on, if files are mapped.

        Args:
          available_bytes: free memory.
          has_hints: whether somebody will say what is needed, predicted or popular.
          read_ahead: whether to read what is predicted.

        Returns:
          What does that; None if all experts are in memory of their own.
        """
        is_mapped = self.memory == "mmap" and not (self._page_lock and self._page_lock.pinned)
        if self.disk is None and is_mapped:
            wanted, _ = choose_host_memory(self.num_bytes, "auto", available_bytes)
            self.disk = DiskTier(
                self._layers,
                self._files,
                available_bytes=available_bytes,
                is_larger=wanted == "mmap",
                has_hints=has_hints,
                read_ahead=read_ahead,
            )
        return self.disk

    def lock_pages(self, device: jax.Device, *, as_arrays: bool = False) -> PageLock:
        """Locks the memory for transfers to a device, once: later calls return the same lock.

        May move the blobs to other memory, and so comes before anybody asks for ``layer``.

        Args:
          device: where transfers go.
          as_arrays: whether programs on the device are to read the memory; a mapped file moves
            into memory for that, if there is room.
        """
        assert self._layers, "the expert store is closed"
        if self._page_lock is None:
            self._page_lock = lock_pages(
                self._layers,
                device,
                may_move=self.memory == "ram" or as_arrays,
                may_register=self.memory == "ram" or self._spare_bytes >= 0,
                spare_bytes=self._spare_bytes,
                dtype=self.layout.dtype,
                as_arrays=as_arrays,
            )
        return self._page_lock

    def close(self) -> None:
        """Unlocks the memory, and gives it back once nobody holds a view; may be called again."""
        if self.disk is not None:
            self.disk.close()
        if self._page_lock is not None:
            self._page_lock.close()
        self._layers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read_only(self, layer: np.ndarray) -> np.ndarray:
        assert layer.dtype == np.uint8 and layer.flags.c_contiguous
        assert layer.shape == (self.num_experts, self.layout.num_bytes)
        assert layer.ctypes.data % ALIGNMENT == 0
        view = layer.view()
        view.flags.writeable = False
        return view
