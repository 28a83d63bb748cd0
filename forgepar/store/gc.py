"""Garbage collection of a run store: which runs, values and files are removed.

    older runs ──> removed, with the values that no remaining run uses
    values     ──> removed, those of the oldest runs first, until the rest is within ``max_bytes``
    files      ──> removed if no value refers to them, as are partial files of writers that died

Values that a running run has computed or restored stay. While any run is running, files that were used within the last
hour stay as well, because their rows may not be written yet. A resumed run computes a removed value again when it needs
it.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from forgepar._validate import check_path, is_count, shown
from forgepar.errors import StoreBusy
from forgepar.machine import as_text
from forgepar.store.blobs import ValueFiles
from forgepar.store.database import as_store_error, files_of, is_full, open_to_read, open_to_write, read_errors
from forgepar.store.lock import remove_stale
from forgepar.store.resume import FILE, name_and_lengths
from forgepar.store.run_facts import facts_of_runs
from forgepar.version import public

_YOUNG_SECONDS = 3600.0  # files used within this time stay while a run is running
_OF_RUN = ("tasks", "attempts", "events")
_IN_USE = "SELECT fingerprint, coalesce(source, run) FROM tasks WHERE fingerprint IS NOT NULL"
# Deletes values of removed runs that no run uses, neither its own nor as the newest one of a fingerprint in use.
_DELETE_UNUSED = """
    DELETE FROM "values" AS old WHERE run NOT IN (SELECT id FROM runs)
    AND (fingerprint, run) NOT IN (SELECT fingerprint, run FROM in_use)
    AND (
        fingerprint NOT IN (SELECT fingerprint FROM in_use)
        OR EXISTS (SELECT 1 FROM "values" AS new WHERE new.fingerprint = old.fingerprint AND new.run > old.run)
    )
"""


@public
@dataclass(frozen=True, slots=True)
class Collected:
    """What `collect` removed from a store.

    Attributes:
        n_runs: number of runs removed.
        n_values: number of values removed.
        n_files: number of files removed.
        bytes_before: size of the store before, bytes.
        bytes_after: size of the store after, bytes.
    """

    n_runs: int
    n_values: int
    n_files: int
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return (
            f"removed {self.n_runs} runs, {self.n_values} values and {self.n_files} files; "
            f"{as_text(self.bytes_before)} before, {as_text(self.bytes_after)} now"
        )


@public
def collect(path: str | os.PathLike[str], *, keep: int | None = None, max_bytes: int | None = None) -> Collected:
    """Remove old runs, and values that no run uses, from a run store.

    Args:
        path: the store's file.
        keep: how many of the newest runs to keep, besides those that are running; None: all.
        max_bytes: most bytes that the values may take; those of the oldest runs are removed first. None: no limit.

    Returns:
        Counts of what was removed.

    Raises:
        StoreError: the store cannot be used.
        ValueError: ``keep`` or ``max_bytes`` is not a number from 0.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from forgepar import Workflow
        >>> wf = Workflow()
        >>> _ = wf.map(abs, range(3))
        >>> with TemporaryDirectory() as folder:
        ...     for _ in range(3):
        ...         _ = wf.run(backend="inline", store=f"{folder}/runs.db")
        ...     collect(f"{folder}/runs.db", keep=1).n_runs
        2
    """
    for name, value in (("keep", keep), ("max_bytes", max_bytes)):
        if value is not None and not is_count(value):
            raise ValueError(f"{name} must be an integer from 0, or None for no limit; got {shown(value)}.")
    store = check_path("path", path)
    open_to_read(store).close()  # raises if there is no store
    files = ValueFiles(files_of(store))
    before, began_at = _total_bytes(store, files), time.time()
    connection = open_to_write(store)
    try:
        with read_errors(store):
            connection.execute("PRAGMA temp_store = DEFAULT")  # VACUUM must not copy the database into memory
            n_runs, n_values = _remove_runs(connection, files.folder, keep) if keep is not None else (0, 0)
            if max_bytes is not None:
                n_values += _remove_values(connection, files, max_bytes)
            referred = _referred(connection)
            youngest = began_at - (_YOUNG_SECONDS if _running(connection, files.folder) else 0.0)
            not_ended = {run for (run,) in connection.execute("SELECT run_id FROM runs WHERE status = 'running'")}
        n_files = _remove_files(files, referred, youngest)
        remove_stale(files.folder, not_ended)
        _shrink(connection, store)
    finally:
        connection.close()
    return Collected(n_runs, n_values, n_files, before, _total_bytes(store, files))


def _running(connection: sqlite3.Connection, folder: Path) -> set[int]:
    """Return the numbers of the runs that are running; rows of killed runs have the same status."""
    return {facts.number for facts in facts_of_runs(connection, folder) if facts.status == "running"}


def _remove_runs(connection: sqlite3.Connection, folder: Path, keep: int) -> tuple[int, int]:
    """Remove all but the newest runs, and the values that no remaining run uses; return how many of each."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        running = _running(connection, folder)
        runs = [run for (run,) in connection.execute("SELECT id FROM runs ORDER BY id DESC")]
        gone = [(run,) for run in runs[keep:] if run not in running]
        for table in _OF_RUN:
            connection.executemany(f"DELETE FROM {table} WHERE run = ?", gone)  # noqa: S608  (names of this program)
        connection.executemany("DELETE FROM runs WHERE id = ?", gone)
        connection.execute("CREATE TEMP TABLE in_use(fingerprint, run, PRIMARY KEY(fingerprint, run)) WITHOUT ROWID")
        connection.execute(f"INSERT OR IGNORE INTO in_use {_IN_USE}")
        n_values = connection.execute(_DELETE_UNUSED).rowcount
        connection.execute("DROP TABLE in_use")
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
    return len(gone), n_values


