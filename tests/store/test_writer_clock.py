"""When a run is written to its store, and what is written again after a fault; by a clock that the tests set."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing

import numpy as np
import pytest

import forgepar as fp
from forgepar.records.events import (
    WorkflowTaskFailed,
    WorkflowTaskParallelCompleted,
    WorkflowTaskRetried,
    WorkflowTaskRolledBack,
    WorkflowToolFallback,
)
from forgepar.records.keeper import EARLIER_RUN, TasksNotRun
from forgepar.records.ledger import Ledger
from forgepar.scheduling.run_state import RunPolicy, Status
from forgepar.store import writer as writer_module
from forgepar.store.database import open_to_write
from forgepar.store.writer import StoreWriter
from forgepar.values.arena_folders import open_arena, remove_arena

N = 9


class Clock:
    now = 100.0

    def perf_counter(self):
        return self.now

    def time(self):
        return self.now + 7000.0


class Connection:
    """A connection that notes statements, and in which some of them fail or take their time."""

    def __init__(self, connection, clock):
        self._connection, self._clock = connection, clock
        self.statements, self.fails_at, self.seconds = [], None, 0.0

    def __getattr__(self, name):
        return getattr(self._connection, name)

    def execute(self, statement, *arguments):
        self.statements.append(statement)
        if self.fails_at and statement.startswith(self.fails_at):
            raise sqlite3.OperationalError("disk I/O error")
        if statement == "COMMIT":
            self._clock.now += self.seconds
        return self._connection.execute(statement, *arguments)

    def take(self):
        found, self.statements[:] = [*self.statements], []
        return [text for text in found if text == "COMMIT" or text.startswith("PRAGMA synchronous")]


class Kept:
    """A run of some tasks that is being kept."""

    def __init__(self, path, monkeypatch):
        self.path, self.clock, self.n_done = path, Clock(), 0
        monkeypatch.setattr(writer_module, "time", self.clock)
        made = []
        monkeypatch.setattr(
            writer_module, "open_to_write", lambda p: made.append(Connection(open_to_write(p), self.clock)) or made[-1]
        )
        wf = fp.Workflow("kept")
        wf.map(abs, range(N))
        self.plan, self.ledger, self.arena = wf.plan(), Ledger(N), open_arena()
        self.ledger.run_id, self.ledger.began, self.ledger.n_slots = "r1", 100.0, 3
        self.writer = StoreWriter(path, self.plan, RunPolicy(), None)
        self.connection = made[-1]
        self.writer.begin(self.ledger, self.arena)
        self.connection.take()

    def do(self, n, attempts=None):
        """Have the next tasks complete."""
        tasks = range(self.n_done, self.n_done + n)
        for task in tasks:
            self.ledger.start[task], self.ledger.duration[task] = self.clock.now + task, 0.25 + task
            self.ledger.worker[task], self.ledger.bytes[task] = task % 3, 10 * task
        self.ledger.attempts.update(attempts or {})
        self.writer.values(tasks, [100 + task for task in tasks])
        self.writer.take([(20 + 2 * self.n_done, tasks)])
        self.n_done += n

    def beat_at(self, now):
        self.clock.now = now
        self.writer.beat(now)
        return self.connection.take()

    def rows(self, query='SELECT count(*) FROM "values"'):
        with closing(sqlite3.connect(self.path)) as connection:
            return connection.execute(query).fetchall()

    def close(self):
        self.writer.close()
        remove_arena(self.arena)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    made = Kept(tmp_path / "runs.db", monkeypatch)
    yield made
    made.close()


NORMAL, FULL = (["PRAGMA synchronous = " + how, "COMMIT"] for how in ("NORMAL", "FULL"))


def test_results_are_written_a_fifth_of_a_second_after_the_last_ones_and_synced_after_a_second(kept):
    assert kept.writer.look_at == math.inf
    kept.do(2)
    assert kept.writer.look_at == pytest.approx(100.2)
    assert kept.beat_at(100.19) == []
    assert kept.rows() == [(0,)]
    assert kept.beat_at(100.21) == NORMAL
    assert kept.rows() == [(2,)]
    assert kept.writer.look_at == pytest.approx(101.0)  # to sync what is written
    kept.do(3)
    assert kept.writer.look_at == pytest.approx(100.41)
    assert kept.beat_at(100.5) == NORMAL
    assert kept.beat_at(100.99) == []
    assert kept.beat_at(101.0) == FULL
    assert kept.writer.look_at == math.inf
    assert kept.rows() == [(5,)]
    assert kept.rows("SELECT seen FROM runs") == [(7101.0,)]


def test_the_end_of_a_layer_is_synced_once(kept):
    kept.do(2)
    kept.writer.take([(1, WorkflowTaskParallelCompleted(0.0, 0, 2, seq=1))])
    assert kept.beat_at(100.3) == FULL
    assert kept.writer.look_at == math.inf
    kept.do(1)
    assert kept.beat_at(100.6) == NORMAL
    assert kept.writer.look_at == pytest.approx(101.3)


@pytest.mark.parametrize(("seconds", "look_at"), [(0.005, 0.2), (0.03, 0.6), (0.5, 1.0)])
def test_transactions_take_a_twentieth_of_the_time_but_wait_no_longer_than_a_second(kept, seconds, look_at):
    kept.connection.seconds = seconds
    kept.do(1)
    kept.beat_at(100.25)
    kept.do(1)
    assert kept.writer.look_at == pytest.approx(100.25 + seconds + look_at)


def test_rows_of_a_transaction_that_fails_are_written_by_a_later_one_and_told_of_once(kept):
    kept.connection.fails_at = "UPDATE runs SET seen"
    kept.do(2)
    with pytest.warns(fp.StoreWarning, match="Run r1 continues, and will try again"):
        assert "COMMIT" not in kept.beat_at(100.3)
    assert kept.writer.look_at == pytest.approx(101.3)
    kept.do(3)
    assert "COMMIT" not in kept.beat_at(101.4)  # a second warning would be an error here
    assert kept.rows() == [(0,)]
    assert not kept.connection.in_transaction
    kept.connection.fails_at = None
    assert kept.beat_at(102.5) == FULL  # nothing was synced for more than a second
    assert kept.rows() == kept.rows("SELECT count(*) FROM tasks") == [(5,)]
    kept.connection.fails_at = "COMMIT"
    kept.do(1)
    with pytest.warns(fp.StoreWarning, match="will try again"):  # it is another fault
        kept.beat_at(103.6)


def test_what_cannot_be_written_at_the_end_is_told(kept):
    kept.do(2)
    kept.connection.fails_at = "BEGIN"
    with pytest.warns(fp.StoreWarning, match="Run r1 does not keep the results since the last transaction"):
        kept.writer.finish("completed")
    assert kept.rows() == [(0,)]
    assert kept.rows("SELECT status FROM runs") == [("running",)]


def test_the_end_writes_all_the_figures_and_once(kept):
    kept.do(4)
    kept.clock.now = 111.0
    kept.ledger.cpu_seconds, kept.ledger.peak_rss = 5.5, 1234
    kept.writer.finish("failed")
    assert kept.connection.take() == FULL
    kept.writer.finish("interrupted")
    assert kept.rows("SELECT status, wall_seconds, cpu_seconds, peak_rss FROM runs") == [("failed", 11.0, 5.5, 1234)]
    assert kept.rows() == [(4,)]
    assert list(kept.path.with_name("runs.db.files").glob("*.*")) == []  # neither lock nor life file


def test_tasks_have_the_columns_of_their_last_attempt(kept):
    kept.do(3, attempts={1: 4})
    kept.writer.take([(60, TasksNotRun(7003.0, np.array([5, 7]), 1))])
    kept.ledger.began_at = 7001.0
    kept.beat_at(101.0)
    completed, skipped = int(Status.COMPLETED), int(Status.SKIPPED)
    assert kept.rows(
        "SELECT task, status, source, seq, attempt, start, seconds, worker, bytes FROM tasks ORDER BY task"
    ) == [
        (0, completed, None, 20, 1, 0.0, 0.25, 0, 0),
        (1, completed, None, 22, 4, 1.0, 1.25, 1, 10),
        (2, completed, None, 24, 1, 2.0, 2.25, 2, 20),
        (5, skipped, 1, 60, 0, 2.0, None, None, 0),
        (7, skipped, 1, 61, 0, 2.0, None, None, 0),
    ]
    assert kept.rows("SELECT count(*) FROM tasks WHERE fingerprint IS NOT NULL") == [(3,)]
    assert EARLIER_RUN not in {row[0] for row in kept.rows("SELECT source FROM tasks")}


def test_a_writer_that_never_began_ends_no_run(kept, monkeypatch):
    kept.do(1)
    kept.beat_at(100.3)
    other = StoreWriter(kept.path, kept.plan, RunPolicy(), None)
    other.finish("interrupted")
    assert kept.rows("SELECT id, status FROM runs") == [(1, "running")]


def test_what_a_fallback_gave_is_kept_for_the_run_alone(kept):
    fallback = WorkflowToolFallback(7002.0, kept.plan.name(1), 3, "down", "'x'", "value", seq=5)
    again = WorkflowToolFallback(7002.0, kept.plan.name(2), 1, "down", "RetryFallback", "retry", seq=6)
    kept.writer.take([(5, fallback), (6, again)])
    kept.do(4)
    kept.beat_at(100.3)
    assert kept.rows("SELECT task FROM tasks WHERE fingerprint IS NULL") == [(1,)]
    assert kept.rows('SELECT task FROM tasks NATURAL JOIN "values" ORDER BY task') == [(0,), (2,), (3,)]
    assert kept.rows("SELECT task, attempt, error FROM attempts ORDER BY task") == [(1, 3, "down"), (2, 1, "down")]
    assert kept.rows("SELECT seq FROM events ORDER BY seq") == [(5,), (6,)]


def test_a_failure_has_its_traceback_and_one_that_is_tried_again_has_none(kept):
    kept.ledger.errors[2] = LookupError("the last of them")
    kept.ledger.start[2], kept.ledger.duration[2], kept.ledger.worker[2] = 103.0, 0.5, 1
    kept.writer.take([(1, WorkflowTaskRetried(7003.0, kept.plan.name(2), 2, "the first", seq=1))])
    kept.writer.take([(2, WorkflowTaskFailed(7004.0, kept.plan.name(2), 2, "the last", seq=2))])
    kept.do(1)
    kept.beat_at(100.3)
    assert kept.rows("SELECT attempt, start, seconds, worker, error, traceback FROM attempts ORDER BY attempt") == [
        (1, 3.0, 0.5, 1, "the first", ""),
        (2, 3.0, 0.5, 1, "the last", "LookupError: the last of them\n"),
    ]
    assert kept.rows("SELECT status, attempt, error FROM tasks WHERE task = 2") == [(int(Status.FAILED), 2, "the last")]


def test_of_a_task_that_was_undone_no_value_stays_and_none_comes_later(kept):
    kept.do(3)
    kept.beat_at(100.3)
    kept.writer.take([(1, WorkflowTaskRolledBack(7003.0, kept.plan.name(1), None, seq=1))])
    kept.writer.take([(2, WorkflowTaskRolledBack(7003.0, kept.plan.name(2), "it failed", seq=2))])
    kept.writer.values(range(3), [1, 2, 3])
    kept.writer.take([])
    kept.beat_at(100.9)
    assert kept.rows("SELECT task FROM tasks WHERE status = 6") == [(1,)]
    assert kept.rows('SELECT task FROM tasks NATURAL JOIN "values" ORDER BY task') == [(0,), (2,)]
