"""One round of a soak: a batch of random prompts, disturbed in some way, and what came of it."""

import collections
import contextlib
import faulthandler
import random
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jmoe
from jmoe.errors import CapacityError, RequestError, TransferError
from jmoe.models import kv_cache

from .subject import Subject

# Prompts and new tokens together: one capacity, so that little time goes into compilation.
NUM_POSITIONS = kv_cache.MIN_CAPACITY
LONGEST_PROMPTS = (8, 30)
WAYS = ("to the end", "close", "drop", "keep in a cycle", "interrupt", "start another")
MEMORY_CHECKS = 0.1  # share of the rounds that they follow
# How far the sums of other arrays may be apart between two rounds: scalars that are still awaited.
SLACK_BYTES = 1 << 16


class Wrong(Exception):
    """What no soak may see: another text, or memory that is not given back."""


class Interrupted(BaseException):
    """Stands for Ctrl-C, which ends the soak itself."""


class Rounds:
    """Does rounds, and counts what happened.

    Attributes:
      counts: by kind.
    """

    def __init__(self, subject: Subject, seed: int, max_batch: int, silence_s: float):
        self.counts: collections.Counter[str] = collections.Counter()
        self._subject = subject
        self._random = random.Random(seed)
        self._max_batch = max_batch
        self._silence_s = silence_s
        self._other_bytes: dict[int, int] = {}  # by how many models there are
        signal.signal(signal.SIGALRM, _interrupt)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Ends the process with all stacks if nothing happens for long: with status 1."""
        self._awake()
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _awake(self) -> None:
        faulthandler.dump_traceback_later(self._silence_s, exit=True, file=sys.stderr)

    def do(self) -> None:
        """One round.

        Raises:
          Wrong: a token that the resident model does not give, or memory that is not given
            back.
        """
        rng, subject, link = self._random, self._subject, self._subject.link
        self._awake()
        self.counts["rounds"] += 1
        if rng.random() < 0.2:
            subject.set_budget(rng.uniform(0.15, 1.05))
        link.failure_rate = rng.choice((0, 0, 0.001, 0.01))
        link.slow_rate = rng.choice((0, 0, 0.05, 0.5))
        link.slow_s = rng.choice((1e-3, 1e-2))
        prompts, options = self._request()
        way = rng.choice(WAYS)
        texts: list[list[int]] = [[] for _ in prompts]
        ended = self._attempt(prompts, options, way, texts)
        self.counts[f"{way}: {ended}"] += 1
        self._check_text(prompts, options, texts, whole=ended == "whole")
        if rng.random() < MEMORY_CHECKS or self.counts["rounds"] == 1:
            self._check_memory()

    def _request(self) -> tuple[list[list[int]], dict[str, Any]]:
        rng, vocab_size = self._random, self._subject.llm.config.vocab_size
        batch_size = rng.randint(1, self._max_batch)
        longest = rng.choice(LONGEST_PROMPTS)
        prompts = [
            [rng.randrange(3, vocab_size) for _ in range(rng.randint(1, longest))]
            for _ in range(batch_size)
        ]
        options: dict[str, Any] = {"max_new_tokens": rng.choice((4, NUM_POSITIONS - longest))}
        if rng.random() < 0.4:
            options |= {"temperature": rng.uniform(0.2, 1.2), "seed": rng.randrange(2**32)}
        return prompts, options

    def _attempt(
        self,
        prompts: list[list[int]],
        options: dict[str, Any],
        way: str,
        texts: list[list[int]],
    ) -> str:
        """Generates into texts, and returns how that ended."""
        rng, llm = self._random, self._subject.llm
        if way == "interrupt":
            signal.setitimer(signal.ITIMER_REAL, rng.expovariate(4) + 1e-4)
        try:
            stream = llm.stream(prompts, **options)
            leave_at = rng.randrange(1, 40) if way not in ("to the end", "interrupt") else -1
            for num_chunks, chunk in enumerate(stream, 1):
                self._awake()
                texts[chunk.index] += chunk.token_ids
                self.counts["tokens"] += len(chunk.token_ids)
                if num_chunks == leave_at:
                    return self._leave(stream, way, texts)
            return "whole"
        except Interrupted:
            return "interrupted"
        except TransferError:
            return "a copy failed"
        except CapacityError:
            return "the budget is too small"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _leave(self, stream: Iterator[jmoe.Chunk], way: str, texts: list[list[int]]) -> str:
        if way == "close":
            stream.close()  # pyright: ignore[reportAttributeAccessIssue]
        elif way == "keep in a cycle":
            cycle: list[Any] = [stream]
            cycle.append(cycle)
        elif way == "start another":
            other = self._subject.llm.stream([[5, 6, 7]], max_new_tokens=4)
            try:
                for num_chunks, chunk in enumerate(stream):
                    texts[chunk.index] += chunk.token_ids
                    if num_chunks == len(texts):  # more than were made by then
                        raise Wrong("a generation went on although another one was started")
            except RequestError:
                pass
            self.counts["tokens"] += sum(len(chunk.token_ids) for chunk in other)
        return "left"

    def _check_text(
        self,
        prompts: list[list[int]],
        options: dict[str, Any],
        texts: list[list[int]],
        *,
        whole: bool,
    ) -> None:
        def agrees(expected: list[tuple[int, ...]]) -> bool:
            pairs = zip(texts, expected, strict=True)
            return all(
                tuple(text) == (right if whole else right[: len(text)]) for text, right in pairs
            )

        self._awake()
        if agrees(self._subject.expected(prompts, options)):
            return
        self._awake()
        expected = self._subject.second_opinion(prompts, options)
        if not agrees(expected):
            raise Wrong(f"got {texts}, expected {expected} for {prompts} with {options}")
        self.counts["ties decided by rounding"] += 1

    def _check_memory(self) -> None:
        """No array but experts, as many as have places, stays from one round to the next."""
        subject = self._subject
        subject.link.failure_rate = 0.0
        subject.set_budget(1.0)
        subject.llm.generate([5, 6, 7], max_new_tokens=4)  # so that it is always the same one
        held = subject.held()
        if held.num_experts > held.num_places:
            raise Wrong(f"{held.num_experts} experts in memory, and {held.num_places} places")
        before = self._other_bytes.setdefault(held.num_models, held.other_bytes)
        if held.other_bytes > before + SLACK_BYTES:
            raise Wrong(f"{held.other_bytes} bytes of other arrays, and {before} at first")
        self.counts["memory checks"] += 1


def _interrupt(_: int, frame: FrameType | None) -> None:
    # An exception in there would be lost, and told on stderr.
    if frame is None or frame.f_code.co_name != "_xla_gc_callback":
        raise Interrupted
