"""What this process may use of the machine, CPUs and memory, as affinity and control groups allow; sizes as text."""

from __future__ import annotations

import os
import re
from contextlib import suppress

_GROUPS = "/sys/fs/cgroup"
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
    """Tell how many bytes of memory can be had without swapping, within the control group's limit."""
    return min(_system_memory(), _group_memory())


def n_memory_kills() -> int:
    """Count the processes that the kernel ended for lack of memory since it started; 0 where it does not tell."""
    with suppress(OSError, ValueError, StopIteration), open("/proc/vmstat") as file:  # noqa: PTH123
        return int(next(line for line in file if line.startswith("oom_kill ")).split()[1])
    return 0


def as_bytes(size: int | str) -> int:
    """Read a size: a number of bytes, or text like "2GiB", "500 MB", "64k".

    Raises:
        ValueError: it is neither, or less than 0.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{size!r} is no size. Give a number of bytes, or text such as '2GiB' or '500MB'.")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def as_text(n_bytes: float) -> str:
    """Write a size for people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def _quota_cpus() -> int:
    """Read the CPU quota of the control group, version 2 or 1; a huge number where there is none."""
    no_quota = 1 << 30
    with suppress(OSError, ValueError):
        quota, period = _text_of("cpu.max").split()
        return no_quota if quota == "max" else -(-int(quota) // int(period))
    with suppress(OSError, ValueError):
        quota, period = _text_of("cpu/cpu.cfs_quota_us"), _text_of("cpu/cpu.cfs_period_us")
        return no_quota if int(quota) < 0 else -(-int(quota) // int(period))
    return no_quota


def _system_memory() -> int:
    with suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as file:  # noqa: PTH123
        line = next(line for line in file if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    import psutil

    available: int = psutil.virtual_memory().available
    return available


def _group_memory() -> int:
    """Read what the control group has left, version 2 or 1; a huge number where it sets no limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            return max(0, int(_text_of(limit)) - int(_text_of(used)))
    return 1 << 62


def _text_of(name: str) -> str:
    with open(f"{_GROUPS}/{name}") as file:  # noqa: PTH123
        return file.read().strip()
