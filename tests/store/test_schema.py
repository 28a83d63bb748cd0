"""The schema of a run store: its version, migrations, and databases that are refused."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing

import pytest

import forgepar as fp
from forgepar.store.database import open_to_write
from forgepar.store.schema import MIGRATIONS


@pytest.fixture
def store(tmp_path):
    return tmp_path / "runs.db"


def run(store):
    wf = fp.Workflow("small")
    wf.add(sum, wf.map(abs, range(4)))
    return wf.run(backend="inline", store=store, resume=True)


def test_it_is_write_ahead_and_knows_its_version(store):
    with closing(open_to_write(store)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)


def test_many_make_it_at_once(store):
    errors = []

    def make():
        try:
            open_to_write(store).close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_schema_from_the_future_is_told(store):
    run(store)
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("PRAGMA user_version = 99")
    for use in (lambda: fp.Store.open(store), lambda: run(store)):
        with pytest.raises(fp.StoreError, match=r"written by a newer forgepar: its schema version is 99"):
            use()


def test_a_database_of_something_else_is_told_and_left_alone(store):
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("CREATE TABLE mine(x)")
        connection.commit()
    store.chmod(0o600)
    before = store.read_bytes()
    for use in (lambda: fp.Store.open(store), lambda: run(store)):
        with pytest.raises(fp.StoreError, match="is a database, but not a run store"):
            use()
    assert store.read_bytes() == before
    assert list(store.parent.iterdir()) == [store]


def test_a_store_of_an_earlier_form_is_brought_to_this_one_and_keeps_what_it_has(store, monkeypatch):
    run(store)
    newer = (*MIGRATIONS, "ALTER TABLE runs ADD COLUMN colour TEXT;\nCREATE TABLE colours(x);\n")
    monkeypatch.setattr("forgepar.store.schema.MIGRATIONS", newer)
    with closing(open_to_write(store)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(newer),)
        assert connection.execute("SELECT workflow, colour FROM runs").fetchall() == [("small", None)]
    assert run(store).status_counts() == {"cached": 5}


def test_a_migration_that_fails_changes_nothing(store, monkeypatch):
    run(store)
    monkeypatch.setattr("forgepar.store.schema.MIGRATIONS", (*MIGRATIONS, "CREATE TABLE colours(x);\nNONSENSE;\n"))
    with pytest.raises(fp.StoreError, match="syntax error"):
        open_to_write(store)
    monkeypatch.undo()
    with closing(open_to_write(store)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master WHERE name = 'colours'").fetchall() == []
    assert run(store).status_counts() == {"cached": 5}
