"""Folders of arenas, in shared memory and on disk. Only their owner may open them, and they are removed with it.

Each owner holds a lock on a file in its folders for its lifetime. A later run removes the folders of the same user if
it gets their lock: what a killed run left, in whichever container it ran, and never what a live run uses. Folder names
contain the owner's user id and pid, for people who look.
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

from forgepar.machine import available_memory
from forgepar.system.life_locks import hold, is_own, locking_abandoned, release
from forgepar.values.arena import IDLE, METER, Arena, ArenaLocation
from forgepar.values.usage_meter import UsageMeter

_PREFIX = "forgepar"
_MEMORY = Path("/dev/shm")  # noqa: S108  (a folder of our own, mode 0700, is made in it)
_LEAST_MEMORY = 16 << 20  # bytes; with less free, shared memory is not worth using
_OWNER = "owner"  # name of the file that the owner locks
_ATTEMPTS = 30  # another run may sweep a new folder before it is locked
_FREE_SHARE = 0.9  # of the free shared memory; other programs use it as well


def open_arena(n_workers: int = 0, budget: int | None = None) -> Arena:
    """Open a new arena, owned by this process, and remove arenas whose owners are dead.

    Args:
        n_workers: number of other processes that will use it.
        budget: maximum bytes in shared memory; None for half of the available memory.

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
            release(owner_file(folder))
        raise


def _open(temporary: Path, n_workers: int, budget: int | None, made: list[Path]) -> Arena:
    """Open an arena; append each folder to ``made`` before creating it."""
    spill_folder = _own_folder(temporary, made)
    free = _free_memory()
    if free >= _LEAST_MEMORY and temporary != _MEMORY:
        most = min(free, available_memory() // 2 if budget is None else budget)
        with suppress(OSError):  # the memory that `_free_memory` found may be in use by now
            folder = _own_folder(_MEMORY, made)
            try:
                return _furnish(folder, spill_folder, most, n_workers)
            except BaseException:
                _discard(folder)
                raise
    return _furnish(spill_folder, spill_folder, 0, n_workers)


def remove_arena(arena: Arena) -> None:
    """Remove an arena's folders and files; existing mappings stay readable.

    Does nothing in a forked child of the process that opened the arena, as that process still uses it.
    """
    for folder in {arena.place.folder, arena.place.spill_folder}:
        _discard(folder)


def owner_file(folder: str | Path) -> str:
    """Return the path of the file that the owner of a folder has locked."""
    return f"{folder}{os.sep}{_OWNER}"


def _discard(folder: str | Path) -> None:
    if is_own(owner_file(folder)):
        _remove(folder)
        release(owner_file(folder))


def _new_name() -> str:
    return f"{_PREFIX}-{os.getuid()}-{os.getpid()}-k{os.urandom(4).hex()}"


def _own_folder(root: Path, made: list[Path]) -> Path:
    """Create a folder in ``root`` and lock it; try again if another run removes it in between."""
    for _ in range(_ATTEMPTS):
        folder = root / _new_name()
        made.append(folder)
        folder.mkdir(mode=0o700)
        try:
            if hold(owner_file(folder)):
                return folder
        except FileNotFoundError:
            continue
        except OSError:  # the arena can be made in the other place
            _remove(folder)
            raise
    raise FileNotFoundError(
        errno.ENOENT, "Another program removes new folders there. Set TMPDIR to another folder", str(root)
    )


def _free_memory() -> int:
    """Return how many bytes of shared memory may be used; 0 if there is none."""
    try:
        room = os.statvfs(_MEMORY)
    except OSError:
        return 0
    return int(room.f_bavail * room.f_frsize * _FREE_SHARE) if os.access(_MEMORY, os.W_OK) else 0


def _furnish(folder: Path, spill_folder: Path, budget: int, n_workers: int) -> Arena:
    """Create the files of an arena in its folder."""
    (folder / IDLE).mkdir(mode=0o700)
    UsageMeter.create(str(folder / METER), n_workers + 1)
    return Arena(ArenaLocation(str(folder), str(spill_folder), budget, n_workers + 1))


def _remove(folder: str | Path) -> None:
    """Remove a folder, its lock last: a folder without a lock is never swept."""
    if not _empty(folder) and not _empty(folder):  # try again, as file descriptors may have run out
        return  # a later run sweeps it
    with suppress(OSError):
        os.unlink(owner_file(folder))  # noqa: PTH108
    with suppress(OSError):
        os.rmdir(folder)  # noqa: PTH106


def _empty(folder: str | Path) -> bool:
    """Remove everything in a folder except its lock; return whether that worked."""
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
    """Remove this user's arenas in ``root`` whose owner is dead."""
    # The "k" marks folders with a lock. Earlier versions had none, so their folders may be in use.
    arena_name = re.compile(rf"{_PREFIX}-{os.getuid()}-\d+-k[0-9a-f]+")
    try:
        found = [entry for entry in os.scandir(root) if arena_name.fullmatch(entry.name)]
    except OSError:
        return
    for entry in found:
        with suppress(OSError):  # another run may be sweeping as well
            if _is_mine(entry):
                with suppress(OSError):  # it is not empty; an empty one has no lock yet, or was left so
                    os.rmdir(entry.path)  # noqa: PTH106
                with locking_abandoned(owner_file(entry.path)) as is_left:
                    if is_left:
                        _remove(entry.path)


def _is_mine(entry: os.DirEntry[str]) -> bool:
    found = entry.stat(follow_symlinks=False)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
