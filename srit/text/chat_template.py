"""Chat templates, rendered in a process that can be ended: template_worker.py.

A template comes with a checkpoint from somebody else. In our own process it could loop for ever, or
double a string until the memory is full, whatever its sandbox forbids.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from srit.runtime.files import InputError

SECONDS = 10.0  # for one conversation, which takes less than a millisecond
MEMORY = 2**30
MAX_CHARACTERS = 2**26
START_SECONDS = 120.0  # a busy machine may be slow to start Python

_worker: subprocess.Popen | None = None
_owner = 0  # a forked process must not talk to its parent's worker


def render(template: str, variables: dict[str, Any]) -> str:
    """The template's text. Raises InputError with its complaint, or when it takes too much."""
    worker = _running()
    request = json.dumps({"template": template, "variables": variables}) + "\n"
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
    except BaseException:  # a signal in the middle: what is left of the reply is nobody's
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
        # In a session of its own: Ctrl-C is for us.
        _worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   start_new_session=True)
        _owner = os.getpid()
        try:
            _read_line(_worker, START_SECONDS)
        except (TimeoutError, EOFError):
            close()
            raise InputError("the process for chat templates does not start") from None
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
    """End the worker; the next `render` starts another."""
    global _worker
    if _worker is not None and _owner == os.getpid():
        _worker.kill()
        _worker.wait()
        _worker.stdin.close()
        _worker.stdout.close()
    _worker = None
