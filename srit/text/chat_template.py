"""Render chat templates in a process that can be killed (template_worker.py).

A template is a program that comes with a checkpoint. Even in Jinja's sandbox it could loop forever or
fill the memory.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from srit.runtime.files import InputError

SECONDS = 10.0  # per conversation; a normal one takes less than a millisecond
MEMORY = 2**30
MAX_CHARACTERS = 2**26
START_SECONDS = 120.0  # starting Python can be slow on a busy machine

_worker: subprocess.Popen | None = None
_owner = 0  # pid that started the worker; a forked process must not use its parent's


def render(template: str, variables: dict[str, Any], today: str | None = None) -> str:
    """Render a template. Raises InputError if it fails, or takes too much time or memory.

    today: the ISO date that its strftime_now shows; by default the real one.
    """
    worker = _running()
    today = today or date.today().isoformat()
    request = json.dumps({"template": template, "variables": variables, "today": today}) + "\n"
    try:
        worker.stdin.write(request.encode())
        worker.stdin.flush()
        reply = json.loads(_read_line(worker, SECONDS))
    except TimeoutError:
        close()
        raise InputError(f"chat template: not done after {SECONDS:.0f} s") from None
    except (OSError, EOFError):
        close()
        raise InputError("chat template failed: it ended its process") from None
    except BaseException:  # after an interrupt, an unread reply would answer the next request
        close()
        raise
    if "error" in reply:
        raise InputError(reply["error"])
    return reply["text"]


def _running() -> subprocess.Popen:
    global _worker, _owner
    if _worker is None or _owner != os.getpid() or _worker.poll() is not None:
        command = [sys.executable, "-I", str(Path(__file__).with_name("template_worker.py")),
                   str(MEMORY), str(MAX_CHARACTERS)]
        # In its own session, so that Ctrl-C does not reach it.
        _worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   start_new_session=True)
        _owner = os.getpid()
        try:
            _read_line(_worker, START_SECONDS)
        except (TimeoutError, EOFError):
            close()
            raise InputError("the process that renders chat templates does not start") from None
    return _worker


def _read_line(worker: subprocess.Popen, seconds: float) -> bytes:
    end, parts = time.monotonic() + seconds, []
    while not parts or not parts[-1].endswith(b"\n"):
        ready, _, _ = select.select([worker.stdout], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError
        parts.append(os.read(worker.stdout.fileno(), 2**16))
        if not parts[-1]:
            raise EOFError
    return b"".join(parts)


@atexit.register
def close() -> None:
    """Kill the worker. The next `render` starts another."""
    global _worker
    if _worker is not None and _owner == os.getpid():
        _worker.kill()
        _worker.wait()
        _worker.stdin.close()
        _worker.stdout.close()
    _worker = None
