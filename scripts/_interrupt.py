"""Ctrl-C ends a script within a second, also where Python cannot be interrupted.

Python raises KeyboardInterrupt between two of its instructions. That is too early while modules
are imported: extension modules print it, or turn it into other errors. And it may be late: XLA
compiles for seconds. So until ``arm`` Ctrl-C ends the process at once, as there is nothing to lose;
and after it a thread watches. If Python does not get to raise KeyboardInterrupt, that thread does
what ``last_words`` say, and ends the process.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

EXIT_INTERRUPTED = 130  # 128 + SIGINT
# So long Python may take to notice, and so long the last words.
NOTICE_S = 0.25
LAST_WORDS_S = 5.0

# What to save before the process is ended from another thread; must not ask for JAX's locks.
last_words: list[Callable[[], None]] = []

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
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _notice)


def _notice(*_: object) -> None:
    global _num_noticed
    _num_noticed += 1
    if _is_ending:  # too late: the other thread ends the process
        threading.Event().wait()
    raise KeyboardInterrupt


def _watch(read_end: int) -> None:
    global _is_ending
    num_received = 0
    while os.read(read_end, 1):
        num_received += 1
        threading.Event().wait(NOTICE_S)
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
