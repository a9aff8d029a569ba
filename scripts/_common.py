"""What all scripts share: how they start, fail and are interrupted."""

import _interrupt  # first: until it is there Ctrl-C shows a traceback

# isort: split
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging

if TYPE_CHECKING:
    import jmoe
    from jmoe.metrics import Traffic

EXIT_BAD_INPUT = 2
EXIT_CLOSED_STDOUT = 141  # 128 + SIGPIPE


def run(main: Callable[[], None]) -> None:
    """Parses the flags and runs a script's main function.

    Bad flags and JmoeError print one error on stderr and exit with 2; Ctrl-C exits with 130;
    a reader that closes stdout (``| head``) ends the script quietly with 141. None of them
    prints a traceback. A script imports jmoe in its main function, not before: JAX takes
    seconds to import, and --help should not.
    """
    try:
        app.run(lambda _: _main(main), flags_parser=_parse_flags)
    except KeyboardInterrupt:
        _interrupt.leave()
    except BrokenPipeError:
        _exit(EXIT_CLOSED_STDOUT)


def _main(main: Callable[[], None]) -> None:
    # absl raises the level to INFO, where JAX tells of every backend that is not there.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)

    from jmoe.errors import JmoeError

    _interrupt.arm()
    try:
        main()
    except JmoeError as error:
        fail(str(error))


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    _exit(EXIT_BAD_INPUT)


