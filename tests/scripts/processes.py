"""Running the scripts as a user does: as processes, seen through their output and status."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**changes: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | changes


def command(script: str, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / script), *flags]


def run_script(
    script: str, *flags: str, stdin: bytes = b"", cwd: Path = ROOT, **changes: str
) -> subprocess.CompletedProcess[bytes]:
    """Runs a script to its end with these flags, standard input and environment changes."""
    return subprocess.run(
        command(script, *flags),
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env=environment(**changes),
        timeout=120,
    )


def assert_one_error(result: subprocess.CompletedProcess[bytes], *words: str) -> None:
    """One error that holds these words, status 2, an empty stdout, and no traceback."""
    stderr = result.stderr.decode()
    assert result.returncode == 2, stderr
    assert result.stdout == b""
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    for word in words:
        assert word in stderr
