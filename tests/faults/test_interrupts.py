"""Ctrl-C at any moment: what is interrupted can go on, and a script ends at once and cleanly."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import pytest

from jmoe.planning.traces import RoutingTrace
from tests.engines.offload_engines import Model, greedy, random_model
from tests.scripts.processes import ROOT, command, environment

NEW_TOKENS = 6
PROMPTS = [[5, 9, 2, 71, 40], [9, 8, 7]]


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model("top 2 of 8", "int4")


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    return greedy(model.resident, PROMPTS, NEW_TOKENS)[0]


class Interrupt:
    """Raises KeyboardInterrupt where Python may: when a function of jmoe begins, or C's returns.

    Attributes:
      num_moments: how many there were.
    """

    def __init__(self, moment: int | None = None):
        """Takes the moment to raise it, counted from 0; None only counts."""
        self.num_moments = 0
        self._moment = moment

    def __enter__(self) -> "Interrupt":
        sys.setprofile(self._on_event)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setprofile(None)

    def _on_event(self, frame: FrameType, event: str, arg: object) -> None:
        name = frame.f_code.co_filename
        if event in ("call", "c_return") and ("/engines/" in name or "/residency/" in name):
            self.num_moments += 1
            if self.num_moments - 1 == self._moment:
                raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("slots", "eviction", "num_sequences"),
    [("staging only", "lru", 1), ("uneven", "lfu", 2), ("one pool", "likely", 2)],
)
def test_after_ctrl_c_at_any_moment_the_engine_goes_on(
    model, expected, slots, eviction, num_sequences
):
    prompts, right = PROMPTS[:num_sequences], expected[:num_sequences]
    sizes = model.slots_of_every_kind()[slots]
    engine = model.engine(sizes, eviction=eviction, prefill_chunk=16)
    engine.recorder = model.recorder()
    greedy(engine, prompts, NEW_TOKENS)
    with Interrupt() as counting:
        greedy(engine, prompts, NEW_TOKENS)
    rng = random.Random(num_sequences)
    for _ in range(20):
        moment = rng.randrange(counting.num_moments)
        try:
            with Interrupt(moment):
                assert greedy(engine, prompts, NEW_TOKENS)[0] == right
        except KeyboardInterrupt:
            pass
        assert greedy(engine, prompts, NEW_TOKENS)[0] == right, moment
        assert engine.experts.cache.is_whole(), moment
    engine.recorder.trace()
    engine.close()


# Scripts

OFFLOAD = ("--policy=offload", "--device_memory_gib=0.02", "--max_new_tokens=900")
RECORDS = ("--record_routing=routing.npz", "--trace_timeline=timeline.json")
ONE_PROGRAM = ("--engine=compiled", "--tokens_per_call=4")
# Kilobytes per second: the first expert takes a minute.
STUCK = ("--policy=offload", "--link_gb_per_s=0.00001")
WEIGHTS = ("--model=mixtral-8x7b", "--random_weights", "--num_layers=1", "--quant=int4")


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, str]:
    """Environment in which programs are compiled once, for what comes after that."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def await_output(stream, word: bytes) -> bytes:
    """Reads until a word has come."""
    text, end_s = b"", time.monotonic() + 60
    while word not in text:
        assert select.select([stream], [], [], end_s - time.monotonic())[0], text
        piece = os.read(stream.fileno(), 1 << 16)
        assert piece, text
        text += piece
    return text


@pytest.mark.parametrize(
    ("phase", "flags", "stream", "word", "delay_s"),
    [
        ("importing", OFFLOAD, None, b"", 0.2),
        ("importing later", OFFLOAD, None, b"", 0.6),
        ("making weights", WEIGHTS, None, b"", 3.0),
        ("compiling", OFFLOAD + RECORDS, "stderr", b"prompt:", 0.1),
        ("compiling later", OFFLOAD + RECORDS, "stderr", b"prompt:", 1.5),
        ("compiling one program", ("--max_new_tokens=900",), "stderr", b"prompt:", 0.7),
        ("decoding", OFFLOAD + RECORDS, "stdout", b"def", 0.0),
        ("decoding in one program", (*OFFLOAD, *ONE_PROGRAM, *RECORDS), "stdout", b"def", 0.0),
        ("waiting for the link", STUCK + RECORDS, "stderr", b"prompt:", 5.0),
    ],
)
def test_ctrl_c_ends_the_script_with_130_at_once(
    phase, flags, stream, word, delay_s, tmp_path, programs
):
    process = subprocess.Popen(
        command("generate.py", *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(**({} if "compiling" in phase else programs)),
        cwd=tmp_path,
    )
    output = b""
    if stream is not None:
        output += await_output(getattr(process, stream), word)
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    try:
        _, rest = process.communicate(timeout=10)  # measured: docs/measurements/soak.md
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    output += rest
    assert process.returncode == 130, (phase, output.decode())
    for word in (b"Traceback", b"Exception ignored", b"error"):
        assert word not in output, output.decode()
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"routing.npz", "timeline.json"}
    if "decoding" in phase:
        assert left == {"routing.npz", "timeline.json"}
        assert RoutingTrace.load(tmp_path / "routing.npz").num_tokens > 0
    if "timeline.json" in left:
        json.loads((tmp_path / "timeline.json").read_text())
    if "routing.npz" in left:
        RoutingTrace.load(tmp_path / "routing.npz")


@pytest.mark.parametrize(
    ("work", "said"),
    [
        # As XLA when it compiles: a call into C that takes hours.
        ("hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)", b"saved\n"),
        # In a callback of the garbage collector it is ignored.
        (
            "\n  gc.callbacks.append(lambda *_: sum(range(10_000)))\n  while True: gc.collect(0)",
            b"noticed\n",
        ),
    ],
    ids=["in C", "in callbacks"],
)
def test_ctrl_c_where_python_cannot_be_interrupted(work, said, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import gc, hashlib, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "import signal\n"
        "import _interrupt\n"
        "signal.signal(signal.SIGINT, _interrupt.leave)\n"
        "_interrupt.arm()\n"
        "_interrupt.last_words.append(lambda: print('saved', flush=True))\n"
        "print('begun', flush=True)\n"
        f"try: {work}\n"
        "except KeyboardInterrupt: print('noticed', flush=True); _interrupt.leave()\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    await_output(process.stdout, b"begun\n")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    try:
        stdout, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stdout == said and stderr == b"\n"


def test_ctrl_c_that_is_ignored_stays_so(tmp_path: Path, programs):
    """As of commands in the background of a shell."""
    code = (
        "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"os.execv({sys.executable!r}, {command('generate.py', *OFFLOAD, '--max_new_tokens=2')!r})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(**programs),
        cwd=tmp_path,
    )
    await_output(process.stderr, b"prompt:")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0