def print_json(value: Any) -> None:
    """Prints one JSON value on one line of stdout."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def note(message: str) -> None:
    """Tells the user something that is not the answer: on stderr."""
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def status(message: str) -> Iterator[None]:
    """Shows a line on stderr while something takes long; nothing if that is no terminal."""
    show = sys.stderr.isatty()
    if show:
        print(message, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if show:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def describe(llm: "jmoe.LLM") -> str:
    """One line about a loaded model."""
    config, engine = llm.config, llm.engine
    return (
        f"{llm.name}: {config.model_type}, {llm.num_parameters / 1e6:,.1f} M parameters, "
        f"{config.num_hidden_layers} layers of {config.router.num_experts} experts "
        f"(top {config.router.top_k}); {_formats(llm)} on {engine.device}, "
        f"{engine.parameter_bytes / 2**20:,.1f} MiB, loaded in {llm.load_s:.1f} s"
    )


def _formats(llm: "jmoe.LLM") -> str:
    return llm.engine.dtype if llm.quant is None else f"{llm.quant} in {llm.engine.dtype}"


def speeds(stats: "jmoe.GenerationStats") -> str:
    """One line about the speed of a generation."""
    beams = f", all {stats.num_beams} beams together" if stats.num_beams > 1 else ""
    return (
        f"prefill {stats.prefill_tokens} tokens in {stats.prefill_s:.3f} s "
        f"({stats.prefill_tok_per_s:,.1f} tok/s), decode {stats.decode_tokens} tokens in "
        f"{stats.decode_s:.3f} s ({stats.decode_tok_per_s:,.1f} tok/s{beams}); "
        f"not counted: compilation, {stats.compile_s:.1f} s"
    )


def describe_stats(stats: "jmoe.GenerationStats") -> list[str]:
    """Lines about the speed of a generation, and about what moved and what was the limit."""
    lines = [speeds(stats)]
    if stats.disk is not None:
        lines.append(_disk(stats))
    residency = stats.residency
    if residency is None:
        return lines
    for name, traffic, seconds in (
        ("prefill", residency.prefill, stats.prefill_s),
        ("decode", residency.decode, stats.decode_s),
    ):
        if not traffic.needed:
            continue
        lines.append(
            f"{name}: {traffic.needed} experts needed, {traffic.hit_rate:.0%} there or on their "
            f"way; {traffic.demand_loads} demand loads; {traffic.prefetches} prefetches, "
            f"{traffic.useful_prefetches} useful; {traffic.copied_bytes / 2**20:,.1f} MiB moved; "
            + _waits(traffic, seconds)
        )
        if traffic.host_experts:
            lines.append(
                f"{name}: {traffic.host_experts} experts computed by the host out of "
                f"{traffic.host_bytes / 2**20:,.1f} MiB, busy with it "
                f"{_share(traffic.host_busy_s, seconds)} of the time"
            )
    recall = ", ".join(
        f"{rates[-1]:.0%} {distance} layer{'s' * (distance > 1)} ahead"
        for distance, rates in enumerate(residency.recall, 1)
    )
    lines.append(
        f"{residency.num_slots} slots and {residency.num_staging} for staging, of "
        f"{residency.expert_bytes / 2**20:,.2f} MiB each; at most "
        f"{residency.peak_device_bytes / 2**20:,.1f} MiB of device memory in use"
        + (f"; experts predicted: {recall}" if recall else "")
        + f"; {_bound(stats)}"
    )
    lines += _account(stats)
    if residency.engine_reason is not None:
        lines.append(residency.engine_reason)
    return lines


def _account(stats: "jmoe.GenerationStats") -> list[str]:
    """What the cost model had said, and how busy everything was."""
    parts = []
    if predicted := stats.predicted_tok_per_s:
        difference = stats.decode_tok_per_s / predicted - 1
        parts.append(
            f"predicted {predicted:,.1f} tok/s, measured {stats.decode_tok_per_s:,.1f} "
            f"({difference:+.0%})"
        )
    if busy := stats.decode_busy:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in busy.items())
        parts.append(f"busy of the time of decode steps: {shares}")
    return ["; ".join(parts)] if parts else []


def _disk(stats: "jmoe.GenerationStats") -> str:
    """What the disk gave, and what that cost."""
    disk = stats.disk
    assert disk is not None
    parts = []
    for name, traffic, seconds in (
        ("prefill", disk.prefill, stats.prefill_s),
        ("decode", disk.decode, stats.decode_s),
    ):
        if traffic.read_bytes is not None:
            gb_per_s = traffic.read_bytes / seconds / 1e9 if seconds else 0.0
            part = f"{name} {traffic.read_bytes / 2**20:,.1f} MiB read at {gb_per_s:.2f} GB/s"
            if name == "decode" and stats.disk_bytes_per_token is not None:
                part += f", {stats.disk_bytes_per_token / 2**20:,.1f} MiB a token"
            parts.append(part)
    decode = disk.decode
    if decode.waited_for is not None and decode.needed:
        parts.append(
            f"{decode.waited_for} of {decode.needed} experts waited for, "
            f"{_share(decode.waited_s, stats.decode_s)} of the time"
        )
    if decode.read_ahead:
        parts.append(
            f"{decode.read_ahead} read ahead, {decode.useful} in time, {decode.late} late, "
            f"{decode.useless} for nothing"
        )
    parts.append(f"{disk.locked_experts} locked ({disk.locked_bytes / 2**20:,.1f} MiB)")
    return f"disk: {'; '.join(parts)}"


def _waits(traffic: "Traffic", seconds: float) -> str:
    if traffic.link_busy_s is None or traffic.stalled_s is None:
        return f"{traffic.copied_bytes / seconds / 1e9 if seconds else 0:,.2f} GB/s on average"
    return (
        f"link busy {_share(traffic.link_busy_s, seconds)} of the time, "
        f"waited for it {_share(traffic.stalled_s, seconds)}"
    )


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def _bound(stats: "jmoe.GenerationStats") -> str:
    """What decoding waited for most."""
    residency = stats.residency
    assert residency is not None
    decode = residency.decode
    if not stats.decode_s or not (decode.copies or decode.host_experts):
        return "bound by computing: nothing was moved while decoding"
    if decode.link_busy_s is None or decode.stalled_s is None:
        return f"engine {residency.engine}: the program fetched experts itself"
    if decode.host_busy_s >= 0.8 * stats.decode_s:
        return "bound by the host's computing: more slots or fewer bits would help"
    if decode.link_busy_s >= 0.8 * stats.decode_s:
        return "bound by the link: more slots, fewer bits or a faster link would help"
    if decode.stalled_s >= 0.3 * stats.decode_s:
        return "bound by waiting for copies that were not predicted in time"
    return "bound by computing: copies were hidden behind it"


def model_json(llm: "jmoe.LLM") -> dict[str, Any]:
    """The same facts as ``describe``, for --output=json."""
    config, engine = llm.config, llm.engine
    return {
        "name": llm.name,
        "model_type": config.model_type,
        "num_parameters": llm.num_parameters,
        "num_hidden_layers": config.num_hidden_layers,
        "num_experts": config.router.num_experts,
        "num_experts_per_tok": config.router.top_k,
        "dtype": engine.dtype,
        "quant": None if llm.quant is None else llm.quant.to_json(),
        "notes": list(llm.notes),
        "device": str(engine.device),
        "parameter_bytes": engine.parameter_bytes,
        "plan": llm.plan.to_json(),
    }


def _parse_flags(argv: Sequence[str]) -> list[str]:
    if any(arg in ("--help", "-h", "-help", "-?") for arg in argv[1:]):
        app.usage(writeto_stdout=True)
        sys.exit(0)
    try:
        rest = flags.FLAGS(list(argv))
    except flags.Error as error:
        fail(f"{error}\n  do: {os.path.basename(argv[0])} --help lists the flags")
        raise AssertionError from None
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}\n  do: name every value by a flag, --flag=value")
    return rest


def _exit(code: int) -> None:
    # What is still buffered cannot be written if the reader has gone: do not try at exit.
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
