"""The suite kernels: jmoe's host kernels beside the memory's speed, XLA, and torch.

All contestants take turns. XLA computes the same as a kernel, on the same weights; it is slow, so
it gets few turns, and where it takes seconds only the first. There is always one call of each that
warms up, and --repeats are fewer where they would take long.
"""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from _bench.ceiling import Ceiling
from _bench.kernel_tests import (
    XLA,
    Call,
    Kernels,
    KernelTest,
    attend_tests,
    expert_tests,
    linear_tests,
)
from _bench.machine import Neighbours
from _bench.report import Report
from _bench.settings import Settings
from _bench.statistics import summarize, take_turns
from _bench.torch_experts import TorchExperts
from jmoe import native
from jmoe.config import ModelConfig
from jmoe.errors import RequestError
from jmoe.native.choice import ActivationBits
from jmoe.planning.model_shape import read_model_shape
from jmoe.quant.formats import parse_format
from jmoe.quant.spec import parse_spec

_DEFAULT_MODEL = "mixtral-8x7b"
_DEFAULT_QUANT = "int4"
_ONE_TOKEN_REPEATS = 4  # times as many: it is quick, and easily disturbed
_TEST_S = 6.0  # of a test with more repetitions than these:
_MIN_REPEATS = 2
_XLA_REPEATS = 3
_SLOW_S = 1.0
_TORCH = "torch"
_READ = "read"


