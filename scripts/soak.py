"""Runs a model with offloaded experts for a while, and disturbs it in every way there is.

Batches of random prompts, greedy or sampled; callers that leave, interrupt or start another
generation in the middle; budgets that change; copies that fail or are late. Every token is
compared with those of the resident model. Ends with status 1 at the first wrong token, if a thread
or memory stays behind, or, with all stacks on stderr, if nothing happens for --silence_s. One JSON
object goes to stdout, progress to stderr if that is a terminal.

Examples:
  python scripts/soak.py
  python scripts/soak.py --minutes=60 --seed=7
  python scripts/soak.py --engine=compiled
  python scripts/soak.py --minutes=1 --quant=attn4-experts4 --max_batch=2 | jq .counts
"""

import sys
import time

import _common
from absl import flags

_MINUTES = flags.DEFINE_float("minutes", 10.0, "How long to go on.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of everything that is random.", lower_bound=0)
_MODEL = flags.DEFINE_string("model", None, "As of generate.py. Default: the embedded model.")
_QUANT = flags.DEFINE_string("quant", None, "Formats of the weights, as of generate.py.")
_ENGINE = flags.DEFINE_enum(
    "engine", "thread", ["auto", "thread", "compiled"], "As of generate.py."
)
_MAX_BATCH = flags.DEFINE_integer("max_batch", 4, "Most prompts at once.", lower_bound=1)
_SILENCE_S = flags.DEFINE_float(
    "silence_s", 120.0, "Seconds without a token after which it is a deadlock.", lower_bound=1.0
)

EXIT_FAILED = 1


def main() -> None:
    import psutil
    from _soak.rounds import Rounds, Wrong
    from _soak.subject import Subject

    process = psutil.Process()
    subject = Subject(_MODEL.value, _QUANT.value, _ENGINE.value, _SEED.value)
    rounds = Rounds(subject, _SEED.value, _MAX_BATCH.value, _SILENCE_S.value)
    problem, started = None, time.monotonic()
    rss_bytes: list[int] = []
    with rounds.watched():
        try:
            while not rss_bytes or time.monotonic() - started < 60 * _MINUTES.value:
                _show(f"round {rounds.counts['rounds'] + 1}, {rounds.counts['tokens']} tokens ...")
                rounds.do()
                rss_bytes.append(process.memory_info().rss)
        except Wrong as error:
            problem = str(error)
        finally:
            _show("")
        threads = subject.close()
    if threads and problem is None:
        problem = f"threads stay: {', '.join(threads)}"
    link = subject.link
    _common.print_json(
        {
            "ok": problem is None,
            "problem": problem,
            "minutes": (time.monotonic() - started) / 60,
            "seed": _SEED.value,
            "model": _common.model_json(subject.llm)["name"],
            "quant": _QUANT.value,
            "engine": _ENGINE.value,
            "counts": dict(sorted(rounds.counts.items())),
            "copies": link.counters.copies,
            "failed_copies": link.num_failed,
            "late_copies": link.num_late,
            "budgets": subject.num_budgets,
            "threads_left": threads,
            "rss_mib": {
                "first": rss_bytes[0] >> 20 if rss_bytes else None,
                "middle": rss_bytes[len(rss_bytes) // 2] >> 20 if rss_bytes else None,
                "last": rss_bytes[-1] >> 20 if rss_bytes else None,
            },
        }
    )
    if problem is not None:
        sys.exit(EXIT_FAILED)


def _show(message: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{message}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    _common.run(main)
