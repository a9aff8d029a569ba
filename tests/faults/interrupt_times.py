"""How long generate.py takes to end after Ctrl-C, at moments spread evenly over its run.

Run by hand: PYTHONPATH=. python tests/faults/interrupt_times.py NUM_MOMENTS SECONDS [FLAG ...]
Prints a line per moment, and the longest time at the end.
"""

import signal
import subprocess
import sys
import tempfile
import time

from tests.scripts.processes import command, environment


def end_after(delay_s: float, flags: list[str]) -> tuple[float, int, bytes]:
    """Seconds from Ctrl-C to the end, exit status, and what stderr said."""
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            command("generate.py", *flags),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment(),
            cwd=directory,
        )
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        start = time.perf_counter()
        _, stderr = process.communicate(timeout=60)
        return time.perf_counter() - start, process.returncode, stderr


def main() -> None:
    num_moments, span_s, flags = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    times = []
    for i in range(num_moments):
        delay_s = span_s * (i + 0.5) / num_moments
        seconds, status, stderr = end_after(delay_s, flags)
        if status == 0:
            print(f"{delay_s:.2f} s: had ended")
            continue
        clean = b"Traceback" not in stderr and b"Exception ignored" not in stderr
        print(f"{delay_s:.2f} s: {seconds:.2f} s, status {status}{'' if clean else ', NOT CLEAN'}")
        times.append(seconds)
    print(f"longest of {len(times)}: {max(times):.2f} s, mean {sum(times) / len(times):.2f} s")


if __name__ == "__main__":
    main()
