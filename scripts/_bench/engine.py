"""The engine that is measured, and the same one without host kernels."""

from typing import NamedTuple

import numpy as np

from _bench.settings import Subject
from jmoe.engines.resident import ResidentEngine
from jmoe.errors import RequestError
from jmoe.generation.options import GenerationOptions
from jmoe.loading import Engine


class Run(NamedTuple):
    prefill_s: float
    decode_s: float
    tokens_BL: np.ndarray  # prompt and generated tokens


def run_engine(engine: Engine, prompts: np.ndarray, new_tokens: int) -> Run:
    """Seconds until the first token, and of new_tokens steps after it.

    Args:
      engine: what runs them.
      prompts: token ids int64 [B, L].
      new_tokens: decode steps.
    """
    # The first new token belongs to the prefill.
    batch = engine.start(prompts.tolist(), GenerationOptions(max_new_tokens=new_tokens + 1))
    tokens_BL = np.concatenate([prompts, np.stack(list(batch), axis=1)], axis=1)
    stats = batch.stats()
    assert stats.decode_tokens == len(prompts) * new_tokens
    return Run(stats.prefill_s, stats.decode_s, tokens_BL)


class XlaPeer:
    """The same weights, in the same memory, computed by XLA alone.

    Raises RequestError if that is what the engine does itself.
    """

    name = "jmoe without host kernels"

    def __init__(self, subject: Subject):
        engine = subject.engine
        if engine.host is None:
            raise RequestError(
                "--peer=xla compares the host kernels with XLA, and there are none in use",
                got="; ".join(subject.notes) or None,
                do="leave out --nohost_kernels and --peer",
            )
        self._engine = ResidentEngine(
            engine.config, engine.parameters, engine.dtype, engine.device, engine.quant
        )

    def run(self, prompts: np.ndarray, new_tokens: int) -> tuple[float, float]:
        """As ``run_engine``."""
        result = run_engine(self._engine, prompts, new_tokens)
        return result.prefill_s, result.decode_s
