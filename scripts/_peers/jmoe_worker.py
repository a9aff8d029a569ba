"""jmoe on random weights, and the speed at which the memory can be read beside it."""

import os
from typing import Any

from _peers.worker import Run, serve


class Jmoe:
    """A loaded model.

    Args:
      settings: "model" and "loading", the arguments of jmoe.load; "threads".
    """

    def __init__(self, settings: dict[str, Any]):
        os.environ["PJRT_NPROC"] = str(settings["threads"])
        from _bench import bounds
        from _bench.ceiling import Ceiling

        import jmoe

        llm = jmoe.load(settings["model"], **settings["loading"])
        self._engine = llm.engine
        config, dtype, quant = llm.config, llm.engine.dtype, llm.quant
        self._ceiling = Ceiling(llm.engine.device, dtype)
        self.facts = {
            "name": f"jmoe {jmoe.__version__}",
            "weights": dtype if quant is None else str(quant),
            "bytes_per_token": bounds.weight_bytes_per_step(
                config, dtype, config.router.top_k, quant
            ),
            "threads": settings["threads"],
            "notes": list(llm.notes),
            "read_how": self._ceiling.read_how,
        }

    def run(self, prompt: list[int], new_tokens: int) -> Run:
        import numpy as np
        from _bench.engine import run_engine

        result = run_engine(self._engine, np.array([prompt]), new_tokens)
        return Run(result.prefill_s, result.decode_s)

    def extra(self) -> dict[str, Any]:
        return {"read_bytes_per_s": self._ceiling.read_bytes_per_s()}


if __name__ == "__main__":
    serve(Jmoe)
