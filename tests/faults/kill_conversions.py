"""Kills conversions at random moments: the output is absent or complete, and a resumed run equal.

    python -m tests.faults.kill_conversions --kills=200

Every conversion goes on with what the killed ones before it left. Whenever one comes to its end,
the output is compared byte for byte with that of an uninterrupted conversion, and deleted. This
process has imported everything, and forks one that converts; it starts no backend itself, whose
threads would not survive the fork.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import jax

from jmoe.quant.layout import ExpertLayout
from jmoe.quant.spec import PRESETS
from jmoe.store.convert import Conversion
from jmoe.store.partial import partial_path
from jmoe.store.quantize import layer_blobs, shared_parameters
from jmoe.store.source import RandomSource

_CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
_QUANT = PRESETS["attn4-experts4"]


def _convert(source: RandomSource, output: Path) -> float:
    """Converts, or goes on; returns the seconds that it took."""
    started = time.perf_counter()
    Conversion(source, output, _QUANT, method="rtn", resume=True).run()
    return time.perf_counter() - started


def _compile(source: RandomSource) -> None:
    """Converts a little without writing anything, so that all programs are compiled."""
    layout = ExpertLayout.of(_CONFIG["hidden_size"], _CONFIG["intermediate_size"], _QUANT)
    next(layer_blobs(source, 0, layout, "rtn"))
    list(shared_parameters(source, _QUANT, "rtn"))


def _fork_conversion(source: RandomSource, output: Path) -> tuple[int, int]:
    """Starts a process that converts; returns its id, and a pipe.

    The process writes to the pipe once when it begins, and its seconds when it has finished.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    try:
        os.close(reading)
        _compile(source)
        os.write(writing, b"ready\n")
        os.write(writing, f"{_convert(source, output)}\n".encode())
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _finish(source: RandomSource, output: Path) -> float:
    child, pipe = _fork_conversion(source, output)
    with open(pipe) as lines:
        _, *seconds = lines
    _, status = os.waitpid(child, 0)
    assert status == 0, "a conversion failed that nobody killed"
    return float(seconds[0])


def _assert_equal(output: Path, reference: Path) -> None:
    files, expected = (sorted(path.name for path in d.iterdir()) for d in (output, reference))
    assert files == expected, f"{files} instead of {expected}"
    for name in files:
        assert (output / name).read_bytes() == (reference / name).read_bytes(), name


def run(num_kills: int, directory: Path, seed: int) -> dict[str, Any]:
    """Kills so many conversions; returns what they were like. AssertionError if one was bad."""
    # The first conversion fills this cache; the others start in half a second.
    jax.config.update("jax_compilation_cache_dir", str(directory / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    source = RandomSource(_CONFIG, "killed")
    reference, output = directory / "reference", directory / "output"
    duration = min(_finish(source, directory / "again"), _finish(source, reference))
    _assert_equal(directory / "again", reference)
    moments = random.Random(seed)
    num_killed = num_complete = 0
    finished_files = []
    while num_killed < num_kills:
        child, pipe = _fork_conversion(source, output)
        with open(pipe) as lines:
            assert next(lines) == "ready\n"
            time.sleep(moments.uniform(0, 1.2 * duration))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or status == 0, "a conversion failed by itself"
        num_killed += os.WIFSIGNALED(status)
        if output.exists():
            _assert_equal(output, reference)
            assert not partial_path(output).exists()
            shutil.rmtree(output)
            num_complete += 1
        else:
            assert status != 0, "no output of a conversion that nobody killed"
            partial = partial_path(output)
            finished_files.append(len(list(partial.iterdir())) if partial.exists() else 0)
    _finish(source, output)
    _assert_equal(output, reference)
    return {
        "kills": num_killed,
        "complete_outputs": num_complete + 1,
        "files_left_behind": finished_files,
        "conversion_s": duration,
        "seed": seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(run(arguments.kills, Path(directory), arguments.seed)))


if __name__ == "__main__":
    main()
