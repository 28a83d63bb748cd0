"""Opening the database of a run store: who may open it, how it is created, and SQLite's errors as errors of stores.

The values of a store are pickles, and unpickling runs code. So a store is opened only if no other user can have written
to it. If other users can write to its folder it is not opened either: SQLite applies a journal that lies beside a
database. `forgepar.store.schema` has the tables.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from forgepar.errors import ForgeparError, StoreBusy, StoreError, StoreUntrusted
from forgepar.store.schema import SELECT_VERSION, check_version, migrate
from forgepar.system.trust import distrust_of

PATIENCE_SECONDS = 10.0  # how long to wait for the lock of the database
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_BESIDE = ("-journal", "-wal", "-shm")  # files that SQLite treats as part of a database
_RISK = "The values of a store are pickles, and unpickling runs any code that they contain."


def open_to_write(path: Path, patience: float = PATIENCE_SECONDS) -> sqlite3.Connection:
    """Open a store to write to it; create it with mode 600 if there is none.

    Args:
        path: the store's file.
        patience: how long to wait for the lock of the database, seconds.

    Raises:
        StoreUntrusted: another user may write to it.
        StoreBusy: another program holds its lock.
        StoreError: it cannot be written, is not a run store, or was written by a newer version.
    """
    real = path.resolve()  # so that a later change of the current folder has no effect

    def connect() -> sqlite3.Connection:
        with _write_errors(path):
            _create(real)
        connection = sqlite3.connect(real, timeout=patience, isolation_level=None, check_same_thread=False)
        try:
            migrate(connection, path, time.monotonic() + patience)
            with _write_errors(path):
                files_of(path).mkdir(mode=0o700, exist_ok=True)
        except BaseException:
            connection.close()
            raise
        return connection

    return _open_trusted(path, connect)


def _create(real: Path) -> None:
    """Create an empty file if there is none.

    An existing file is not opened. Closing it again would release the locks that other connections of this process
    have on it, because the system counts these locks per process.

    Raises:
        OSError: the file cannot be created, or exists and cannot be written.
    """
    try:
        os.close(os.open(real, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
    except FileExistsError:
        if not real.is_file():
            number = errno.EISDIR if real.is_dir() else errno.EINVAL
            raise OSError(number, os.strerror(number), str(real)) from None
        if not os.access(real, os.R_OK | os.W_OK):
            number = errno.EROFS if os.statvfs(real).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(number, os.strerror(number), str(real)) from None


def open_to_read(path: Path, patience: float = PATIENCE_SECONDS) -> sqlite3.Connection:
    """Open a store to read it; a run may write to it at the same time.

    Raises:
        StoreError: as for `open_to_write`; or there is no such file.
    """
    if not path.is_file():
        raise StoreError(
            f"there is no run store {str(path)!r}. Create one with run(store=...) or forgepar run --store.",
            path=str(path),
        )

    def connect() -> sqlite3.Connection:
        last: sqlite3.Error | None = None
        _roll_back_journal(path.resolve())
        for mode in _modes(path):
            connection = sqlite3.connect(
                f"file:{quote(os.fsencode(path.resolve()))}?mode={mode}",
                timeout=patience,
                isolation_level=None,
                uri=True,
            )
            try:
                if not check_version(connection, path):
                    raise StoreError(f"the run store {str(path)!r} is empty: it has no runs yet.", path=str(path))
            except sqlite3.Error as error:
                connection.close()
                last = error
            except BaseException:
                connection.close()
                raise
            else:
                return connection
        assert last is not None
        raise last

    return _open_trusted(path, connect)


def _roll_back_journal(real: Path) -> None:
    """Have SQLite roll back the transaction of a program that was killed, if this process may write to the store.

    Only the first transaction of a store, which creates it, uses a journal; later ones use the write-ahead log.
    """
    may_write = os.access(real, os.W_OK) and os.access(real.parent, os.W_OK)
    if may_write and real.with_name(real.name + "-journal").exists():
        with suppress(sqlite3.Error), closing(sqlite3.connect(real, timeout=0.0)) as connection:
            connection.execute(SELECT_VERSION)


def _modes(path: Path) -> Sequence[str]:
    """Return the modes in which to try to open a store to read it.

    If the folder is read-only, SQLite cannot create the files that it needs beside the database. The database can then
    be read as immutable, provided that it is complete: that its write-ahead log is empty or missing.
    """
    real = path.resolve()
    log = real.with_name(real.name + "-wal")
    is_complete = not log.exists() or not log.stat().st_size
    return ("ro", "ro&immutable=1") if is_complete and not os.access(real.parent, os.W_OK) else ("ro",)


def _open_trusted(path: Path, connect: Callable[[], sqlite3.Connection]) -> sqlite3.Connection:
    """Open a store; check before and after that no other user can have written to it.

    Raises:
        StoreUntrusted: another user can, or the store was replaced while it was opened.
    """
    check_trust(path)
    real = path.resolve()
    with _write_errors(path):
        folder = os.open(real.parent, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        before = _lstat(real.name, folder)
        with store_errors(path):
            connection = connect()
        try:
            check_trust(path)
            after = _lstat(real.name, folder)
            is_same = after is not None and (before is None or os.path.samestat(before, after))
            if not is_same or not os.path.samestat(os.fstat(folder), real.parent.stat()):
                raise StoreUntrusted(
                    f"the run store {str(path)!r} was replaced while it was opened. Open it again if you replaced it.",
                    path=str(path),
                )
        except BaseException:
            connection.close()
            raise
        return connection
    finally:
        os.close(folder)


def check_trust(path: Path) -> None:
    """Check that no other user can have written to a store, replaced it, or put a file beside it.

    Raises:
        StoreUntrusted: another user can write to a folder on the path, to the store, to its folder of values, or to a
            file that SQLite treats as part of the store.
        StoreError: the path cannot be followed.
    """
    with _write_errors(path):
        found = distrust_of(path) or distrust_of(files_of(path))
    if found is not None:
        raise StoreUntrusted(
            f"the folder of the run store {str(path)!r} cannot be trusted: {found}, so another user could replace the "
            f"store or put a journal beside it. {_RISK} {found.remedy}.",
            path=str(path),
        )
    folder, real = files_of(path), path.resolve()
    for place in (real, folder, *(real.with_name(real.name + end) for end in _BESIDE)):
        if (status := _lstat(place.resolve() if place == folder else place)) is None:
            continue
        what = f"{'the folder of values' if place == folder else 'the run store'} {str(place)!r}"
        if status.st_uid != os.geteuid():
            fault = f"belongs to another user (uid {status.st_uid}). {_RISK} Use a store of your own."
        elif place not in (real, folder) and not stat.S_ISREG(status.st_mode):
            fault = "is not a file, and SQLite would treat it as part of the store. Remove it."
        elif status.st_mode & _OTHERS_MAY_WRITE:
            mode = "700" if place == folder else "600"
            fault = (
                f"can be written by others (mode {stat.S_IMODE(status.st_mode):03o}). {_RISK} "
                f"If no other user wrote to it: chmod {mode} {place}"
            )
        else:
            continue
        raise StoreUntrusted(f"{what} {fault}", path=str(path))


def _lstat(place: Path | str, folder: int | None = None) -> os.stat_result | None:
    """Return the status of a file, or of the link itself; None: there is no such file.

    Args:
        place: its path, or its name in the open folder.
        folder: descriptor of the folder.
    """
    try:
        return os.stat(place, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def files_of(path: Path) -> Path:
    """Return the folder of a store's large values: beside the store, or beside the file that a link points to."""
    real = path.resolve()
    return real.with_name(real.name + ".files")


