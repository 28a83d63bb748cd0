"""The SQL schema of a run store: one SQLite database with five tables, and the migrations that create them.

runs ──┬── tasks       one row per settled task, with its last attempt
       ├── attempts    one row per attempt that failed
       ├── events      one row per event, except starts and ends of tasks, which are made from `tasks`
       └── values      by fingerprint and run: a pickle, or the name of the file that holds it
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path

from forgepar.errors import StoreError

# One statement, because another program may be creating the tables at the same time.
SELECT_VERSION = (
    "SELECT user_version, application_id, (SELECT count(*) FROM sqlite_master) "
    "FROM pragma_user_version, pragma_application_id"
)
APPLICATION_ID = 0x666F7267  # "forg"
_STEP_SECONDS = 0.05
_CACHE_KIB = 32 << 10  # about the most that one transaction touches; SQLite's default of 2 MiB costs a tenth more time

# One script per version; the database's user_version is the number of scripts that were applied to it.
MIGRATIONS = (
    """
    CREATE TABLE runs(
        id INTEGER PRIMARY KEY,
        run_id TEXT NOT NULL UNIQUE,
        workflow TEXT NOT NULL,
        status TEXT NOT NULL,      -- running, completed, failed, cancelled, interrupted
        began REAL NOT NULL,       -- seconds since the epoch
        seen REAL NOT NULL,        -- when the writer last committed
        wall_seconds REAL,         -- NULL until the run ended
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
        callables BLOB NOT NULL,   -- names of the callables (see `pack_texts`)
        callable_of BLOB NOT NULL, -- per task, an index into callables (see `pack_integers`)
        bases BLOB NOT NULL,       -- base names of tasks
        base_of BLOB NOT NULL,     -- per task, an index into bases
        ordinals BLOB NOT NULL,    -- per task, the number after the base name; -1: none
        given_names BLOB NOT NULL, -- task number and name, alternating, of tasks with another name
        edges BLOB NOT NULL        -- sources of all edges, then their targets
    );
    CREATE TABLE tasks(
        run INTEGER NOT NULL,
        task INTEGER NOT NULL,
        status INTEGER NOT NULL,   -- scheduling.run_state.Status
        fingerprint BLOB,          -- NULL: the value was not stored
        source INTEGER,            -- cached: the run that computed it; skipped: the task that caused it
        seq INTEGER,               -- number of the first event made from this row; NULL: see `events`
        attempt INTEGER NOT NULL,
        start REAL,                -- seconds since the run began; when skipped or found, if it did not run
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
        checksum INTEGER NOT NULL, -- CRC-32 of fingerprint and payload, seeded with the kind
        payload BLOB NOT NULL,     -- the pickle; of a file, its digest and the lengths of its parts
        PRIMARY KEY(fingerprint, run)
    ) WITHOUT ROWID;
    """,
)


def migrate(connection: sqlite3.Connection, path: Path, deadline: float) -> None:
    """Configure a connection and bring the database to the newest version.

    Args:
        connection: to the store.
        path: of the store, for messages.
        deadline: until when to wait for another program that is creating the store, `time.monotonic` seconds.

    Raises:
        StoreError: the file is another database, is of a newer version, or is on a file system without shared memory.
    """
    check_version(connection, path)
    _enable_wal(connection, path, deadline)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    if check_version(connection, path) == len(MIGRATIONS):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for script in MIGRATIONS[check_version(connection, path) :]:  # another program may have done it since
            for statement in filter(str.strip, script.split(";\n")):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # after some errors SQLite has rolled back already
            connection.execute("ROLLBACK")
        raise


def _enable_wal(connection: sqlite3.Connection, path: Path, deadline: float) -> None:
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            break
        except sqlite3.OperationalError as error:
            # If two programs create the store, SQLite refuses the change of mode at once, whatever the timeout.
            if not getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                raise
            time.sleep(_STEP_SECONDS)
    if mode != "wal":
        raise StoreError(
            f"the run store {str(path)!r} is on a file system without shared memory for SQLite (journal mode {mode}). "
            "Move it to a local disk.",
            path=str(path),
        )


def check_version(connection: sqlite3.Connection, path: Path) -> int:
    """Return the version of a store; 0: the database is empty.

    Raises:
        StoreError: the version is newer than this program supports, or the database is not a run store.
    """
    with closing(connection.execute(SELECT_VERSION)) as rows:
        version, application, n_tables = rows.fetchone()
    if application not in (APPLICATION_ID, 0) or (n_tables and not application):
        raise StoreError(f"{str(path)!r} is a database, but not a run store. Give another file.", path=str(path))
    if version > len(MIGRATIONS):
        raise StoreError(
            f"the run store {str(path)!r} was written by a newer forgepar: its schema version is {version}, and this "
            f"program supports up to {len(MIGRATIONS)}. Upgrade forgepar, or use another store.",
            path=str(path),
        )
    return int(version)
