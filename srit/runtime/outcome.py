"""How a run can end: the exceptions, and the exit statuses that a script can tell apart.

    0   finished, now or before
    1   failed: no memory, no disk, a lost rank, a bug; the same command may succeed once that is mended
    2   bad input: a flag, a file or a checkpoint that must be changed first
    3   diverged: nothing was exported
    75  stopped by a signal or --max_time; the same command resumes (EX_TEMPFAIL of sysexits.h)
"""

FINISHED, FAILED, BAD_INPUT, DIVERGED, STOPPED = 0, 1, 2, 3, 75


class Finished(Exception):
    """The run had finished before; there is nothing to do. Status 0."""


class Failed(Exception):
    """The run could not go on, through no fault of its input. Status 1."""


class Diverged(Exception):
    """Loss or weights are not finite; nothing was exported. Status 3."""


class Stopped(Exception):
    """The run ended early as asked; the message says how to resume. Status 75."""
