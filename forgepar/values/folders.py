"""Where arenas are: folders that only their owner may open, in shared memory and on disk, and go with their owner.

Each owner locks a file in its folders for life. A later run sweeps the folders of its own user which it gets that lock
of: what a killed run left, on whatever side of a container it ran, and never what a living one has. The name tells the
owner's user id and pid to whoever looks.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from forgepar.lifelocks import hold, is_own, let_go, taking
from forgepar.machine import available_memory
from forgepar.values.arena import IDLE, METER, Arena, Place
from forgepar.values.meter import Meter

_PREFIX = "forgepar"
_MEMORY = Path("/dev/shm")  # noqa: S108  (a folder of our own, mode 0700, is made in it)
_LEAST_MEMORY = 16 << 20  # bytes; where shared memory has less free, it is not worth using
_OWNER = "owner"  # the file in a folder that its owner locks
_ATTEMPTS = 30  # to make a folder: between its making and its lock another run may take it for one that was left
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
    made: list[Path] = []
    try:
        return _open(temporary, n_workers, budget, made)
    except BaseException:  # an interrupt, or a disk that is full
        for folder in made:
            _remove(folder)
            let_go(owner_file(folder))
        raise


def _open(temporary: Path, n_workers: int, budget: int | None, made: list[Path]) -> Arena:
    """Make an arena, and note its folders in a list before they are made."""
    spill_folder = _own_folder(temporary, made)
    free = _free_memory()
    if free >= _LEAST_MEMORY and temporary != _MEMORY:
        most = min(free, available_memory() // 2 if budget is None else budget)
        with suppress(OSError):  # what `_free_memory` saw may be gone
            folder = _own_folder(_MEMORY, made)
            try:
                return _furnish(folder, spill_folder, most, n_workers)
            except BaseException:
                _discard(folder)
                raise
    return _furnish(spill_folder, spill_folder, 0, n_workers)


def remove_arena(arena: Arena) -> None:
    """Remove an arena's folders and all in them; what is mapped stays readable.

    Does nothing in a forked child of the process that opened it, which goes on with it.
    """
    for folder in {arena.place.folder, arena.place.spill_folder}:
        _discard(folder)


def owner_file(folder: str | Path) -> str:
    """Return the path of the file that the owner of a folder has locked."""
    return f"{folder}{os.sep}{_OWNER}"


def _discard(folder: str | Path) -> None:
    if is_own(owner_file(folder)):
        _remove(folder)
        let_go(owner_file(folder))


def _new_name() -> str:
    return f"{_PREFIX}-{os.getuid()}-{os.getpid()}-k{os.urandom(4).hex()}"


def _own_folder(root: Path, made: list[Path]) -> Path:
    """Make a folder in ``root`` and lock it; another one where somebody took it for one that was left."""
    for _ in range(_ATTEMPTS):
        folder = root / _new_name()
        made.append(folder)
        folder.mkdir(mode=0o700)
        try:
            if hold(owner_file(folder)):
                return folder
        except FileNotFoundError:
            continue
        except OSError:  # the arena may be made elsewhere
            _remove(folder)
            raise
    raise FileNotFoundError(
        errno.ENOENT, "Folders made there are removed at once. Set TMPDIR to another folder", str(root)
    )


def _free_memory() -> int:
    """Tell how much of shared memory may be used, bytes; 0 where there is none."""
    try:
        room = os.statvfs(_MEMORY)
    except OSError:
        return 0
    return int(room.f_bavail * room.f_frsize * _FREE_SHARE) if os.access(_MEMORY, os.W_OK) else 0


def _furnish(folder: Path, spill_folder: Path, budget: int, n_workers: int) -> Arena:
    """Make the folder, and what an arena has in it."""
    (folder / IDLE).mkdir(mode=0o700)
    Meter.create(str(folder / METER), n_workers + 1)
    return Arena(Place(str(folder), str(spill_folder), budget, n_workers + 1))


def _remove(folder: str | Path) -> None:
    """Remove a folder, its lock last: what a folder without one has is never swept."""
    if not _empty(folder) and not _empty(folder):  # once more, as descriptors may have been short
        return  # a later run sweeps it
    with suppress(OSError):
        os.unlink(owner_file(folder))  # noqa: PTH108
    with suppress(OSError):
        os.rmdir(folder)  # noqa: PTH106


def _empty(folder: str | Path) -> bool:
    """Remove all that a folder has but its lock; tell whether that worked."""
    works = True
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return True
    except OSError:
        return False
    for entry in entries:
        try:
            if entry.name == _OWNER:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)  # noqa: PTH108
        except FileNotFoundError:
            continue
        except OSError:
            works = False
    return works


def _sweep(root: Path) -> None:
    """Remove the arenas of this user in ``root`` whose owner lives no more."""
    # The "k" tells them from folders of versions that held no lock: of those nobody can tell whether they are in use.
    arena_name = re.compile(rf"{_PREFIX}-{os.getuid()}-\d+-k[0-9a-f]+")
    try:
        found = [entry for entry in os.scandir(root) if arena_name.fullmatch(entry.name)]
    except OSError:
        return
    for entry in found:
        with suppress(OSError):  # another run may be sweeping as well
            if _is_mine(entry):
                with suppress(OSError):  # it is not empty: an owner is about to lock an empty one, or was killed then
                    os.rmdir(entry.path)  # noqa: PTH106
                with taking(owner_file(entry.path)) as is_left:
                    if is_left:
                        _remove(entry.path)


def _is_mine(entry: os.DirEntry[str]) -> bool:
    found = entry.stat(follow_symlinks=False)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
