"""Figures of the embedded model that every machine and version must reproduce.

They were made once and are compared on every Python and JAX, with or without torch:

    python -m tests.equivalence.golden        # prints them again

The prompts are ones whose greedy continuations are never a near tie (min_gap), so that
arithmetic in another order cannot change them.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

import jmoe
from tests.equivalence import embedded, measures, running
from tests.resident_engine import resident_engine

GOLDEN_FILE = Path(__file__).with_name("golden.json")

PROMPTS = ("def main(", "    for name in ", "try:\n    import ")
NUM_LOGITS = 8


def compute(llm: jmoe.LLM) -> dict[str, Any]:
    """The figures of one machine, from the embedded model in float32."""
    prompts = []
    for text in PROMPTS:
        token_ids = llm.tokenizer.encode(text)
        (continuation,) = running.greedy(resident_engine(llm), [token_ids], measures.NEW_TOKENS)
        logits_LV = llm.engine.logits(token_ids + continuation[:-1])[len(token_ids) - 1 :]
        best_L2 = np.sort(logits_LV, axis=-1)[:, -2:]
        prompts.append(
            {
                "text": text,
                "token_ids": token_ids,
                "continuation": continuation,
                "min_gap": round(float(np.min(best_L2[:, 1] - best_L2[:, 0])), 4),
                "first_logits": [round(float(x), 4) for x in logits_LV[0, :NUM_LOGITS]],
            }
        )
    windows = embedded.top1_windows(llm.tokenizer)
    perplexity = measures.perplexity(llm.engine.logits, windows)
    return {"prompts": prompts, "perplexity_of_1000_positions": round(perplexity, 4)}


def main() -> None:
    text = json.dumps(compute(jmoe.load(dtype="float32")), indent=1)
    # Lists of numbers on one line.
    print(re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), text))


if __name__ == "__main__":
    main()
