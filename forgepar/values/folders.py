"""Where arenas are: folders that only their owner may open, in shared memory and on disk, and go with their owner.

A folder's name tells the owner's user id, pid and start time, so that a later run can sweep what a killed one left.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from forgepar.machine import available_memory
from forgepar.machine import start_time as _start_time
from forgepar.values.arena import IDLE, METER, Arena, Place
from forgepar.values.meter import Meter

_PREFIX = "forgepar"
_MEMORY = Path("/dev/shm")  # noqa: S108  (a folder of our own, mode 0700, is made in it)
_LEAST_MEMORY = 16 << 20  # bytes; where shared memory has less free, it is not worth using
_FREE_SHARE = 0.9  # of what is free in shared memory: others use it as well


def open_arena(n_workers: int = 0, budget: int | None = None) -> Arena:
    """Make an arena of this process, after sweeping those whose owners are dead.

    Args:
        n_workers: how many other processes will use it.
        budget: most bytes in shared memory; None: half of the memory that is available.

    Raises:
        OSError: neither shared memory nor the temporary folder can be written.
    """
    temporary = Path(tempfile.gettempdir())
    for root in {_MEMORY, temporary}:
        _sweep(root)
    name = f"{_PREFIX}-{os.getuid()}-{os.getpid()}-{_start_time(os.getpid())}-{os.urandom(4).hex()}"
    spill_folder = temporary / name
    spill_folder.mkdir(mode=0o700)
    free = _free_memory()
    if free >= _LEAST_MEMORY and temporary != _MEMORY:
        most = min(free, available_memory() // 2 if budget is None else budget)
        with suppress(OSError):  # what `_free_memory` saw may be gone
            return _furnish(_MEMORY / name, spill_folder, most, n_workers)
        _remove(_MEMORY / name)
    return _furnish(spill_folder, spill_folder, 0, n_workers)


def remove_arena(arena: Arena) -> None:
    """Remove an arena's folders and all in them; what is mapped stays readable."""
    for folder in {arena.place.folder, arena.place.spill_folder}:
        _remove(folder)


def _free_memory() -> int:
    """Tell how much of shared memory may be used, bytes; 0 where there is none."""
    try:
        room = os.statvfs(_MEMORY)
    except OSError:
        return 0
    return int(room.f_bavail * room.f_frsize * _FREE_SHARE) if os.access(_MEMORY, os.W_OK) else 0


def _furnish(folder: Path, spill_folder: Path, budget: int, n_workers: int) -> Arena:
    """Make the folder, and what an arena has in it."""
    folder.mkdir(mode=0o700, exist_ok=folder == spill_folder)
    (folder / IDLE).mkdir(mode=0o700)
    Meter.create(str(folder / METER), n_workers + 1)
    return Arena(Place(str(folder), str(spill_folder), budget, n_workers + 1))


def _remove(folder: str | Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Remove the arenas of this user in ``root`` whose owner no longer runs."""
    arena_name = re.compile(rf"{_PREFIX}-{os.getuid()}-(\d+)-(\d+)-[0-9a-f]+")
    try:
        found = [(entry, arena_name.fullmatch(entry.name)) for entry in os.scandir(root)]
    except OSError:
        return
    for entry, match in found:
        with suppress(FileNotFoundError):  # another run may be sweeping as well
            if match and _start_time(int(match[1])) != match[2] and _is_mine(entry):
                _remove(entry.path)


def _is_mine(entry: os.DirEntry[str]) -> bool:
    return entry.stat(follow_symlinks=False).st_uid == os.getuid()
