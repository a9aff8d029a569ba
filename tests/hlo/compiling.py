"""Compiles cases for the H100 in worker processes, which may die without harm."""

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

REPOSITORY = Path(__file__).parents[2]
WORKER = (sys.executable, "-m", "tests.hlo.worker")


class CompilationFailed(Exception):
    """The compiler refused a program, or ended its process."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of a case.

    Attributes:
      temp_bytes: scratch memory of the program: neither argument nor result.
      donated_bytes: of arguments that results take over.
      arrays: (dtype, text, bytes) of arrays that it writes, if large, largest first.
      num_kernels: kernels and copies in the program's text.
      num_launches: of these that run, if loops of unknown length have nothing to do.
      num_host_loops: loops that stop for the host at every iteration, and branches that do.
      compile_s: how long it took, on a machine that may have been busy.
    """

    LISTED_BYTES: ClassVar[int] = 2**18

    temp_bytes: int
    donated_bytes: int
    arrays: list[tuple[str, str, int]]
    num_kernels: int
    num_launches: int
    num_host_loops: int
    compile_s: float

    def largest_bytes(self, dtypes: Iterable[str], besides: str | None = None) -> int:
        """Of the arrays of these types, but for one; 0 if none is large enough to be listed."""
        sizes = (size for dtype, text, size in self.arrays if dtype in dtypes and text != besides)
        return max(sizes, default=0)


class Compilations:
    """Compiles all cases given, two at a time, and hands out reports as they are asked for."""

    def __init__(self, cases: Iterable[str], num_workers: int = 2, command: Sequence[str] = WORKER):
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(num_workers):
            self._idle.put(_Worker(command))
        self._threads = ThreadPoolExecutor(num_workers)
        self._reports: dict[str, Future[Report]] = {}
        for case in cases:
            self._reports[case] = self._threads.submit(self._compile, case)

    def report(self, case: str) -> Report:
        """Waits for a case (CompilationFailed)."""
        return self._reports[case].result()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().stop()

    def _compile(self, case: str) -> Report:
        worker = self._idle.get()
        try:
            return worker.compile(case)
        finally:
            self._idle.put(worker)


class _Worker:
    """A process that compiles; started when there is something to do, and again if it died."""

    def __init__(self, command: Sequence[str]):
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by stop)

    def compile(self, case: str) -> Report:
        self._process = self._process or self._start()
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: there is no answer
            self._process.stdin.write(case + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise CompilationFailed(f"the compiler's process ended:\n{self._end()}")
        answer = json.loads(line)
        if "error" in answer:
            raise CompilationFailed(answer["error"])
        return Report(**answer)

    def stop(self) -> None:
        if self._process is not None:
            self._end()
        self._log.close()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command,
            cwd=REPOSITORY,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def _end(self) -> str:
        """Lets the process end; returns how it did, and its last words."""
        process, self._process = self._process, None
        assert process is not None
        process.communicate()
        self._log.seek(0)
        words = self._log.read().splitlines()[-20:]
        self._log.truncate(0)
        return "\n".join([f"exit status {process.returncode}", *words])
