"""A peer in a process of its own, spoken to through pipes."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jmoe.errors import RequestError

_SCRIPTS = Path(__file__).parents[1]
_TAIL_LINES = 8


class PeerProcess:
    """Started and loaded when it is made; runs until ``close``.

    Attributes:
      facts: what the worker says of what it loaded.

    Raises:
      RequestError: the worker failed, here or in ``run``; with the end of what it printed.
    """

    def __init__(self, name: str, command: list[str], settings: dict[str, Any]):
        """
        Args:
          name: of the peer, for errors.
          command: starts a worker (``worker.serve``).
          settings: what it loads.
        """
        self._name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        paths = [str(_SCRIPTS), str(_SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
                text=True,
            )
        except OSError as error:
            self._errors.close()
            raise RequestError(
                f"{name} could not be started", where=command[0], got=error.strerror
            ) from None
        try:
            self.facts = self._ask(settings)
        except BaseException:
            self.close()
            raise

    def run(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """The seconds of a run, and what the worker measures beside it."""
        return self._ask({"prompt": prompt, "new_tokens": new_tokens})

    def close(self) -> None:
        """Ends the process, and waits for it to be gone with its memory."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            try:
                file.close()
            except BrokenPipeError:  # what was not sent yet cannot be any more
                continue

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            answer = json.loads(line)
        else:
            status = self._process.wait()
            answer = {"error": f"its process ended with status {status}; it printed{self._tail()}"}
        if "error" in answer:
            raise RequestError(f"{self._name} failed", got=answer["error"])
        return answer

    def _tail(self) -> str:
        """The last lines that the process printed, indented."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        return "".join(f"\n    {line}" for line in lines[-_TAIL_LINES:]) or " nothing"


def worker_command(module: str, python: str = sys.executable) -> list[str]:
    """Starts a module of this package as a worker."""
    return [python, "-m", f"_peers.{module}"]
