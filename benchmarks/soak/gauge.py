"""What a process and its descendants hold at a moment, by name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

MIB = 1 << 20
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (it is only looked at)


def reading() -> dict[str, float]:
    """Measure this process, its descendants, its shared memory and the temporary folder, which is its own.

    Returns:
        Memory in MiB: USS is what a process has for itself, PSS adds its part of what it shares with others. "workers"
        are all descendants: workers, their fork server and the program that watches over them.
    """
    own = psutil.Process()
    memory = own.memory_full_info()
    descendants = [found for process in own.children(recursive=True) if (found := _of_worker(process))]
    in_temporary = list(files_below(tempfile.gettempdir()))
    in_shared = list(files_in_shared_memory(own.pid))
    return {
        "parent USS, MiB": memory.uss / MIB,
        "parent PSS, MiB": memory.pss / MIB,
        "parent descriptors": own.num_fds(),
        "parent threads": own.num_threads(),
        "workers USS, sum, MiB": sum(one["uss"] for one in descendants) / MIB,
        "workers USS, largest, MiB": max((one["uss"] for one in descendants), default=0) / MIB,
        "workers PSS, sum, MiB": sum(one["pss"] for one in descendants) / MIB,
        "workers descriptors": sum(one["descriptors"] for one in descendants),
        "workers threads": sum(one["threads"] for one in descendants),
        "processes": 1 + len(descendants),
        "shared memory, MiB": sum(in_shared) / MIB,
        "shared memory, files": len(in_shared),
        "temporary folder, MiB": sum(in_temporary) / MIB,
        "temporary folder, files": len(in_temporary),
    }


def _of_worker(process: psutil.Process) -> dict[str, float] | None:
    """Measure a descendant; None if it has ended."""
    try:
        memory = process.memory_full_info()
        return {
            "uss": memory.uss,
            "pss": memory.pss,
            "descriptors": process.num_fds(),
            "threads": process.num_threads(),
        }
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # a dead one that nobody has waited for denies access
        return None


def files_in_shared_memory(pid: int) -> Iterator[int]:
    """Yield how many bytes each file takes that executors of a process have in shared memory."""
    for folder in _SHARED_MEMORY.glob(f"forgepar-*-{pid}-*"):
        yield from files_below(folder)


def files_below(folder: str | Path) -> Iterator[int]:
    """Yield how many bytes each file below a folder takes."""
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(os.path.join(path, name)).st_blocks * 512  # noqa: PTH118  (a Path each takes longer)
            except FileNotFoundError:
                continue
