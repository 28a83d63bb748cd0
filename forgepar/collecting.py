"""Clearing a run store: which runs and values are to go, and what that frees.

    older runs ──> forgotten, with the values that no run which stays has
    values     ──> of the oldest runs first, until the rest is small enough
    files      ──> of values that are gone, and what writers that died left torn

What a run that goes at the same time made or took over stays: while there is one, no file goes that was used within
the hour either, as its row may not be written yet. A value that is gone is computed again when a resumed run needs it.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from forgepar.errors import StoreBusy
from forgepar.machine import as_text
from forgepar.priors import FILE, name_and_lengths
from forgepar.runlock import remove_stale
from forgepar.store import facts_of_runs
from forgepar.storefile import as_store_error, files_of, is_full, open_to_read, open_to_write, reading
from forgepar.validation import check_path, is_count, is_number, shown
from forgepar.valuefiles import ValueFiles

_YOUNG_SECONDS = 3600.0  # since a file was used, while a run goes
_OF_RUN = ("tasks", "attempts", "events")
_IN_USE = "SELECT fingerprint, coalesce(source, run) FROM tasks WHERE fingerprint IS NOT NULL"
# Of values whose run is gone, those that no run has: neither as its own, nor as all that is left of one of its tasks.
_DELETE_UNUSED = """
    DELETE FROM "values" AS old WHERE run NOT IN (SELECT id FROM runs)
    AND (fingerprint, run) NOT IN (SELECT fingerprint, run FROM in_use)
    AND (
        fingerprint NOT IN (SELECT fingerprint FROM in_use)
        OR EXISTS (SELECT 1 FROM "values" AS new WHERE new.fingerprint = old.fingerprint AND new.run > old.run)
    )
"""


@dataclass(frozen=True, slots=True)
class Collected:
    """What was removed from a store.

    Attributes:
        n_runs: how many runs.
        n_values: how many values.
        n_files: how many files of values.
        bytes_before: what the store took, bytes.
        bytes_after: what it takes now.
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


def collect(
    path: str | os.PathLike[str],
    *,
    keep: int | None = None,
    max_bytes: int | None = None,
) -> Collected:
    """Remove old runs and values from a run store.

    Args:
        path: the store's file.
        keep: how many of the newest runs stay, those that go beside them; None: all.
        max_bytes: what its values may take at most: those of the oldest runs go first; None: whatever they do.

    Raises:
        StoreError: the store cannot be used.
        ValueError: a number below 0.

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
            fault = "is below 0" if is_number(value) and value < 0 else "is no count"
            raise ValueError(f"{name}={shown(value)} {fault}. Give 0 or more.")
    store = check_path("path", path)
    open_to_read(store).close()  # which is refused where there is none
    files = ValueFiles(files_of(store))
    before, began_at = _total_bytes(store, files), time.time()
    connection = open_to_write(store)
    try:
        with reading(store):
            connection.execute("PRAGMA temp_store = DEFAULT")  # else a copy of all would be made in memory
            n_runs, n_values = _forget(connection, files.folder, keep) if keep is not None else (0, 0)
            if max_bytes is not None:
                n_values += _forget_values(connection, files, max_bytes)
            referred = _referred(connection)
            is_used = bool(_going(connection, files.folder))
            not_ended = {run for (run,) in connection.execute("SELECT run_id FROM runs WHERE status = 'running'")}
        n_files = _remove_files(files, referred, began_at - _YOUNG_SECONDS * is_used)
        remove_stale(files.folder, not_ended)
        _shrink(connection, store)
    finally:
        connection.close()
    return Collected(n_runs, n_values, n_files, before, _total_bytes(store, files))


def _going(connection: sqlite3.Connection, folder: Path) -> set[int]:
    """Return the numbers of the runs that go; one that was killed is written down as if it did."""
    return {facts.number for facts in facts_of_runs(connection, folder) if facts.status == "running"}


def _forget(connection: sqlite3.Connection, folder: Path, keep: int) -> tuple[int, int]:
    """Remove all but the newest runs, and the values that none of these has; return how many of both."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        going = _going(connection, folder)
        runs = [run for (run,) in connection.execute("SELECT id FROM runs ORDER BY id DESC")]
        gone = [(run,) for run in runs[keep:] if run not in going]
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


def _forget_values(connection: sqlite3.Connection, files: ValueFiles, max_bytes: int) -> int:
    """Remove values of the oldest runs until the rest takes no more than it may; return how many."""
    sizes = {name: size for name, (size, _) in files.sizes().items()}
    connection.execute("BEGIN IMMEDIATE")
    held = {
        pair
        for run in _going(connection, files.folder)
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
        if n_bytes > max_bytes and (fingerprint, run) not in held:
            gone.append((fingerprint, run))
    connection.executemany('DELETE FROM "values" WHERE fingerprint = ? AND run = ?', gone)
    connection.execute("COMMIT")
    return len(gone)


def _referred(connection: sqlite3.Connection) -> set[bytes]:
    """Return the names of the files that some value is in."""
    rows = connection.execute('SELECT payload FROM "values" WHERE kind = ?', (FILE,))
    return {name_and_lengths(payload)[0] for (payload,) in rows}


def _remove_files(files: ValueFiles, referred: Collection[bytes], before: float) -> int:
    """Remove files that no value is in and nobody used since some time; return how many."""
    gone = [name for name, (_, used_at) in files.sizes().items() if name not in referred and used_at < before]
    for name in gone:
        files.remove(name)
    files.remove_torn(before)
    return len(gone)


def _shrink(connection: sqlite3.Connection, path: Path) -> None:
    """Give what is free in the database back to the file system, if it can be had and there is room to do it."""
    is_shrinkable = connection.execute("PRAGMA freelist_count").fetchone()[0] > 0
    for statement in ("VACUUM",) * is_shrinkable + ("PRAGMA wal_checkpoint(TRUNCATE)",):
        try:
            connection.execute(statement).fetchall()
        except sqlite3.Error as error:
            told = as_store_error(error, path)
            if not isinstance(told, StoreBusy) and not is_full(error):
                raise told from error


def _total_bytes(path: Path, files: ValueFiles) -> int:
    parts = [path, path.with_name(path.name + "-wal")]
    own = sum(part.stat().st_size for part in parts if part.exists())
    return own + sum(size for size, _ in files.sizes().values())