def run(settings: Settings, report: Report) -> dict[str, Any]:
    """Measures and reports every kernel; returns all of it."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        raise RequestError("the host kernels are the CPU's", do="set JAX_PLATFORMS=cpu")
    if not settings.loading["host_kernels"]:
        raise RequestError("--suite=kernels measures the host kernels", got="--nohost_kernels")
    native.require()
    config = read_model_shape(settings.model or _DEFAULT_MODEL).config
    bits: tuple[ActivationBits, ...] = (8, 16, 24)
    if chosen := settings.loading["activation_bits"]:
        bits = (chosen,)
    tests = _tests(settings, config, Kernels(device, bits, settings.loading["threads"]))
    torch = TorchExperts(config) if settings.peer == "torch" else None
    ceiling = Ceiling(device, "float32")
    subject = f"{settings.model or _DEFAULT_MODEL}, {native.status().reason}"
    ceiling_json = ceiling.to_json()
    report.ceiling(subject, ceiling_json)
    rows = []
    for test in tests:
        for row in _measure(test, torch, ceiling, settings):
            rows.append(row)
            report.table(_cells(row, torch is not None))
        del test  # its weights, before the next test makes others
    return {
        "subject": {"name": subject, "isa": native.status().isa, "peer": torch and torch.name},
        "ceiling": ceiling_json,
        "rows": rows,
    }


def _tests(settings: Settings, config: ModelConfig, kernels: Kernels) -> Iterator[KernelTest]:
    """One after another, so that the weights of one at a time are in memory."""
    formats = [parse_format(name) for name in settings.formats]
    for fmt in formats:
        kernels.contestants(fmt)  # which raises
    quant = parse_spec(settings.loading["quant"] or _DEFAULT_QUANT)

    def tests() -> Iterator[KernelTest]:
        if "experts" in settings.operations:
            for fmt in formats:
                yield from expert_tests(config, fmt, settings.tokens, kernels)
        if "linear" in settings.operations:
            yield from linear_tests(config, quant, settings.tokens, kernels)
        if "attend" in settings.operations:
            yield from attend_tests(config, kernels)

    return tests()


def _measure(
    test: KernelTest, torch: TorchExperts | None, ceiling: Ceiling, settings: Settings
) -> list[dict[str, Any]]:
    """A row for each kernel of a test."""
    calls = dict(test.calls)
    xla = calls.pop(XLA)
    kernels = list(calls)
    if torch is not None and test.what == "experts":
        calls[_TORCH] = torch.call(test.num_tokens)
    label = f"{test.what} {test.form}, {test.num_tokens}"
    quiet = not sys.stderr.isatty()
    with (
        Neighbours() as neighbours,
        tqdm(desc=label, total=len(calls) + 1, leave=False, delay=2, disable=quiet) as bar,
    ):
        # Warms up, and shows that all compute the same.
        first_s: dict[str, float] = {}
        errors: dict[str, float] = {}
        first_s[XLA], reference = _timed(xla, 0)
        bar.update()
        for name, call in calls.items():
            first_s[name], result = _timed(call, 0)
            if name in kernels:
                errors[name] = _nmse(result, reference)
            bar.update()
        repeats = _repeats(settings.repeats, test.num_tokens, first_s)
        # In one repetition everyone takes other weights than who was before.
        contestants: dict[str, Callable[[], float]] = {_READ: lambda: ceiling.read_bytes_per_s(1)}
        for place, (name, call) in enumerate(calls.items()):
            contestants[name] = _turns(call, place)
        slow = first_s[XLA] > _SLOW_S
        if not slow:
            contestants[XLA] = _turns(xla, len(calls))
        bar.reset(total=repeats * len(contestants))
        limits = {XLA: _XLA_REPEATS}
        results = take_turns(
            contestants, repeats=repeats, warmup=0, limits=limits, progress=bar.update
        )
    if slow:
        results[XLA] = [first_s[XLA]]
    facts = {
        "what": test.what,
        "form": test.form,
        "tokens": test.num_tokens,
        "weight_bytes": test.num_bytes,
        "flop": test.flop,
        "operations": test.operations,
        "neighbours_cpu_share": neighbours.share,
        "read_bytes_per_s": summarize(results[_READ]).to_json(),
    }
    return [
        facts | {"activation_bits": name, "nmse": errors[name]} | _speeds(test, name, results)
        for name in kernels
    ]


def _repeats(wanted: int, num_tokens: int, first_s: dict[str, float]) -> int:
    """More of what is quick, and fewer of what takes seconds."""
    if num_tokens == 1:
        wanted *= _ONE_TOKEN_REPEATS
    in_time = int(_TEST_S / sum(seconds for name, seconds in first_s.items() if name != XLA))
    return min(wanted, max(in_time, _MIN_REPEATS))


def _speeds(test: KernelTest, name: str, results: dict[str, list[float]]) -> dict[str, Any]:
    seconds = [s / test.operations for s in results[name]]
    rates = [test.num_bytes / s for s in seconds]
    shares = [rate / read for rate, read in zip(rates, results[_READ], strict=True)]
    value: dict[str, Any] = {
        "seconds": summarize(seconds).to_json(),
        "bytes_per_s": summarize(rates).to_json(),
        "share_of_read": summarize(shares).to_json(),
        "flop_per_s": summarize([test.flop / s for s in seconds]).to_json(),
    }
    # A few turns, or one: pairs would not be many.
    others = summarize(results[XLA])
    value["xla"] = {
        "seconds": summarize([s / test.operations for s in results[XLA]]).to_json(),
        "ratio_of_medians": others.median / summarize(results[name]).median,
    }
    if _TORCH in results:
        pairs = [b / a for a, b in zip(results[name], results[_TORCH], strict=True)]
        value["torch"] = {
            "seconds": summarize(results[_TORCH]).to_json(),
            "pair_ratio": summarize(pairs).to_json(),
        }
    return value


def _turns(call: Call, first: int) -> Callable[[], float]:
    turn = first

    def take() -> float:
        nonlocal turn
        turn += 1
        return _timed(call, turn)[0]

    return take


def _timed(call: Call, turn: int) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call(turn)
    return time.perf_counter() - started, result


def _nmse(result: jax.Array, reference: jax.Array) -> float:
    """Normalised squared error."""
    exact = np.asarray(reference, np.float64)
    return float(np.sum((np.asarray(result, np.float64) - exact) ** 2) / np.sum(exact**2))


def _cells(row: dict[str, Any], with_torch: bool) -> dict[str, str]:
    one = row["tokens"] == 1
    cells = {
        "kernel                ": row["what"],
        "weights": row["form"],
        "tokens": str(row["tokens"]),
        "act. bits": row["activation_bits"],
        "ms": f"{row['seconds']['median'] * 1e3:.4g}",
        "GB/s": f"{row['bytes_per_s']['median'] / 1e9:.1f}" if one else "",
        "of read": f"{row['share_of_read']['median']:.0%}" if one else "",
        "GFLOP/s": f"{row['flop_per_s']['median'] / 1e9:.1f}",
        "x XLA": f"{row['xla']['ratio_of_medians']:.2f}",
        "NMSE": f"{row['nmse']:.1e}",
        "neighbours": f"{row['neighbours_cpu_share']:.0%}",
    }
    if with_torch:
        torch = row.get("torch")
        cells["x torch"] = f"{torch['pair_ratio']['median']:.2f}" if torch else ""
    return cells
