"""The file of a run store: one SQLite database, who may open it, its tables, and how they came to be.

    runs ──┬── tasks       a row a settled task, with its last attempt
           ├── attempts    a row an attempt that failed
           ├── events      what happened but for the starts and ends of tasks, which `tasks` tells
           └── values      by fingerprint and run: a pickle, or which file it is in

A store is opened by those alone who wrote it: its values are pickles, which run code when they are read. Where its
folder can be written by others it is not opened at all: SQLite believes a journal that lies beside a database.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import stat
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from forgepar.errors import ForgeparError, StoreBusy, StoreError, StoreUntrusted
from forgepar.trust import distrust_of

# In one statement, as another program may just be making the tables.
_VERSION = (
    "SELECT user_version, application_id, (SELECT count(*) FROM sqlite_master) "
    "FROM pragma_user_version, pragma_application_id"
)
APPLICATION_ID = 0x666F7267  # "forg"
PATIENCE_SECONDS = 10.0  # for whoever holds the lock of the database
_STEP_SECONDS = 0.05
_ROWS_A_STATEMENT = 32
_CACHE_KIB = 32 << 10  # what one transaction touches at most, about: SQLite's own 2 MiB cost a tenth of its time
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_BESIDE = ("-journal", "-wal", "-shm")  # what SQLite takes for part of a database

# What each version added to the one before; the database's user_version tells how many of these it has.
MIGRATIONS = (
    """
    CREATE TABLE runs(
        id INTEGER PRIMARY KEY,
        run_id TEXT NOT NULL UNIQUE,
        workflow TEXT NOT NULL,
        status TEXT NOT NULL,      -- running, completed, failed, cancelled, interrupted
        began REAL NOT NULL,       -- seconds since the epoch
        seen REAL NOT NULL,        -- when it was known to go, the last time
        wall_seconds REAL,         -- NULL until it ended
        cpu_seconds REAL,
        peak_rss INTEGER,
        n_tasks INTEGER NOT NULL,
        n_layers INTEGER NOT NULL,
        workers INTEGER NOT NULL,
        schedule TEXT NOT NULL,
        resumed INTEGER NOT NULL,  -- whether values of earlier runs were used
        host TEXT NOT NULL,
        pid INTEGER NOT NULL,
        pid_started TEXT NOT NULL,
        python TEXT NOT NULL,
        forgepar TEXT NOT NULL,
        callables BLOB NOT NULL,   -- names of what the tasks call (see `pack_texts`)
        callable_of BLOB NOT NULL, -- which of these, a task each (see `pack_integers`)
        bases BLOB NOT NULL,       -- what names of tasks begin with
        base_of BLOB NOT NULL,     -- with which of these each does
        ordinals BLOB NOT NULL,    -- what it has behind that; -1: nothing
        given_names BLOB NOT NULL, -- number and name, one behind the other, of tasks whose name is another
        edges BLOB NOT NULL        -- all that are waited for, then all that wait
    );
    CREATE TABLE tasks(
        run INTEGER NOT NULL,
        task INTEGER NOT NULL,
        status INTEGER NOT NULL,   -- runstate.Status
        fingerprint BLOB,          -- NULL where the value was not kept
        source INTEGER,            -- of one that is cached, the run that did it; of one skipped, the task it waited for
        seq INTEGER,               -- number of the first event that this row tells; NULL where `events` has them
        attempt INTEGER NOT NULL,
        start REAL,                -- seconds since the run began; of one that did not run, when that was known
        seconds REAL,
        worker INTEGER,
        bytes INTEGER NOT NULL,
        error TEXT,
        PRIMARY KEY(run, task)
    ) WITHOUT ROWID;
    CREATE TABLE attempts(
        run INTEGER NOT NULL,
        task INTEGER NOT NULL,
        attempt INTEGER NOT NULL,
        start REAL,
        seconds REAL,
        worker INTEGER,
        error TEXT NOT NULL,
        traceback TEXT NOT NULL,
        PRIMARY KEY(run, task, attempt)
    ) WITHOUT ROWID;
    CREATE TABLE events(
        run INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        line TEXT NOT NULL,
        PRIMARY KEY(run, seq)
    ) WITHOUT ROWID;
    CREATE TABLE "values"(
        fingerprint BLOB NOT NULL,
        run INTEGER NOT NULL,
        kind INTEGER NOT NULL,     -- 0 scalar, 1 blob, 2 file
        checksum INTEGER NOT NULL, -- CRC-32 of fingerprint and payload, begun with the kind
        payload BLOB NOT NULL,     -- the pickle, or digest and lengths of what is in a file
        PRIMARY KEY(fingerprint, run)
    ) WITHOUT ROWID;
    """,
)


def open_to_write(path: Path, patience: float = PATIENCE_SECONDS) -> sqlite3.Connection:
    """Open a store to write; make it where there is none, for its owner alone.

    Args:
        path: the store's file.
        patience: how long to wait for whoever holds its lock, seconds.

    Raises:
        StoreUntrusted: others may write to it.
        StoreBusy: another program holds its lock.
        StoreError: it cannot be written, is no run store, or was written by a newer version.
    """
    real = path.resolve()  # what this process does to its current folder later is of no account

    def connect() -> sqlite3.Connection:
        with _making(path):
            _make(real)
        connection = sqlite3.connect(real, timeout=patience, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection, path, time.monotonic() + patience)
            with _making(path):
                files_of(path).mkdir(mode=0o700, exist_ok=True)
        except BaseException:
            connection.close()
            raise
        return connection

    return _trusted(path, connect)


def _make(real: Path) -> None:
    """Make an empty file where there is none.

    One that is there is not opened: to close it again would take away the locks that another connection of this process
    has on it, as the system counts locks by process.

    Raises:
        OSError: it cannot be made, or what is there cannot be written.
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
    """Open a store to read, also while a run writes to it.

    Raises:
        StoreError: as for `open_to_write`; or there is none.
    """
    if not path.is_file():
        raise StoreError(
            f"there is no run store {str(path)!r}. run(store=...) makes one, or forgepar run --store.", path=str(path)
        )

    def connect() -> sqlite3.Connection:
        last: sqlite3.Error | None = None
        _take_back(path.resolve())
        for mode in _modes(path):
            connection = sqlite3.connect(
                f"file:{quote(os.fsencode(path.resolve()))}?mode={mode}",
                timeout=patience,
                isolation_level=None,
                uri=True,
            )
            try:
                if not _check_version(connection, path):
                    raise StoreError(
                        f"the run store {str(path)!r} is empty: no run was kept in it yet.", path=str(path)
                    )
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

    return _trusted(path, connect)


