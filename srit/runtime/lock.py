"""One writer to an output directory: a lock that the kernel releases when its holder dies."""

import errno
import fcntl
import os
import re
import socket
import sys
from pathlib import Path
from typing import TextIO

from srit.runtime.files import InputError

LOCK = ".lock"


def lock(directory: Path) -> TextIO:
    """Hold `directory` until the returned file is closed. Raises InputError naming who holds it.

    A POSIX lock on directory/.lock, which says who has it. Two runs in one process do not exclude
    each other. It works between hosts on NFS with its lock service and on most parallel file
    systems; where a file system has no locks, a warning says so.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle = open(directory / LOCK, "a+", encoding="utf-8", errors="replace")
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            handle.seek(0)
            holder = handle.read(4096).strip() or "another process"
            handle.close()
            raise InputError(f"{directory} is in use by {holder}; wait for it, stop it, or choose "
                             "another --output_dir") from None
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            raise
        print(f"warning: {directory} is on a file system without locks ({error.strerror}): nothing "
              "keeps a second process from writing there", file=sys.stderr)
    handle.truncate(0)
    command = re.sub(r"://\S*@", "://", " ".join(sys.argv))[:2000]  # no password of a URL
    handle.write(f"process {os.getpid()} on {socket.gethostname()}, {command}\n")
    handle.flush()
    return handle
