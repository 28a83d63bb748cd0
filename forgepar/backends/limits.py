"""What the system lets this process have for its workers, and what to say where it lets it have no more.

    make_room(n) ──> the soft limit of descriptors is raised, up to the hard one     why(error) ──> text with a remedy

Of processes and threads nothing tells how many more there may be: limits are by user, by control group and by system,
and others take from them as well. So a start is tried, and what it fails with is told.
"""

from __future__ import annotations

import errno
import os
import resource
from contextlib import suppress

PER_WORKER = 12  # descriptors for a worker: 8 of its executor and process, 3 pipes, and its connection
SHARED = 12  # for what all workers share, the fork server and the watcher among it
AMID_START = 12  # come and go while a worker starts
_HEADROOM = 52  # more, where the limit is raised: for what else the program opens
_OPEN_FILES = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"  # noqa: PTH112  (it loads no pathlib)
_AT_THE_END = "interpreter shutdown"  # in what Python says of threads, forks and futures once a program ends
_LIMITED_START = "can't start new thread"


def make_room(n_wanted: int) -> int:
    """Tell how many descriptors can still be opened.

    Where they are fewer than wanted, the soft limit is raised so that there are, as far as the hard limit allows.

    Args:
        n_wanted: how many are to be there.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return n_wanted
    free = soft - _n_open(soft)
    if free < n_wanted and soft != hard:
        wanted = soft - free + n_wanted + _HEADROOM
        within = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):  # the system has a limit of its own, as macOS does
            resource.setrlimit(resource.RLIMIT_NOFILE, (within, hard))
            free += within - soft
    return free


def require_room(n_wanted: int) -> None:
    """Make room for descriptors.

    Raises:
        OSError: there cannot be as many.
    """
    if make_room(n_wanted) < n_wanted:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def share_with(pid: int) -> bool:
    """Let a process of ours open as many descriptors as this one; tell whether that worked."""
    try:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE))
    except (AttributeError, OSError, ValueError):
        return False
    return True


def soft_limit() -> float:
    """Return how many descriptors this process may have at once."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return float("inf") if soft == resource.RLIM_INFINITY else soft


def why(error: BaseException) -> str:
    """Tell why a worker could not be started, as a sentence, and the remedy as another."""
    number = error.errno if isinstance(error, OSError) else None
    if is_at_the_end(error):
        return f"This program ends, and Python lets it start nothing more ({error})."
    if number == errno.EMFILE:
        return (
            f"This process may have {soft_limit():.0f} open files at once ({error}). "
            "Raise the hard limit with `ulimit -n` before it starts, or ask for fewer workers."
        )
    if number == errno.ENFILE:
        return f"The system has no more open files ({error}). Raise fs.file-max, or ask for fewer workers."
    if number == errno.EAGAIN or _LIMITED_START in str(error):
        return (
            f"The limit of processes and threads is reached ({error}). Raise it with `ulimit -u`, or pids.max of the "
            "control group, or ask for fewer workers."
        )
    if number == errno.ENOMEM:
        return f"The system has no memory for another process ({error}). Ask for fewer workers."
    if isinstance(error, EOFError):
        return "The fork server ended before it had started the worker. What it printed says why."
    return f"Starting one failed with {type(error).__name__}: {error}."


def is_at_the_end(error: BaseException) -> bool:
    """Tell whether a start failed as the program ends: from 3.12 on, Python starts nothing then."""
    return isinstance(error, RuntimeError) and _AT_THE_END in str(error)


def is_limit(error: BaseException | None) -> bool:
    """Tell whether what a worker failed with is a limit, not a fault of what it runs."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
    return isinstance(error, RuntimeError) and _LIMITED_START in str(error)


def _n_open(below: int) -> int:
    """Count the open descriptors whose number is below another."""
    try:
        names = os.listdir(_OPEN_FILES)  # noqa: PTH208
    except OSError as error:
        return below if error.errno == errno.EMFILE else 0
    return max(0, sum(name.isdecimal() and int(name) < below for name in names) - 1)  # one was to list them