def _take_back(real: Path) -> None:
    """Have SQLite take back what a program was writing when it was killed, which it does for those that may write.

    That is so only of the first transaction of a store, which makes it: later ones are in the log beside it.
    """
    may_write = os.access(real, os.W_OK) and os.access(real.parent, os.W_OK)
    if may_write and real.with_name(real.name + "-journal").exists():
        with suppress(sqlite3.Error), closing(sqlite3.connect(real, timeout=0.0)) as connection:
            connection.execute(_VERSION)


def _modes(path: Path) -> Sequence[str]:
    """Return how to try to open a store to read it.

    Where its folder cannot be written, a database that nobody writes to is read as it lies there: all of it is in the
    file itself then, and nothing in the log beside it.
    """
    real = path.resolve()
    log = real.with_name(real.name + "-wal")
    is_whole = not log.exists() or not log.stat().st_size
    return ("ro", "ro&immutable=1") if is_whole and not os.access(real.parent, os.W_OK) else ("ro",)


def _trusted(path: Path, connect: Callable[[], sqlite3.Connection]) -> sqlite3.Connection:
    """Open a store, and check before that and after it that no other user can have written it.

    Raises:
        StoreUntrusted: another user can, or somebody replaced the store meanwhile.
    """
    check_trust(path)
    real = path.resolve()
    with _making(path):
        folder = os.open(real.parent, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        was = _looked_up(real.name, folder)
        with telling(path):
            connection = connect()
        try:
            check_trust(path)
            now = _looked_up(real.name, folder)
            is_same = now is not None and (was is None or os.path.samestat(was, now))
            if not is_same or not os.path.samestat(os.fstat(folder), real.parent.stat()):
                raise StoreUntrusted(
                    f"the run store {str(path)!r} was replaced while it was opened. Open it again if you did this.",
                    path=str(path),
                )
        except BaseException:
            connection.close()
            raise
        return connection
    finally:
        os.close(folder)


def check_trust(path: Path) -> None:
    """Refuse a store that another user may have written, replaced or put something beside.

    Raises:
        StoreUntrusted: a folder on the way to it can be written by others; or so can the store itself, its folder of
            values, or what SQLite has beside it.
        StoreError: the way to it cannot be followed.
    """
    with _making(path):
        found = distrust_of(path) or distrust_of(files_of(path))
    if found is not None:
        risk = "another user could replace the store or put a journal beside it"
        raise StoreUntrusted(
            f"the folder of the run store {str(path)!r} cannot be trusted: {found}, so {risk}. Its values are pickles, "
            f"and to read one runs whatever code it holds. {found.remedy}.",
            path=str(path),
        )
    folder, real = files_of(path), path.resolve()
    for place in (real, folder, *(real.with_name(real.name + end) for end in _BESIDE)):
        own = place.resolve() if place == folder else place
        if (status := _looked_up(own)) is None:
            continue
        what = f"{'the folder of values' if place == folder else 'the run store'} {str(place)!r}"
        if status.st_uid != os.geteuid():
            raise StoreUntrusted(
                f"{what} belongs to another user (uid {status.st_uid}): its values are pickles, and to read one runs "
                "whatever code it holds. Use a store of your own.",
                path=str(path),
            )
        if place not in (real, folder) and not stat.S_ISREG(status.st_mode):
            raise StoreUntrusted(
                f"{what} is no file, and SQLite would take it for part of the store. Remove it.", path=str(path)
            )
        if status.st_mode & _OTHERS_MAY_WRITE:
            raise StoreUntrusted(
                f"{what} can be written by others (mode {stat.S_IMODE(status.st_mode):03o}): its values are pickles, "
                f"and to read one runs whatever code it holds. If nobody else did write to it: "
                f"chmod {'700' if place == folder else '600'} {place}",
                path=str(path),
            )


def _looked_up(place: Path | str, folder: int | None = None) -> os.stat_result | None:
    """Return what is known of an entry of an open folder, a link itself included; None: there is none."""
    try:
        return os.stat(place, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def files_of(path: Path) -> Path:
    """Return the folder beside a store that holds its large values; beside the file itself, where that is a link."""
    real = path.resolve()
    return real.with_name(real.name + ".files")


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Say what is wrong with a store, in place of what SQLite says."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # a fault of this program
    except sqlite3.Error as error:
        raise as_store_error(error, path) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say that a store is damaged where what it holds is not what this program writes.

    Whatever is in a damaged row, it ends in an error of one of these kinds where it is unpacked or compared.
    """
    try:
        with telling(path):
            yield
    except ForgeparError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, struct.error, zlib.error) as error:
        raise StoreError(
            f"the run store {str(path)!r} is damaged: what it holds cannot be read ({type(error).__name__}: {error}). "
            "Give another store, or a copy of this one; a resumed run in a new one computes all again.",
            path=str(path),
        ) from error


def check_columns(rows: Sequence[tuple[Any, ...]], kinds: Sequence[tuple[type, ...]]) -> None:
    """Refuse rows whose columns hold values of other types than these.

    Raises:
        ValueError: naming the column by its place.
    """
    for place, (column, allowed) in enumerate(zip(zip(*rows, strict=True), kinds, strict=True) if rows else ()):
        if found := set(map(type, column)).difference(allowed):
            raise ValueError(f"column {place} of its rows has a {found.pop().__name__}")


def as_store_error(error: sqlite3.Error, path: Path) -> StoreError:
    """Return an error of SQLite with what to do about it."""
    code = getattr(error, "sqlite_errorname", "")
    store = f"the run store {str(path)!r}"
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreBusy(
            f"{store} is locked by another program ({error}). Wait for it to end, or use another store.", path=str(path)
        )
    if is_full(error):
        mend = (
            "its disk is full. Free some of it (forgepar gc, which takes a little room itself), or use one elsewhere."
        )
    elif code.startswith(("SQLITE_READONLY", "SQLITE_PERM", "SQLITE_CANTOPEN", "SQLITE_AUTH")):
        mend = f"it cannot be written or opened here ({error}). Give a store that you may write."
    elif code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        mend = f"it is no run store, or it is damaged ({error}). Give another file; sqlite3's .recover may save some."
    else:
        mend = f"{error} ({code or type(error).__name__})."
    return StoreError(f"{store} cannot be used: {mend}", path=str(path))


def is_full(error: sqlite3.Error) -> bool:
    """Tell whether a disk had no room."""
    return getattr(error, "sqlite_errorname", "").startswith(("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE"))


@contextmanager
def _making(path: Path) -> Iterator[None]:
    """Say what to do where a store cannot be made."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"the run store {str(path)!r} cannot be written ({error.strerror}). "
            "Give a file that you may write, in a folder that is there.",
            path=str(path),
        ) from error


def _prepare(connection: sqlite3.Connection, path: Path, deadline: float) -> None:
    """Bring a database to the form that this version knows; one of something else is left as it is."""
    _check_version(connection, path)
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            break
        except sqlite3.OperationalError as error:
            # Two that make it at once: to change the mode is refused at once, whatever the patience.
            if not getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                raise
            time.sleep(_STEP_SECONDS)
    if mode != "wal":
        raise StoreError(
            f"the run store {str(path)!r} is on a file system without shared memory for SQLite (journal mode {mode}). "
            "Put it on a local disk.",
            path=str(path),
        )
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    if _check_version(connection, path) == len(MIGRATIONS):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for script in MIGRATIONS[_check_version(connection, path) :]:  # somebody else may just have done it
            for statement in filter(str.strip, script.split(";\n")):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # of what went wrong SQLite may have taken all back already
            connection.execute("ROLLBACK")
        raise


def _check_version(connection: sqlite3.Connection, path: Path) -> int:
    """Return which version a store has.

    Raises:
        StoreError: a newer one than this program knows, or it is a database of something else.
    """
    with closing(connection.execute(_VERSION)) as rows:
        version, application, n_tables = rows.fetchone()
    if application not in (APPLICATION_ID, 0) or (n_tables and not application):
        raise StoreError(f"{str(path)!r} is a database, but no run store. Give another file.", path=str(path))
    if version > len(MIGRATIONS):
        raise StoreError(
            f"the run store {str(path)!r} was written by a newer forgepar (its form is {version}, this program knows "
            f"up to {len(MIGRATIONS)}). Upgrade forgepar, or use another store.",
            path=str(path),
        )
    return int(version)


def insert_all(connection: sqlite3.Connection, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert rows that may be there already, several a statement: that takes two thirds of the time of one a statement.

    Args:
        connection: of the store, within a transaction.
        table: its name.
        rows: of equal length.
    """
    if not rows:
        return
    form = f"({','.join('?' * len(rows[0]))})"
    insert = f'INSERT OR REPLACE INTO "{table}" VALUES '  # noqa: S608  (a name of this program)
    several = insert + ",".join([form] * _ROWS_A_STATEMENT)
    n_full = len(rows) // _ROWS_A_STATEMENT * _ROWS_A_STATEMENT
    for first in range(0, n_full, _ROWS_A_STATEMENT):
        connection.execute(several, list(chain.from_iterable(rows[first : first + _ROWS_A_STATEMENT])))
    connection.executemany(insert + form, rows[n_full:])


def pack_texts(texts: Sequence[str]) -> bytes:
    """Return texts as one column of a row."""
    return zlib.compress(json.dumps(list(texts), ensure_ascii=False).encode("utf-8", "surrogatepass"), 1)


def unpack_texts(data: bytes) -> list[str]:
    """Turn back what `pack_texts` made."""
    texts: list[str] = json.loads(zlib.decompress(data).decode("utf-8", "surrogatepass"))
    return texts


def plain_text(text: str) -> str:
    """Return a text as SQLite takes it: surrogates, as in names of files that are no UTF-8, are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def pack_integers(*columns: NDArray[np.integer[Any]]) -> bytes:
    """Return integers as one column of a row, one array behind the other."""
    return zlib.compress(np.concatenate(columns).astype("<i4").tobytes(), 1)


def unpack_integers(data: bytes) -> NDArray[np.int32]:
    """Turn back what `pack_integers` made, as one array."""
    return np.frombuffer(zlib.decompress(data), "<i4").astype(np.int32)


def python_version() -> str:
    """Return the version of this Python as runs tell it."""
    return "{}.{}.{}".format(*sys.version_info)
