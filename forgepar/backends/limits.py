"""The system's limits for workers, and the explanation of a start that failed because of one.

    make_room(n) ──> raises the soft limit of descriptors, up to the hard one     why(error) ──> text with a remedy

The system does not show how many more processes and threads may start: users, control groups and the whole system have
limits, which other programs share. So a start is tried, and its error is reported.
"""

from __future__ import annotations

import errno
import os
import resource
from contextlib import suppress

PER_WORKER = 12  # descriptors per worker: 8 of its executor and process, 3 pipes, 1 connection
SHARED = 12  # descriptors that all workers share, with those of the fork server and of the orphan watch
DURING_START = 12  # descriptors that are open only while a worker starts
_HEADROOM = 52  # added when the limit is raised, for other files of the program
_OPEN_FILES = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"  # noqa: PTH112  (it loads no pathlib)
_AT_THE_END = "interpreter shutdown"  # in Python's errors for threads, forks and futures when a program ends
_LIMITED_START = "can't start new thread"


def make_room(n_wanted: int) -> int:
    """Return how many more descriptors can be opened.

    If there are fewer than wanted, this raises the soft limit, at most to the hard limit.

    Args:
        n_wanted: how many are needed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return n_wanted
    free = soft - _n_open(soft)
    if free < n_wanted and soft != hard:
        wanted = soft - free + n_wanted + _HEADROOM
        within = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):  # some systems have another limit, as macOS does
            resource.setrlimit(resource.RLIMIT_NOFILE, (within, hard))
            free += within - soft
    return free


def require_room(n_wanted: int) -> None:
    """Make room for descriptors.

    Raises:
        OSError: the hard limit does not allow as many.
    """
    if make_room(n_wanted) < n_wanted:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def share_with(pid: int) -> bool:
    """Give one of this user's processes the limit of descriptors that this one has; return whether that worked."""
    try:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE))
    except (AttributeError, OSError, ValueError):
        return False
    return True


def soft_limit() -> float:
    """Return how many descriptors this process may have open at once."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return float("inf") if soft == resource.RLIM_INFINITY else soft


def why(error: BaseException) -> str:
    """Return why a worker could not be started and what to do, in full sentences."""
    number = error.errno if isinstance(error, OSError) else None
    if is_at_the_end(error):
        return f"The program is ending, and Python starts nothing more ({error})."
    if number == errno.EMFILE:
        return (
            f"This process reached its limit of {soft_limit():.0f} open files ({error}). "
            "Raise the hard limit with `ulimit -n` before it starts, or request fewer workers."
        )
    if number == errno.ENFILE:
        return f"The system reached its limit of open files ({error}). Raise fs.file-max, or request fewer workers."
    if number == errno.EAGAIN or _LIMITED_START in str(error):
        return (
            f"The limit of processes and threads is reached ({error}). Raise it with `ulimit -u`, or pids.max of the "
            "control group, or request fewer workers."
        )
    if number == errno.ENOMEM:
        return f"The system has no memory for another process ({error}). Request fewer workers."
    if isinstance(error, EOFError):
        return "The fork server ended before it had started the worker. Look at what it printed."
    return f"The start failed with {type(error).__name__}: {error}."


def is_at_the_end(error: BaseException) -> bool:
    """Return whether a start failed because the program ends: from 3.12 on, Python starts nothing then."""
    return isinstance(error, RuntimeError) and _AT_THE_END in str(error)


def is_limit(error: BaseException | None) -> bool:
    """Return whether a worker failed at a limit of the system, and not because of the code that it runs."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
    return isinstance(error, RuntimeError) and _LIMITED_START in str(error)


def _n_open(below: int) -> int:
    """Count the open descriptors with numbers below a limit."""
    try:
        names = os.listdir(_OPEN_FILES)  # noqa: PTH208
    except OSError as error:
        return below if error.errno == errno.EMFILE else 0
    return max(0, sum(name.isdecimal() and int(name) < below for name in names) - 1)  # one of them lists the folder
