"""Graceful shutdown on SIGTERM, SIGINT, SIGHUP (a lost terminal) or --max_time.

After the first signal the loop finishes its step, saves, and says how to resume. A second signal exits
at once.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# On Ctrl-C every rank gets SIGINT twice: from the terminal, and forwarded by torchrun.
DUPLICATE_SECONDS = 1.0
PARENT = "SRIT_PARENT_PROCESS"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_asked_at: float | None = None
_deadline: float | None = None


def requested() -> bool:
    """Whether a signal arrived or max_time is over."""
    return _asked_at is not None or (_deadline is not None and time.monotonic() >= _deadline)


def _ask(number: int, frame: FrameType | None) -> None:
    global _asked_at
    now = time.monotonic()
    if _asked_at is not None and now - _asked_at > DUPLICATE_SECONDS:
        os._exit(128 + number)
    if _asked_at is None:
        _asked_at = now
        name = signal.Signals(number).name
        text = f"\n{name}: ending after this step; a second signal exits at once\n"
        for descriptor, message in ((2, text.encode()), (1, b"\n" * (number == signal.SIGHUP))):
            try:
                os.write(descriptor, message)
            except OSError:  # the terminal is gone: later output must not end the run either
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def end_with_parent() -> None:
    """Get SIGTERM when the process named by PARENT dies: `srit run`, whose stage this process is."""
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # it died before the call
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def listening(max_time: float = 0.0) -> Iterator[None]:
    """Inside the block, `requested` turns true on a signal or after `max_time` minutes (0: never)."""
    global _asked_at, _deadline
    _asked_at, _deadline = None, time.monotonic() + 60 * max_time if max_time else None
    before = {number: signal.signal(number, _ask) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked_at = _deadline = None
