"""Runs quantizations of the embedded model over its held-out text, one after another."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _eval.inputs import read_text
from tqdm import tqdm

import jmoe
from _quality.paper import PAPER_RESULTS, preset_of
from jmoe.engines.evaluation import cut_windows, evaluate
from jmoe.errors import RequestError

WINDOW = 256  # what the embedded model was trained on

# Every mix of the paper; and three bits without the help of a down projection in four.
PURE_3_BITS = "attention=4g64,experts=3g64"
GRID = tuple(preset_of(*bits) for bits in PAPER_RESULTS)
# Quantized both ways.
BOTH_METHODS = (
    *("attn16-experts4", "attn16-experts3", "attn16-experts2"),
    *("attn4-experts4", "attn4-experts3", "attn4-experts2"),
    *(PURE_3_BITS, "int4", "int8"),
)

Results = dict[tuple[str, str], dict[str, Any]]  # by quantization and method


def settings() -> list[tuple[str, str]]:
    """What is measured: quantization and method, each once."""
    hqq = dict.fromkeys((*GRID, *BOTH_METHODS))
    return [*((quant, "hqq") for quant in hqq), *((quant, "rtn") for quant in BOTH_METHODS)]


def measure(file: Path, max_windows: int | None, commit: str, show: bool) -> Results:
    """Measures what a file of results lacks, and adds it there line by line.

    Args:
      file: JSON lines of former runs; made if absent.
      max_windows: of the beginning of the text; None is all of it.
      commit: of the code that measures, to be noted with each figure.
      show: a progress bar on stderr.

    Raises:
      RequestError: the file is not one of this program's, or is of another number of windows.
    """
    results = dict(_read(file, max_windows))
    missing = [setting for setting in settings() if setting not in results]
    if not missing:
        return results
    plain = jmoe.load(dtype="float32")
    windows = cut_windows(
        plain.tokenizer.encode(read_text(None, None)),
        WINDOW,
        bos_token_id=plain.tokenizer.bos_token_id,
        max_windows=max_windows,
    )

    # The embedded model is small enough to keep all its logits: they are needed every time.
    @functools.cache
    def cached(token_ids: tuple[int, ...]) -> np.ndarray:
        return plain.engine.logits(token_ids)

    with tqdm(total=len(missing) * len(windows), unit="window", disable=not show) as bar:
        for quant, method in missing:
            bar.set_description(f"{quant} {method}")
            llm = jmoe.load(dtype="float32", quant=quant, method=method)  # type: ignore[arg-type]
            result = evaluate(
                llm.engine.logits, windows, lambda ids: cached(tuple(ids)), bar.update
            )
            comparison = result.comparison
            assert comparison is not None
            row = {
                "quant": quant,
                "method": method,
                "commit": commit,
                "max_windows": max_windows,
                "num_predictions": result.num_predictions,
                "perplexity": result.perplexity,
                "perplexity_error": result.perplexity_error,
                "reference_perplexity": comparison.reference_perplexity,
                "ratio": comparison.perplexity_ratio,
                "ratio_error": comparison.perplexity_ratio_error,
                "kl_mean": comparison.kl_mean,
                "top1_agreement": comparison.top1_agreement,
            }
            with open(file, "a") as lines:
                lines.write(json.dumps(row) + "\n")
            results[quant, method] = row
    return results


def _read(file: Path, max_windows: int | None) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    try:
        lines = file.read_text().splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise RequestError("the results cannot be read", where=file, got=error.strerror) from None
    for line in lines:
        try:
            row = json.loads(line)
            key, row_windows = (row["quant"], row["method"]), row["max_windows"]
        except (ValueError, LookupError, TypeError):
            raise RequestError(
                "a line is not one of quality.py's", where=file, got=line[:80]
            ) from None
        if row_windows != max_windows:
            raise RequestError(
                "the results are of another number of windows",
                where=file,
                got=row_windows,
                expected=max_windows,
                do="name another file with --results",
            )
        yield key, row
