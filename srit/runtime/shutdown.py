"""Ending a run early, in order: SIGTERM, SIGINT and --max_time.

The first signal only asks: the loop ends its step, saves, and says how to go on. The second ends the
process at once.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAME = 1.0  # seconds; torchrun passes on a signal that the terminal has sent to everybody already

_asked_at: float | None = None
_deadline: float | None = None


class Stopped(Exception):
    """The run ended early as asked, and can go on; the message says how. Exit status 0."""


def requested() -> bool:
    """Whether this process was asked to end, or its time is up."""
    return _asked_at is not None or (_deadline is not None and time.monotonic() >= _deadline)


def _ask(number: int, frame: FrameType | None) -> None:
    global _asked_at
    now = time.monotonic()
    if _asked_at is not None and now - _asked_at > SAME:
        os._exit(128 + number)
    if _asked_at is None:
        _asked_at = now
        print(f"\n{signal.Signals(number).name}: ending after this step; a second one ends at once",
              file=sys.stderr, flush=True)


@contextmanager
def listening(max_time: float = 0.0) -> Iterator[None]:
    """Within, signals set `requested`, which is also true after `max_time` minutes (0: never)."""
    global _asked_at, _deadline
    _asked_at, _deadline = None, time.monotonic() + 60 * max_time if max_time else None
    before = {number: signal.signal(number, _ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked_at = _deadline = None
