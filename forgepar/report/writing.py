"""Writing a file in pieces: it is there as a whole or, if something goes wrong on the way, as it was before.

Other users may be able to write to the folder, as to ``/tmp``. So the file is made under a name that nobody can guess,
where nothing was, for its owner alone; and no link or pipe of another user is written to.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from forgepar.trust import end_of_links

_NAME_BYTES = 8  # of the part of a name that cannot be guessed
_PERMISSIONS = 0o666


def write_pieces(path: Path | str, pieces: Iterable[str | bytes]) -> None:
    """Write text (as UTF-8) or bytes to a file as they are made, first under another name beside it.

    A new file can be read by its owner alone; one that replaces a file of this user has the same permissions as that.
    What is there and is no file, such as a pipe or ``/dev/stdout``, is written to as it is. A link of this user or of
    root stays one, and what it leads to is written.

    Raises:
        OSError: it cannot be written; the file is as it was.
        PermissionError: the same, as what is there is a link or a pipe of another user.
    """
    target = end_of_links(path)
    if target.exists() and not target.is_file():
        _write(_opened(target), pieces)
        return
    part = target.with_name(f".{os.urandom(_NAME_BYTES).hex()}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with suppress(OSError):  # nothing is there, or the file system has no permissions
            there = target.stat(follow_symlinks=False)
            if there.st_uid == os.geteuid():
                os.fchmod(descriptor, there.st_mode & _PERMISSIONS)
        _write(descriptor, pieces)
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def check_target(path: str | os.PathLike[str]) -> None:
    """See to it that a file can be written by `write_pieces`, before there is anything to write, as far as can be told.

    Raises:
        FileNotFoundError: the file's folder is not there.
        IsADirectoryError: the path is a folder's.
        PermissionError: nothing may be written there.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target} cannot be written: there is no folder {target.parent}. Make it first.")
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder. Give the name of a file, such as {target / 'run.html'}.")
    needed = target if target.exists() and not target.is_file() else target.parent
    if not os.access(needed, os.W_OK):
        raise PermissionError(f"{target} cannot be written: {needed} is not yours to write to. Give another path.")


def _write(descriptor: int, pieces: Iterable[str | bytes]) -> None:
    """Write pieces to an open file, and close it; names of files that are no UTF-8 as escapes."""
    with open(descriptor, "wb") as stream:
        stream.writelines(
            piece.encode(errors="backslashreplace") if isinstance(piece, str) else piece for piece in pieces
        )


def _opened(target: Path) -> int:
    """Open what is there and is no file to write."""
    descriptor = os.open(target, os.O_WRONLY | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "somebody just put a file in its place", str(target))
    return descriptor
