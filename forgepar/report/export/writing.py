"""Atomic writing of a file in pieces: on an error, the file is as it was before.

Other users may be able to write to the folder, such as ``/tmp``. So the pieces go to a new file with a random name and
permissions for its owner only, and links and pipes of other users are not written to.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from forgepar.system.trust import end_of_links

_NAME_BYTES = 8  # random bytes in the name of the new file
_PERMISSIONS = 0o666


def write_pieces(path: Path | str, pieces: Iterable[str | bytes]) -> None:
    """Write pieces of text (as UTF-8) or bytes to a new file in the same folder, then rename it to ``path``.

    A new file is readable only by its owner; one that replaces a file of this user keeps its permissions. A path that
    is not a regular file, such as a pipe or ``/dev/stdout``, is written to directly. A link of this user or of root is
    followed.

    Raises:
        OSError: the file cannot be written; it is as it was before.
        PermissionError: the path is a link or a pipe of another user.
    """
    target = end_of_links(path)
    if target.exists() and not target.is_file():
        with _naming(path):
            _write(_opened(target), pieces)
        return
    part = _part_of(target)
    with _naming(path, part):
        descriptor = _made(part)
        try:
            with suppress(OSError):  # there is no file, or the file system has no permissions
                existing = target.stat(follow_symlinks=False)
                if existing.st_uid == os.geteuid():
                    os.fchmod(descriptor, existing.st_mode & _PERMISSIONS)
            _write(descriptor, pieces)
            part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def check_target(path: str | os.PathLike[str]) -> None:
    """Check that `write_pieces` can write a file, before there is anything to write.

    An existing file is not changed. For a moment, a file with a random name is in the same folder.

    Raises:
        FileNotFoundError: the folder of the file does not exist.
        IsADirectoryError: the path is a folder.
        PermissionError: the folder or file is not writable, or the path is a link or a pipe of another user.
        OSError: another error of the operating system.
    """
    target = Path(path)
    if target.parent.is_dir():
        target = end_of_links(target)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {target.parent}. Create it first.")
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder. Give the name of a file, such as {target / 'run.html'}.")
    if target.exists() and not target.is_file():
        if not os.access(target, os.W_OK):
            raise PermissionError(f"{target} cannot be written: you have no write permission. Give another path.")
        return
    if _is_kept(target):
        raise PermissionError(f"{target} cannot be written: it belongs to another user. Give another path.")
    part = _part_of(target)
    with _naming(path, part):
        os.close(_made(part))  # permissions do not show that a file system is read-only or has no files
        part.unlink()


def _is_kept(target: Path) -> bool:
    """Return whether a sticky folder such as ``/tmp`` prevents this user from replacing an existing file."""
    try:
        folder, existing = target.parent.stat(), target.lstat()
    except FileNotFoundError:
        return False
    return bool(folder.st_mode & stat.S_ISVTX) and os.geteuid() not in (0, folder.st_uid, existing.st_uid)


def _part_of(target: Path) -> Path:
    """Return a path with a random name in the folder of ``target``."""
    return target.with_name(f".{os.urandom(_NAME_BYTES).hex()}.part")


def _made(part: Path) -> int:
    """Create a new file for its owner only, and open it for writing."""
    return os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


@contextmanager
def _naming(path: str | os.PathLike[str], part: Path | None = None) -> Iterator[None]:
    """Make an `OSError` name ``path`` if it names ``part`` or no file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(part), part):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(descriptor: int, pieces: Iterable[str | bytes]) -> None:
    """Write pieces to an open file and close it. Surrogates, as in names of files, are escaped."""
    with open(descriptor, "wb") as stream:
        stream.writelines(
            piece.encode(errors="backslashreplace") if isinstance(piece, str) else piece for piece in pieces
        )


def _opened(target: Path) -> int:
    """Open a path that is not a regular file for writing."""
    descriptor = os.open(target, os.O_WRONLY | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "replaced by a file in the meantime", str(target))
    return descriptor
