"""Ctrl-C ends a script within a second, also where Python cannot be interrupted.

Python raises KeyboardInterrupt between two of its instructions. That is too early while modules
are imported: extension modules print it, or turn it into other errors. It may be late: XLA compiles
for seconds. And it is lost in a callback of the garbage collector, of which JAX has one. So until
``arm`` Ctrl-C ends the process at once, as there is nothing to lose; and after it a thread watches.
What is lost it sends again. If Python does not get to raise KeyboardInterrupt, it does what
``last_words`` say, and ends the process.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

EXIT_INTERRUPTED = 130  # 128 + SIGINT
# So long Python may take to notice, to leave the callback in which it was lost, and so long the
# last words may take.
NOTICE_S = 0.25
RETRY_S = 0.01
LAST_WORDS_S = 5.0

# What to save before the process is ended from another thread; must not ask for JAX's locks.
last_words: list[Callable[[], None]] = []

_LOST = b"\0"  # in the pipe through which Python tells the numbers of signals
_num_noticed = 0
_is_ending = False


def leave(*_: object) -> None:
    """Ends the process at once: nothing is cleaned up but what is buffered for output."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(Exception):
        print(file=sys.stderr, flush=True)
    os._exit(EXIT_INTERRUPTED)


def arm() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt from now on, and watches that it does."""
    if signal.getsignal(signal.SIGINT) is not leave:
        return  # in the background of a shell it is ignored, and stays so
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    threading.Thread(target=_watch, args=(read_end,), name="ctrl-c", daemon=True).start()
    tell = sys.unraisablehook

    def on_lost(lost: "sys.UnraisableHookArgs") -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            os.write(write_end, _LOST)
        else:
            tell(lost)

    sys.unraisablehook = on_lost
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _notice)


def _notice(*_: object) -> None:
    global _num_noticed
    _num_noticed += 1
    if _is_ending:  # too late: the other thread ends the process
        while True:
            time.sleep(1)
    raise KeyboardInterrupt


def _watch(read_end: int) -> None:
    global _is_ending
    num_received = 0
    while byte := os.read(read_end, 1):
        if byte == _LOST:
            time.sleep(RETRY_S)
            os.kill(os.getpid(), signal.SIGINT)
            continue
        if byte[0] != signal.SIGINT:
            continue
        num_received += 1
        time.sleep(NOTICE_S)
        if _num_noticed < num_received:
            _is_ending = True
            break
    timer = threading.Timer(LAST_WORDS_S, leave)
    timer.daemon = True
    timer.start()
    for say in last_words:
        with contextlib.suppress(Exception):
            say()
    leave()


def _is_script() -> bool:
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    return main is not None and os.path.samefile(os.path.dirname(main), os.path.dirname(__file__))


if _is_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)
