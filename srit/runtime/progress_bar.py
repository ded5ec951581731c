"""The progress bar of long passes. Where nobody watches, in a log, it writes one line a minute."""

import sys
from typing import Any

from tqdm import tqdm

from srit.runtime import distributed


class _Lines:
    """standard error, with every update of a bar on a line of its own."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(*args: Any, **kwargs: Any) -> tqdm:
    """tqdm on rank 0, silent on the others."""
    if sys.stderr.isatty():
        kwargs["dynamic_ncols"] = True
    else:
        kwargs |= {"file": _Lines(), "mininterval": 60, "miniters": 1, "ascii": True}
    return tqdm(*args, disable=distributed.rank() > 0, **kwargs)
