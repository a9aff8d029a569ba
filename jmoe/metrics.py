"""What happened: counters and times of a run."""

import dataclasses
import time


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStats:
    """Work and time of one call to generate, over all its sequences.

    The first new token of a sequence comes out of the prefill, so decode_tokens, the tokens
    that decode steps made, are one fewer per sequence than the new tokens; decode_tok_per_s
    divides steps by the time of the same steps. Compilation is never part of the other
    times.
    """

    num_sequences: int
    prefill_tokens: int  # of all prompts, without padding
    prefill_s: float  # until the first new token of every sequence is on the host
    new_tokens: int
    decode_tokens: int
    decode_s: float
    compile_s: float  # compiling programs and running each once
    compiled_programs: int  # in this call; 0 once warm

    @property
    def prefill_tok_per_s(self) -> float:
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tok_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0

    def to_json(self) -> dict:
        return dataclasses.asdict(self) | {
            "prefill_tok_per_s": self.prefill_tok_per_s,
            "decode_tok_per_s": self.decode_tok_per_s,
        }


class Stopwatch:
    """Adds up the seconds spent inside ``with stopwatch:``."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exc_info):
        self.seconds += time.perf_counter() - self._start
