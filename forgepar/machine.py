"""What this process may use of the machine, CPUs and memory, as affinity and control groups allow; sizes as text."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

_GROUPS = "/sys/fs/cgroup"
_NO_LIMIT = 1 << 60  # bytes; version 1 writes a number above it where there is none
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 1 << (10 * power) for power, unit in enumerate("kmgt", 1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)


def available_cpus() -> int:
    """Count the CPUs that this process may use: its affinity, and its control group's quota rounded up."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        count = os.cpu_count() or 1
    return max(1, min(count, _quota_cpus()))


def available_memory() -> int:
    """Tell how many bytes of memory can be had without swapping, within the control groups' limits."""
    return min(_system_memory(), _group_memory())


def total_memory() -> int:
    """Tell how many bytes there are for this process and those beside it: the machine's, or a control group's."""
    return min([_NO_LIMIT, *(limit for limit, _ in _group_limits()), _machine_memory()])


def n_memory_kills() -> int:
    """Count the processes that the kernel ended for lack of memory since it started; 0 where it does not tell."""
    with suppress(OSError, ValueError, StopIteration), open("/proc/vmstat") as file:  # noqa: PTH123
        return int(next(line for line in file if line.startswith("oom_kill ")).split()[1])
    return 0


def set_variables(variables: Mapping[str, str], then: Callable[[], object] | None = None) -> None:
    """Set environment variables of this process, and call something that may need them."""
    os.environ.update(variables)
    if then is not None:
        then()


def as_bytes(size: int | str, name: str = "size") -> int:
    """Read a size: a number of bytes, or text like "2GiB", "500 MB", "64k".

    Args:
        size: the size.
        name: the argument that it is, for the error.

    Raises:
        ValueError: it is neither, or less than 0.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{name}={size!r} is no size. Give a number of bytes, or text such as '2GiB' or '500MB'.")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def as_text(n_bytes: float) -> str:
    """Write a size for people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def hold_standard_descriptors() -> None:
    """Have descriptors 0, 1 and 2 lead to nowhere where they are closed, as in daemons and after ``>&-``.

    Else the next file or pipe that is opened gets such a number, and with it whatever C code or a child process prints.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):  # at a limit: it is no worse than before
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free


def _quota_cpus() -> int:
    """Read the least CPU quota of the control groups, version 2 or 1; a huge number where there is none."""
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
    """Read the least that a control group has left; a huge number where none sets a limit."""
    return min((max(0, limit - used) for limit, used in _group_limits()), default=_NO_LIMIT)


def _group_limits() -> Iterator[tuple[int, int]]:
    """Yield the limit of each control group that sets one, and what is used of it: files that were read are not."""
    for folder in _folders(_GROUPS, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError):
                most = int(_text_of(f"{folder}/{limit}"))
                if most < _NO_LIMIT:
                    yield most, int(_text_of(f"{folder}/{used}")) - _cached_files(folder)


def _cached_files(folder: str) -> int:
    """Read how much of a group's memory holds files that it may drop at once."""
    lines = {}
    with suppress(OSError):
        lines = dict(line.split() for line in _text_of(f"{folder}/memory.stat").splitlines())
    return int(lines.get("total_inactive_file", lines.get("inactive_file", 0)))


@functools.cache
def _folders(root: str, controller: str) -> tuple[str, ...]:
    """Return the folders of the control groups that this process is in, and of those above, as far as it sees them.

    In a container the path may be one outside of it; then the root alone, which is the container's, is there.
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
    """Tell one kernel from another, and from itself before a restart; the host's name where the system has no such id.

    Containers of one machine have one kernel, and so the same id.
    """
    with suppress(OSError):
        return _text_of("/proc/sys/kernel/random/boot_id").replace("-", "")
    import socket

    return socket.gethostname()


def start_time(pid: int) -> str:
    """Tell when a process started, in a unit that setting the clock does not change; empty if it does not run."""
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
