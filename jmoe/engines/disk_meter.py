"""What a batch had from the disk, phase by phase."""

from jmoe.metrics import DiskStats, DiskTraffic
from jmoe.store.disk_tier import DiskCounts, DiskTier


class DiskMeter:
    """Counts for one batch; does nothing if all experts are in memory."""

    def __init__(self, disk: DiskTier | None):
        self._disk = disk
        self._since = self._count()
        self._prefill = DiskTraffic.none()
        self._final: DiskStats | None = None

    def begin(self) -> None:
        """Says that prompts are read from here on."""
        self._since = self._count()

    def prefilled(self) -> None:
        """Says that they are read."""
        if self._disk is not None and self._since is not None:
            before, self._since = self._since, self._disk.counts()
            self._prefill = self._since - before

    def end(self) -> None:
        """Says that the batch has ended: what comes is another one's."""
        self._final = self.stats()

    def stats(self) -> DiskStats | None:
        """So far; None if there is nothing to count."""
        if self._final is not None or self._disk is None or self._since is None:
            return self._final
        return self._disk.stats(self._prefill, self._disk.counts() - self._since)

    def _count(self) -> DiskCounts | None:
        return self._disk and self._disk.counts()
