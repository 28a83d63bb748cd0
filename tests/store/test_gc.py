"""Clearing a store: what goes, what stays, and that what stays can still be taken up."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from contextlib import closing

import numpy as np
import pytest
from conftest import wait_until

import forgepar as fp
from forgepar.store import gc as collecting
from forgepar.store.database import files_of
from forgepar.store.gc import collect
from forgepar.store.lock import RunLock


def run(store, offset, **more):
    wf = fp.Workflow("large")
    wf.add(lambda arrays: float(sum(array[0] for array in arrays)), wf.map(np.full, [50_000] * 3, [offset, 1, 2]))
    return wf.run(backend="inline", store=store, **more)


@pytest.fixture
def store(tmp_path):
    return tmp_path / "runs.db"


def numbers(store):
    with fp.Store.open(store) as opened:
        return [facts.number for facts in opened.runs()]


def n_cached(store):
    with fp.Store.open(store) as opened:
        return opened.run().table().status_counts().get("cached", 0)


def n_files(store):
    return len(list(files_of(store).glob("??/*")))


def test_old_runs_go_with_their_values_and_files(store):
    for offset in range(10, 15):
        run(store, offset)
    assert n_files(store) == 7  # two of them are the same in all runs
    collected = collect(store, keep=2)
    assert numbers(store) == [4, 5]
    assert (collected.n_runs, collected.n_values, collected.n_files) == (3, 12, 3)
    assert n_files(store) == 4
    assert collected.bytes_after < collected.bytes_before
    assert run(store, 14, resume=True).status_counts() == {"cached": 4}
    assert run(store, 10, resume=True).status_counts() == {"cached": 2, "completed": 2}


def test_a_run_that_was_killed_goes_like_any_other(store):
    for offset in range(10, 13):
        run(store, offset)
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("UPDATE runs SET status = 'running', pid_started = 'another one' WHERE id < 3")
        connection.commit()
    assert collect(store, keep=1).n_runs == 2
    assert numbers(store) == [3]


def test_of_values_that_many_runs_made_the_last_stays(store):
    for _ in range(3):
        run(store, 10)
    assert collect(store, keep=1).n_values == 8
    assert run(store, 10, resume=True).status_counts() == {"cached": 4}


def test_an_older_value_stays_where_a_run_that_stays_has_lost_its_own(store):
    for _ in range(3):
        run(store, 10)
    with closing(sqlite3.connect(store)) as connection:
        connection.execute('DELETE FROM "values" WHERE run = 3')
        connection.commit()
    assert collect(store, keep=1).n_values == 4
    assert run(store, 10, resume=True).status_counts() == {"cached": 4}


def test_the_database_is_not_copied_into_memory(store, monkeypatch):
    run(store, 10)
    seen, shrink = [], collecting._shrink

    def shrunk(connection, path):
        seen.append(connection.execute("PRAGMA temp_store").fetchone())
        shrink(connection, path)

    monkeypatch.setattr("forgepar.store.gc._shrink", shrunk)
    collect(store, keep=0)
    assert seen == [(0,)]  # in files, not (2,), in memory


def test_locks_that_killed_runs_left_go_and_no_others(store):
    run(store, 10)
    left = files_of(store) / "0123.lock"
    left.touch()
    lock = RunLock(files_of(store), "held", [])
    lock.try_acquire()
    collect(store)
    assert [path.name for path in files_of(store).glob("*.lock")] == [lock._path.name]
    lock.release()


def test_values_that_a_younger_run_took_over_stay(store):
    run(store, 10)
    run(store, 10, resume=True)
    collect(store, keep=1)
    assert numbers(store) == [2]
    with fp.Store.open(store) as opened:
        assert opened.run().value("full-0")[0] == 10
    assert run(store, 10, resume=True).status_counts() == {"cached": 4}


def test_values_of_the_oldest_runs_go_until_the_rest_is_small_enough(store):
    for offset in (10, 11, 12):
        run(store, offset)
    size = 50_000 * 8
    collected = collect(store, max_bytes=4 * size + 10_000)
    assert numbers(store) == [1, 2, 3]
    assert n_files(store) == 4
    assert collected.n_files == 1
    assert run(store, 12, resume=True).status_counts() == {"cached": 4}
    assert run(store, 10, resume=True)["lambda"] == 13.0


def test_nothing_may_stay(store):
    run(store, 10)
    collect(store, keep=0, max_bytes=0)
    assert numbers(store) == []
    assert n_files(store) == 0
    assert run(store, 10, resume=True).status_counts() == {"completed": 4}


def test_without_limits_nothing_goes_but_what_was_torn(store):
    run(store, 10)
    torn = next(files_of(store).glob("??/*")).parent / ".writing-1-1"
    torn.write_bytes(b"x")
    os.utime(torn, (1, 1))
    assert collect(store).n_runs == 0
    assert not torn.exists()
    assert run(store, 10, resume=True).status_counts() == {"cached": 4}


def test_a_run_that_goes_is_left_alone_with_its_files(store, tmp_path):
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    run(store, 10)
    wf = fp.Workflow("live")
    array = wf.add(np.full, 60_000, 5)
    held = wf.add(lambda a: (begun.touch(), wait_until(gate.exists, "the gate"), float(a[0]))[2], array)
    results = []
    thread = threading.Thread(target=lambda: results.append(wf.run(backend="inline", store=store)[held]))
    thread.start()
    wait_until(begun.exists, "the run")
    try:
        collected = collect(store, keep=0, max_bytes=0)
    finally:
        gate.touch()
        thread.join()
    assert (collected.n_runs, collected.n_files) == (1, 0)
    assert results == [5.0]
    assert numbers(store) == [2]


def test_what_a_run_that_goes_took_over_stays(store, tmp_path):
    gate = tmp_path / "gate"
    wf = fp.Workflow("live")
    held = wf.add(fp.task(lambda: wait_until(gate.exists, "the gate")).options(cache=False))
    array = wf.add(np.full, 60_000, 5.0)
    total = wf.add(lambda a, text, _: float(a[0]) + len(text), array, wf.add(lambda: "x" * 2000), held)
    gate.touch()
    wf.run(backend="inline", store=store)
    gate.unlink()
    for path in files_of(store).glob("??/*"):
        os.utime(path, (1, 1))
    results = []
    thread = threading.Thread(target=lambda: results.append(wf.run(workers=1, store=store, resume=True)[total]))
    thread.start()
    try:
        wait_until(lambda: n_cached(store) == 2, "the run")
        collected = collect(store, keep=0, max_bytes=0)
    finally:
        gate.touch()
        thread.join()
    assert (collected.n_runs, collected.n_values, collected.n_files) == (1, 0, 0)
    assert results == [2005.0]


def made_alone(store, *sizes):
    """Runs of one task each, whose values are texts; the sizes of what the store has of them, newest first."""
    for number, size in enumerate(sizes):
        wf = fp.Workflow()
        wf.add(str.__mul__, chr(97 + number), size)
        wf.run(backend="inline", store=store)
    with closing(sqlite3.connect(store)) as connection:
        return [n for (n,) in connection.execute('SELECT length(payload) FROM "values" ORDER BY run DESC')]


@pytest.mark.parametrize(("less", "n_gone"), [(0, 0), (1, 1)])
def test_values_may_take_just_as_much_as_is_said(store, less, n_gone):
    of_last, of_second, of_first = made_alone(store, 400, 500, 700)
    assert collect(store, max_bytes=of_last + of_second + of_first - less).n_values == n_gone
    assert collect(store, max_bytes=of_last + of_second - less).n_values == 1
    assert collect(store, max_bytes=of_last).n_values == 1 - n_gone
    assert made_alone(store) == [of_last]


def test_a_file_that_two_runs_refer_to_counts_once_and_stays_for_the_one(store):
    for name in ("first", "second"):
        wf = fp.Workflow()
        wf.add(fp.task(np.full).options(name=name, version=name), 50_000, 4.0)
        wf.run(backend="inline", store=store)
    assert n_files(store) == 1
    with closing(sqlite3.connect(store)) as connection:
        assert connection.execute('SELECT count(DISTINCT run) FROM "values"').fetchone() == (2,)
    assert collect(store, max_bytes=50_000 * 8 + 5000).n_values == 0
    assert collect(store, keep=1).n_files == 0
    assert n_files(store) == 1
    assert collect(store, keep=0).n_files == 1


def test_a_fault_midway_leaves_all_runs_as_they_were(store, monkeypatch):
    for offset in (10, 11):
        run(store, offset)
    monkeypatch.setattr(collecting, "_DELETE_UNUSED", "DELETE FROM no_such_table")
    with pytest.raises(fp.StoreError):
        collect(store, keep=0)
    monkeypatch.undo()
    assert numbers(store) == [1, 2]
    assert run(store, 11, resume=True).status_counts() == {"cached": 4}
    assert collect(store, keep=1).n_runs == 2  # no transaction and no table of the first call is in the way


def test_young_files_without_a_row_stay_while_a_run_goes_and_no_longer(store, monkeypatch):
    run(store, 10)
    files = files_of(store)
    young, old = files / "00" / ("00" * 16), files / "01" / ("01" * 16)
    for path, age in ((young, 3590.0), (old, 3610.0)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        at = time.time() - age
        os.utime(path, (at, at))
    facts = collecting._running
    monkeypatch.setattr(collecting, "_running", lambda *_: {1})
    collect(store)
    assert (young.exists(), old.exists()) == (True, False)
    monkeypatch.setattr(collecting, "_running", facts)
    collect(store)
    assert not young.exists()


@pytest.mark.parametrize(("name", "is_told"), [("SQLITE_BUSY", False), ("SQLITE_FULL", False), ("SQLITE_IOERR", True)])
def test_a_database_that_cannot_shrink_now_stays_as_it_is(store, name, is_told):
    run(store, 10)
    error = sqlite3.OperationalError("no")
    error.sqlite_errorname = name
    statements = []

    class Connection:
        def execute(self, statement):
            statements.append(statement)
            if statement == "VACUUM":
                raise error
            return self

        def fetchone(self):
            return (3,)

        def fetchall(self):
            return []

    if is_told:
        with pytest.raises(fp.StoreError):
            collecting._shrink(Connection(), store)
    else:
        collecting._shrink(Connection(), store)
        assert statements[-1] == "PRAGMA wal_checkpoint(TRUNCATE)"


@pytest.mark.parametrize("wrong", [{"keep": -1}, {"max_bytes": -1}])
def test_numbers_below_0_are_told(store, wrong):
    with pytest.raises(ValueError, match=rf"^{next(iter(wrong))} must be an integer from 0, .*got -1"):
        collect(store, **wrong)


def test_a_store_that_is_not_there_is_not_made(store):
    with pytest.raises(fp.StoreError, match="there is no run store"):
        collect(store, keep=1)
    assert not store.exists()