# Errors


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Raise errors of SQLite as StoreError."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # a bug in this program
    except sqlite3.Error as error:
        raise as_store_error(error, path) from error


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Raise errors of SQLite, and errors caused by a damaged row, as StoreError.

    Unpacking or comparing the columns of a damaged row ends in one of the types below.
    """
    try:
        with store_errors(path):
            yield
    except ForgeparError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, struct.error, zlib.error) as error:
        raise StoreError(
            f"the run store {str(path)!r} is damaged ({type(error).__name__}: {error}). Use a copy of it, or another "
            "store: a resumed run in a new store computes everything again.",
            path=str(path),
        ) from error


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Raise errors of the file system as StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"the run store {str(path)!r} cannot be written ({error.strerror}). "
            "Give a file that you may write to, in a folder that exists.",
            path=str(path),
        ) from error


def as_store_error(error: sqlite3.Error, path: Path) -> StoreError:
    """Return an error of SQLite as one that names the store and the remedy."""
    code = getattr(error, "sqlite_errorname", "")
    store = f"the run store {str(path)!r}"
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreBusy(
            f"{store} is locked by another program ({error}). Wait until it ends, or use another store.", path=str(path)
        )
    if is_full(error):
        fault = (
            "its disk is full. Free some space (forgepar gc, which needs a little space itself), "
            "or use a store on another disk."
        )
    elif code.startswith(("SQLITE_READONLY", "SQLITE_PERM", "SQLITE_CANTOPEN", "SQLITE_AUTH")):
        fault = f"it cannot be written or opened here ({error}). Give a store that you may write to."
    elif code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        fault = (
            f"it is not a run store, or it is damaged ({error}). Give another file; sqlite3's .recover may save a part."
        )
    else:
        fault = f"{error} ({code or type(error).__name__})."
    return StoreError(f"{store} cannot be used: {fault}", path=str(path))


def is_full(error: sqlite3.Error) -> bool:
    """Return whether the error is that the disk is full."""
    return getattr(error, "sqlite_errorname", "").startswith(("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE"))
