"""soak.py: what it says of a sound engine, and that it notices what it is there for."""

import json
import subprocess
import sys

import pytest

from tests.scripts.processes import ROOT, environment, run_script

SHORT = ("--minutes=0.05", "--max_batch=1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, str]:
    """Environment in which programs are compiled once."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def test_a_sound_engine_passes(compiled):
    result = run_script("soak.py", *SHORT, "--seed=3", **compiled)
    assert result.returncode == 0, result.stderr
    assert result.stderr == b""
    assert result.stdout.count(b"\n") == 1
    answer = json.loads(result.stdout)
    assert answer["ok"] and answer["problem"] is None and answer["threads_left"] == []
    counts = answer["counts"]
    assert counts["rounds"] >= 1 and counts["memory checks"] >= 1
    rounds = sum(number for name, number in counts.items() if ": " in name)
    assert rounds == counts["rounds"]
    assert answer["copies"] > 0


def run_changed(change: str, *flags: str, **changes: str) -> subprocess.CompletedProcess[bytes]:
    """Runs soak.py after a change to its parts."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        f"sys.argv = ['soak.py', *{flags!r}]\n"
        "import _common, jmoe, soak\n"
        "from _soak import rounds, subject\n"
        f"{change}\n"
        "_common.run(soak.main)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env=environment(**changes),
        cwd=ROOT,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("minutes", "change", "problem"),
    [
        (
            0.5,
            "subject.Subject.expected = subject.Subject.second_opinion = (\n"
            "    lambda self, prompts, options: [(7,) * 90 for _ in prompts])\n"
            "rounds.WAYS = ('to the end',)",
            "expected [(7, 7, ",
        ),
        (
            0.5,
            "import jax.numpy as jnp\n"
            "kept, old = [], subject.Subject.held\n"
            "def held(self):\n"
            "    kept.append(jnp.zeros(100_000))\n"
            "    return old(self)\n"
            "subject.Subject.held = held\n"
            "rounds.MEMORY_CHECKS = 1.0",
            "bytes of other arrays",
        ),
        (
            0.0,
            "import threading\n"
            "old = subject.Subject.close\n"
            "def close(self):\n"
            "    threading.Thread(target=threading.Event().wait, args=(1,)).start()\n"
            "    return old(self)\n"
            "subject.Subject.close = close",
            "threads stay: Thread-",
        ),
    ],
    ids=["a wrong token", "memory that stays", "a thread that stays"],
)
def test_what_is_not_sound_is_noticed(minutes, change, problem, compiled):
    flags = (f"--minutes={minutes}", "--max_batch=1", "--seed=3")
    result = run_changed(change, *flags, **compiled)
    assert result.returncode == 1, result.stderr
    answer = json.loads(result.stdout)
    assert not answer["ok"]
    assert problem in answer["problem"]


def test_a_deadlock_ends_with_all_stacks(compiled):
    change = "import threading; jmoe.LLM.stream = lambda *_, **__: threading.Event().wait()"
    result = run_changed(change, *SHORT, "--silence_s=1", **compiled)
    assert result.returncode == 1
    assert result.stdout == b""
    assert b"Timeout" in result.stderr and b"threading.py" in result.stderr


def test_help_explains_itself():
    result = run_script("soak.py", "--help")
    assert result.returncode == 0
    assert b"--minutes=" in result.stdout and b"Examples:" in result.stdout
