"""The side of a peer's process: loads once, then runs what it is asked to.

The process is started as ``python -m _peers.NAME_worker`` in the peer's own Python, where jmoe need
not be installed: this module and ``q4_0`` import the standard library only. Lines of JSON come in
on stdin, the first with the settings; lines of JSON go out on what was stdout. Everything that
libraries print goes to stderr.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol


class Run(NamedTuple):
    """One prompt, and tokens after it, greedily."""

    prefill_s: float  # until the first new token is known
    decode_s: float  # of the steps after it


class Peer(Protocol):
    """A loaded model.

    Attributes:
      facts: what to say of it: "name", "weights", "bytes_per_token", and more.
    """

    facts: dict[str, Any]

    def run(self, prompt: list[int], new_tokens: int) -> Run: ...

    def extra(self) -> dict[str, Any]:
        """What else to measure beside a run."""
        ...


def serve(load: Callable[[dict[str, Any]], Peer]) -> None:
    """Answers until stdin is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        peer = load(json.loads(sys.stdin.readline()))
        answer(peer.facts)
        for line in sys.stdin:
            request = json.loads(line)
            run = peer.run(request["prompt"], request["new_tokens"])
            answer(run._asdict() | peer.extra())
    except Exception as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)