def _remove_values(connection: sqlite3.Connection, files: ValueFiles, max_bytes: int) -> int:
    """Remove values of the oldest runs until the rest takes at most ``max_bytes``; return how many."""
    sizes = {name: size for name, (size, _) in files.sizes().items()}
    connection.execute("BEGIN IMMEDIATE")
    in_use = {
        pair
        for run in _running(connection, files.folder)
        for pair in connection.execute(f"{_IN_USE} AND run = ?", (run,))
    }
    counted: set[bytes] = set()
    n_bytes, gone = 0, []
    for run, fingerprint, n_own, payload in connection.execute(
        'SELECT run, fingerprint, length(payload), CASE kind WHEN ? THEN payload END FROM "values" ORDER BY run DESC',
        (FILE,),
    ):
        n_bytes += n_own
        if payload is not None and (name := name_and_lengths(payload)[0]) not in counted:
            n_bytes += sizes.get(name, 0)
            counted.add(name)
        if n_bytes > max_bytes and (fingerprint, run) not in in_use:
            gone.append((fingerprint, run))
    connection.executemany('DELETE FROM "values" WHERE fingerprint = ? AND run = ?', gone)
    connection.execute("COMMIT")
    return len(gone)


def _referred(connection: sqlite3.Connection) -> set[bytes]:
    """Return the names of the files that values refer to."""
    rows = connection.execute('SELECT payload FROM "values" WHERE kind = ?', (FILE,))
    return {name_and_lengths(payload)[0] for (payload,) in rows}


def _remove_files(files: ValueFiles, referred: Collection[bytes], before: float) -> int:
    """Remove files that no value refers to and that were last used before a time; return how many."""
    gone = [name for name, (_, used_at) in files.sizes().items() if name not in referred and used_at < before]
    for name in gone:
        files.remove(name)
    files.remove_partial(before)
    return len(gone)


def _shrink(connection: sqlite3.Connection, path: Path) -> None:
    """Return free space of the database to the file system, unless the store is busy or the disk is full."""
    is_shrinkable = connection.execute("PRAGMA freelist_count").fetchone()[0] > 0
    for statement in ("VACUUM",) * is_shrinkable + ("PRAGMA wal_checkpoint(TRUNCATE)",):
        try:
            connection.execute(statement).fetchall()
        except sqlite3.Error as error:
            found = as_store_error(error, path)
            if not isinstance(found, StoreBusy) and not is_full(error):
                raise found from error


def _total_bytes(path: Path, files: ValueFiles) -> int:
    parts = [path, path.with_name(path.name + "-wal")]
    own = sum(part.stat().st_size for part in parts if part.exists())
    return own + sum(size for size, _ in files.sizes().values())
