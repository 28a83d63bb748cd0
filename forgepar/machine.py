"""CPUs and memory that affinity and control groups leave to this process, processes, and sizes as text."""

from __future__ import annotations

import functools
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from forgepar._validate import refusal

MOST_BYTES = 2**63 - 1  # more than any system has; arithmetic above it may overflow
_GROUPS = "/sys/fs/cgroup"
_NO_LIMIT = 1 << 60  # bytes; control groups version 1 report a number above it instead of no limit
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 1 << (10 * power) for power, unit in enumerate("kmgt", 1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)


def available_cpus() -> int:
    """Count the CPUs that this process may use by its affinity and its control group's quota, rounded up."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        count = os.cpu_count() or 1
    return max(1, min(count, _quota_cpus()))


def available_memory() -> int:
    """Return the bytes of memory available without swapping, within the control groups' limits."""
    return min(_system_memory(), _group_memory())


def total_memory() -> int:
    """Return the bytes of memory that this process shares with others: the machine's, or its control group's limit."""
    return min([_NO_LIMIT, *(limit for limit, _ in _group_limits()), _machine_memory()])


def n_memory_kills() -> int:
    """Count the processes that the kernel killed for lack of memory since boot; 0 if the system does not report it."""
    with suppress(OSError, ValueError, StopIteration), open("/proc/vmstat") as file:  # noqa: PTH123
        return int(next(line for line in file if line.startswith("oom_kill ")).split()[1])
    return 0


def set_variables(variables: Mapping[str, str], then: Callable[[], object] | None = None) -> None:
    """Set environment variables of this process, then call a function."""
    os.environ.update(variables)
    if then is not None:
        then()


def as_bytes(size: int | str, name: str = "size", kind: type[Exception] = ValueError, *, least: int = 0) -> int:
    """Parse a size: a number of bytes, or a string such as "2GiB", "500 MB", "64k".

    Args:
        size: the size.
        name: the argument's name in the error.
        kind: the class of the error.
        least: the smallest valid number of bytes.

    Raises:
        ValueError: it is neither, below ``least``, or above `MOST_BYTES`.
    """
    n_bytes: float = -1
    if isinstance(size, int) and not isinstance(size, bool):
        n_bytes = size
    elif isinstance(size, str) and (match := _SIZE.fullmatch(size)) and match[2].lower() in _UNITS:
        n_bytes = float(match[1]) * _UNITS[match[2].lower()]
    if not least <= n_bytes <= MOST_BYTES:
        must_be = "a number of bytes" if not least else f"a number of bytes of at least {least}"
        raise refusal(name, f"{must_be}, or a string such as '2GiB' or '500MB'", size, kind)
    return int(n_bytes)


def as_text(n_bytes: float) -> str:
    """Format a size: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def hold_standard_descriptors() -> None:
    """Open the null device as descriptors 0, 1 and 2 where they are closed, as in daemons and after ``>&-``.

    Otherwise the next file or pipe gets such a number, and C code or a child process prints into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):  # the limit of open files is reached: leave it closed
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number


def _quota_cpus() -> int:
    """Return the smallest CPU quota of the control groups, version 2 or 1; a huge number if there is none."""
    least = 1 << 30
    for folder in _folders(_GROUPS, "cpu"):
        with suppress(OSError, ValueError):
            quota, period = _text_of(f"{folder}/cpu.max").split()
            least = min(least, -(-int(quota) // int(period)))
        with suppress(OSError, ValueError):
            quota, period = _text_of(f"{folder}/cpu.cfs_quota_us"), _text_of(f"{folder}/cpu.cfs_period_us")
            least = min(least, -(-int(quota) // int(period)) if int(quota) > 0 else least)
    return least


def _system_memory() -> int:
    return _memory_info("MemAvailable:", "available")


def _machine_memory() -> int:
    return _memory_info("MemTotal:", "total")


def _memory_info(line: str, name: str) -> int:
    with suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as file:  # noqa: PTH123
        return int(next(text for text in file if text.startswith(line)).split()[1]) * 1024
    import psutil

    found: int = getattr(psutil.virtual_memory(), name)
    return found


def _group_memory() -> int:
    """Return the least memory that a control group has left; a huge number if none has a limit."""
    return min((max(0, limit - used) for limit, used in _group_limits()), default=_NO_LIMIT)


def _group_limits() -> Iterator[tuple[int, int]]:
    """Yield the limit and the use of each control group that has a limit. The use excludes cached files."""
    for folder in _folders(_GROUPS, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError):
                most = int(_text_of(f"{folder}/{limit}"))
                if most < _NO_LIMIT:
                    yield most, int(_text_of(f"{folder}/{used}")) - _cached_files(folder)


def _cached_files(folder: str) -> int:
    """Return how many bytes of a group's memory are cached files that the kernel can drop at once."""
    lines = {}
    with suppress(OSError):
        lines = dict(line.split() for line in _text_of(f"{folder}/memory.stat").splitlines())
    return int(lines.get("total_inactive_file", lines.get("inactive_file", 0)))


@functools.cache
def _folders(root: str, controller: str) -> tuple[str, ...]:
    """Return the folders of this process's control groups and their visible parents.

    In a container the path may lie outside of it; then only the root exists, which is the container's group.
    """
    found = dict.fromkeys([root, f"{root}/{controller}"])
    with suppress(OSError, ValueError):
        for line in _text_of("/proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            parts = path.strip("/").split("/")
            top = f"{root}/{controller}" if controllers else root
            found |= dict.fromkeys(f"{top}/{'/'.join(parts[:n])}" for n in range(1, len(parts) + 1) if parts[0])
    return tuple(folder for folder in found if os.path.isdir(folder))  # noqa: PTH112


def _text_of(path: str) -> str:
    with open(path) as file:  # noqa: PTH123
        return file.read().strip()


@functools.cache
def kernel_id() -> str:
    """Return an id of the running kernel that changes at a restart; the host's name on systems without one.

    Containers of one machine share its kernel, and so the id.
    """
    with suppress(OSError):
        return _text_of("/proc/sys/kernel/random/boot_id").replace("-", "")
    import socket

    return socket.gethostname()


def start_time(pid: int) -> str:
    """Return when a process started, in a unit that does not depend on the clock; empty if it does not run."""
    if os.path.exists("/proc/self/stat"):  # noqa: PTH110  (workers load this module, and no pathlib)
        try:
            with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
                fields = file.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        return "" if fields[0] in "ZX" else fields[19]  # clock ticks from the boot to the start
    import psutil

    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(round(process.create_time() * 1000))
    except psutil.NoSuchProcess:
        return ""


def how_it_ended(exit_code: int) -> str:
    """Describe how a process ended; a negative code is the number of a signal."""
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    number = f"signal {-exit_code}"
    with suppress(ValueError):  # a number without a name
        number += f" ({signal.Signals(-exit_code).name})"
    return f"was ended by {number}"
