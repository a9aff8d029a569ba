"""OUT.partial: where a conversion works until it is complete, and what it remembers.

The directory is locked while a process works in it. A journal in it says what is to become of it
and which files are finished; it is replaced after every file. At the end the manifest is written,
the journal goes, and the directory gets its name: killed at any moment, OUT is absent or complete.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jmoe.errors import CapacityError, CheckpointError, RequestError
from jmoe.store.json_files import read_json_object
from jmoe.store.manifest import (
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
    PROGRESS_NAME,
    FileEntry,
    hash_file,
)
from jmoe.store.safetensors_writer import sync_directory, write_file


class PartialDirectory:
    """The directory OUT.partial, locked by this process.

    Attributes:
      path: of the directory.
      finished: files that are complete and, after a resumption, verified.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], *, resume: bool):
        """Creates the directory, or goes on with what an interrupted conversion left.

        Args:
          output: what the directory is to become.
          settings: JSON; all that must be equal for the finished files to be of use.
          resume: go on with an existing directory, if there is one.

        Raises:
          RequestError: the output exists, or another process works on it; or a conversion was
            interrupted and is not to be resumed, or was another one.
          CheckpointError: the journal is damaged.
          OSError: the directory cannot be made.
        """
        self.path = partial_path(output)
        self.finished: dict[str, FileEntry] = {}
        self._output = output
        self._settings = dict(settings)
        try:
            os.mkdir(self.path)
            self._created = True
        except FileExistsError:
            self._created = False
        self._lock = _lock_directory(self.path, output)
        try:
            if not self._created:
                self._check_left_behind(resume)
            require_absent(output)
            self._write_journal()
        except BaseException:
            self.leave()
            raise

    def _check_left_behind(self, resume: bool) -> None:
        if not resume:
            raise RequestError(
                "an interrupted conversion is in the way",
                where=self.path,
                do="add --resume to go on with it, or delete it",
            )
        journal = _read_journal(self.path)
        if journal is None:  # killed before anything was done
            return
        for key, value in self._settings.items():
            # The manifest, which takes the place of the journal, does not hold all settings.
            if journal.get(key, value) != value:
                raise RequestError(
                    f"the interrupted conversion was another one: its {key} differs",
                    where=self.path,
                    got=_shown(value),
                    expected=_shown(journal[key]),
                    do="resume it with the flags and the source that it was started with, "
                    "or delete it",
                )
        for name, entry in journal["files"].items():
            try:
                intact = hash_file(self.path / name) == entry["sha256"]
            except CheckpointError:  # missing
                intact = False
            if intact:
                self.finished[name] = FileEntry(entry["bytes"], entry["sha256"])

    def add(self, name: str, entry: FileEntry) -> None:
        """Remembers that a file of the directory is complete (OSError)."""
        self.finished[name] = entry
        self._write_journal()

    def publish(self, manifest: bytes) -> None:
        """Completes the store and gives it its name.

        Raises:
          RequestError: something of this name came into being meanwhile.
          OSError: of the file system.
        """
        write_file(self.path, MANIFEST_NAME, manifest)
        (self.path / PROGRESS_NAME).unlink()
        sync_directory(self.path)
        require_absent(self._output)
        try:
            os.rename(self.path, self._output)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                require_absent(self._output)
            raise
        sync_directory(self._output.parent)

    def leave(self) -> Path | None:
        """Unlocks the directory, and removes it if nothing in it is of use.

        Returns:
          The directory if it is kept.
        """
        kept = None
        try:
            if self.finished or not self._created:
                kept = self.path if self.path.exists() else None
            elif self.path.exists():
                for file in self.path.iterdir():
                    file.unlink()
                self.path.rmdir()
        finally:
            os.close(self._lock)
        return kept

    def _write_journal(self) -> None:
        files = {
            name: {"bytes": entry.num_bytes, "sha256": entry.sha256}
            for name, entry in self.finished.items()
        }
        journal = self._settings | {"files": files}
        write_file(self.path, PROGRESS_NAME, json.dumps(journal, indent=1).encode())


def partial_path(output: Path) -> Path:
    return output.with_name(output.name + PARTIAL_SUFFIX)


def require_space(directory: Path, num_bytes: int, *, what: str, do: str) -> None:
    """Raises CapacityError if the disk of a directory has not so much room (or OSError)."""
    free = shutil.disk_usage(directory).free
    if num_bytes > free:
        raise CapacityError(
            f"{what} on the disk",
            where=directory,
            got=f"{free / 2**30:,.2f} GiB free",
            expected=f"{num_bytes / 2**30:,.2f} GiB",
            do=do,
        )


def require_absent(output: Path) -> None:
    """Raises RequestError if there is anything of this name."""
    if os.path.lexists(output):
        raise RequestError(
            "the output exists already",
            where=output,
            do="choose another --output, or delete it",
        )


def _lock_directory(path: Path, output: Path) -> int:
    """Locks a directory, and returns the descriptor that holds the lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # the process that had it has just finished
        require_absent(output)
        raise
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(
                "another process is converting to this output",
                where=output,
                do="wait for it, or choose another --output",
            ) from None
        except OSError:
            # No locks on directories, as with NFS. There the exclusive mkdir must do: only
            # --resume beside a running conversion goes unnoticed.
            pass
        if not path.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            require_absent(output)  # the process that had the lock has finished
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _read_journal(directory: Path) -> dict[str, Any] | None:
    """The journal, or the manifest in its place once the journal is gone."""
    for name in (PROGRESS_NAME, MANIFEST_NAME):
        if (directory / name).exists():
            journal = read_json_object(directory / name)
            break
    else:
        return None
    match journal.get("files"):
        case dict(files) if all(_is_entry(entry) for entry in files.values()):
            return journal
    raise CheckpointError(
        f"{name} is damaged", where=directory, do="delete the directory and convert again"
    )


def _is_entry(entry: Any) -> bool:
    match entry:
        case {"bytes": int(), "sha256": str()}:
            return True
    return False


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)[:300]
