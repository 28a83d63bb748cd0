"""Runs that are kept in a store and taken up again: what runs, what does not, and what is known of it afterwards."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import sqlite3
import sys
import threading
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import wait_until

import forgepar as fp
from forgepar.errors import ArenaFull
from forgepar.records.events import WorkflowTaskFailed
from forgepar.store.blobs import FileWriter, ValueFiles
from forgepar.store.database import open_to_write
from forgepar.store.gc import collect
from forgepar.store.resume import CachedResults

LARGE = 100_000  # float64s: a value that goes through a segment, and into a file


class Ran:
    """Counts which tasks ran, in a file, so that those in workers count too."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __forgepar_fingerprint__(self):
        return "a counter"

    def __call__(self, name):
        with self.path.open("a") as file:
            file.write(f"{name}\n")

    def take(self) -> dict[str, int]:
        """What ran since the last time."""
        found = Counter(self.path.read_text().split()) if self.path.exists() else Counter()
        self.path.unlink(missing_ok=True)
        return dict(found)


@pytest.fixture
def ran(tmp_path):
    return Ran(tmp_path / "ran")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "runs.db"


def tree(ran: Ran, n: int = 4, offset: int = 0) -> fp.Workflow:
    """Loads of large values, a sum of each, one of all."""

    def load(i):
        ran(f"load-{i}")
        return np.full(LARGE, float(i + offset))

    def total(array):
        ran("total")
        return float(array[:10].sum())

    def join(parts):
        ran("join")
        return sum(parts)

    wf = fp.Workflow("tree")
    wf.add(fp.task(join).options(name="join"), wf.map(total, wf.map(load, range(n))))
    return wf


def counts(result: fp.RunResult) -> dict[str, int]:
    return result.status_counts()


# What a resumed run does not run


def test_a_resumed_run_has_the_same_values_and_runs_nothing(ran, store, either_backend):
    wf = tree(ran)
    first = wf.run(**either_backend, store=store)
    assert ran.take() == {"load-0": 1, "load-1": 1, "load-2": 1, "load-3": 1, "total": 4, "join": 1}
    again = wf.run(**either_backend, store=store, resume=True)
    assert ran.take() == {}
    assert counts(again) == {"cached": 9}
    assert again["join"] == first["join"] == 60.0
    assert again.ok
    assert again.status == "completed"


def test_a_run_without_anything_to_do_starts_no_worker(ran, store):
    tree(ran).run(workers=2, store=store)
    before = len(multiprocessing.active_children())
    seen = []
    wf = tree(ran)
    wf.run(workers=2, store=store, resume=True, audit=lambda _: seen.append(len(multiprocessing.active_children())))
    assert set(seen) == {before}


def test_without_resume_everything_runs(ran, store):
    wf = tree(ran)
    wf.run(backend="inline", store=store)
    ran.take()
    wf.run(backend="inline", store=store)
    assert sum(ran.take().values()) == 9


def test_another_argument_runs_what_follows_it_alone(ran, store, either_backend):
    def build(numbers):
        wf = fp.Workflow("w")
        wf.add(lambda parts: ran("join") or sum(parts), wf.map(part, numbers))
        return wf

    def part(i):
        ran(f"part-{i}")
        return i

    build([1, 2, 3]).run(**either_backend, store=store)
    ran.take()
    result = build([1, 2, 9]).run(**either_backend, store=store, resume=True)
    assert ran.take() == {"part-9": 1, "join": 1}
    assert result["lambda"] == 12
    assert counts(result) == {"completed": 2, "cached": 2}


def test_large_values_of_earlier_runs_are_read_only_where_they_are_needed(ran, store, either_backend):
    wf = tree(ran)
    wf.run(**either_backend, store=store)
    ran.take()
    result = wf.run(**either_backend, store=store, resume=fp.Resume(rerun="total-1"), outputs=["load-2", "join"])
    assert ran.take() == {"total": 1}
    assert result["join"] == 60.0
    assert result["load-2"].tolist() == [2.0] * LARGE
    with pytest.raises(fp.ResultReleased):
        result["load-0"]


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_both_schedules_take_up(ran, store, schedule):
    wf = tree(ran)
    wf.run(workers=2, store=store, schedule=schedule)
    ran.take()
    result = wf.run(workers=2, store=store, schedule=schedule, resume=fp.Resume(start_from="load-3"))
    assert ran.take() == {"load-3": 1, "total": 1, "join": 1}
    assert result["join"] == 60.0


def test_values_of_all_kinds_come_back(store, either_backend):
    values = [None, True, 7, 2.5, "text", "t" * 5000, b"bytes", [1, "two"], {"a": (1, 2)}, np.arange(3), math.inf]
    values.append({"big": np.arange(LARGE), "text": "x" * 100_000})
    wf = fp.Workflow()
    made = wf.map(lambda number: values[number], range(len(values)))
    wf.run(**either_backend, store=store)
    again = wf.run(**either_backend, store=store, resume=True)
    assert counts(again) == {"cached": len(values)}
    for value, found in zip(values, again[made], strict=True):
        np.testing.assert_equal(found, value)
        assert type(found) is type(value)


# What is asked to run again


def test_rerun_runs_a_task_and_keeps_what_follows(ran, store):
    wf = tree(ran)
    wf.run(backend="inline", store=store)
    ran.take()
    wf.run(backend="inline", store=store, resume=fp.Resume(rerun=["load-1", "join"]))
    assert ran.take() == {"load-1": 1, "join": 1}


def test_start_from_runs_what_follows_too_and_takes_wildcards(ran, store):
    wf = tree(ran)
    wf.run(backend="inline", store=store)
    ran.take()
    wf.run(backend="inline", store=store, resume=fp.Resume(start_from="load-[01]"))
    assert ran.take() == {"load-0": 1, "load-1": 1, "total": 2, "join": 1}


@pytest.mark.parametrize("name", ["nobody", "nobody-*", "load-9/inner"])
def test_a_name_of_no_task_is_told_before_anything_runs(ran, store, name):
    with pytest.raises(fp.UnknownTask, match="has no task named"):
        tree(ran).run(backend="inline", store=store, resume=fp.Resume(rerun=name))
    assert ran.take() == {}


@pytest.mark.parametrize("wrong", [{"resume": "yes", "store": "x"}, {"resume": True}, {"resume": fp.Resume()}])
def test_what_cannot_be_a_resume_is_told(ran, wrong):
    with pytest.raises(ValueError, match=r"^resume( must be True, False, or .*, got 'yes'|=.* needs a store)"):
        tree(ran).run(backend="inline", **wrong)


@pytest.mark.parametrize("wrong", [[1], 7, None, b"load", fp.Workflow().add(abs, 1)])
def test_names_that_are_no_text_are_told(wrong):
    with pytest.raises(fp.WorkflowError, match="must be names of tasks"):
        fp.Resume(rerun=wrong)


# What cannot be kept


class Incomparable:
    """Travels, but is another one in every process."""

    def __forgepar_fingerprint__(self):
        return threading.Lock()


def test_what_cannot_be_compared_runs_again_and_is_told(ran, store):
    odd = Incomparable()
    wf = fp.Workflow()
    bad = wf.add(lambda: ran("bad") or bool(odd))
    wf.add(lambda x: ran("after") or x, bad)
    wf.add(lambda: ran("good") or 3)
    with pytest.warns(fp.StoreWarning, match=r"does not keep the value of 'lambda', or of the 1 that follow.*lock"):
        result = wf.run(backend="inline", store=store)
    assert set(result.not_stored) == {"lambda", "lambda-1"}
    assert result.not_stored["lambda-1"] == "it follows 'lambda'"
    ran.take()
    with pytest.warns(fp.StoreWarning):
        result = wf.run(backend="inline", store=store, resume=True)
    assert ran.take() == {"bad": 1, "after": 1}
    assert counts(result) == {"completed": 2, "cached": 1}


def test_what_joined_a_run_and_cannot_be_compared_is_told_once(store):
    def split():
        import threading

        class Locked:
            def __forgepar_fingerprint__(self):
                return threading.Lock()

        inner = fp.Workflow()
        return fp.Subflow(inner, inner.map(lambda _: 1, [Locked(), Locked()]))

    wf = fp.Workflow()
    for name in "ab":
        wf.add(fp.task(split).options(name=name))
    with pytest.warns(
        fp.StoreWarning, match=r"does not keep the value of 'a/lambda-0', 'a/lambda-1', or of.*lock"
    ) as told:
        result = wf.run(backend="inline", store=store)
    assert len(told) == 1
    assert set(result.not_stored) == {f"{name}/{task}" for name in "ab" for task in ("lambda-0", "lambda-1", "output")}


def test_cache_false_says_that_it_is_meant(ran, store):
    wf = fp.Workflow()
    now = wf.add(fp.task(lambda: ran("now")).options(cache=False, name="now"))
    wf.add(lambda x: ran("after"), now)
    result = wf.run(backend="inline", store=store)
    assert result.not_stored == {
        "now": "it is declared with cache=False",
        "lambda": "it follows 'now'",
    }
    ran.take()
    wf.run(backend="inline", store=store, resume=True)
    assert ran.take() == {"now": 1, "after": 1}


def test_version_stands_for_what_cannot_be_compared(ran, store):
    odd = Incomparable()

    def build(version):
        wf = fp.Workflow()
        wf.add(fp.task(lambda: ran("task") or bool(odd)).options(version=version))
        return wf

    build(1).run(backend="inline", store=store)
    ran.take()
    build(1).run(backend="inline", store=store, resume=True)
    assert ran.take() == {}
    build(2).run(backend="inline", store=store, resume=True)
    assert ran.take() == {"task": 1}


# Failures, fallbacks, retries


def test_a_failed_run_goes_on_where_it_failed(ran, store, either_backend, tmp_path):
    mended = tmp_path / "mended"

    def step(i):
        ran(f"step-{i}")
        if i == 2 and not mended.exists():
            raise LookupError("not yet")
        return i

    wf = fp.Workflow()
    wf.add(lambda parts: ran("sum") or sum(parts), wf.map(step, range(4)))
    with pytest.raises(fp.WorkflowFailed):
        wf.run(**either_backend, store=store, fail_fast=False)
    assert ran.take() == {"step-0": 1, "step-1": 1, "step-2": 1, "step-3": 1}
    mended.touch()
    result = wf.run(**either_backend, store=store, resume=True)
    assert ran.take() == {"step-2": 1, "sum": 1}
    assert result["lambda"] == 6


def test_what_was_made_with_a_fallback_is_not_taken_for_the_value_itself(ran, store):
    def broken():
        ran("broken")
        raise OSError("down")

    wf = fp.Workflow()
    part = wf.add(fp.task(broken).options(fallback=fp.ValueFallback(0)))
    wf.add(lambda x: ran("after") or x + 1, part)
    wf.add(lambda: ran("beside"))
    wf.run(backend="inline", store=store)
    ran.take()
    result = wf.run(backend="inline", store=store, resume=True)
    assert ran.take() == {"broken": 1, "after": 1}
    assert result["lambda"] == 1


def falls_back(ran: Ran, broken: Path, where: str) -> fp.Workflow:
    """A task that becomes three and their sum, of a value that has a fallback while a file is there."""

    def value(name, good):
        if broken.exists():
            raise OSError("down")
        return ran(name) or good

    def part(i):
        ran(f"part-{i}")
        return 10 * i

    def inner_of(n):
        wf = fp.Workflow("inner")
        return fp.Subflow(wf, wf.add(sum, wf.map(part, [n * i for i in range(3)])))

    def split(n):
        ran("split")
        return inner_of(n)

    def stand_in(error):
        ran("stand-in")
        return inner_of(7)

    def split_or_fail(n):
        if broken.exists():
            raise OSError("down")
        return split(n)

    wf = fp.Workflow("falls back")
    with_value = fp.task(value).options(name="value", fallback=fp.ValueFallback(7))
    with_call = fp.task(split_or_fail).options(name="split", fallback=stand_in)
    if where == "before":
        made = wf.add(fp.task(split).options(name="split"), wf.add(with_value, "value", 2))
    else:
        made = wf.add(with_call, 2)
    wf.add(fp.task(lambda x: ran("after") or x).options(name="after"), made)
    return wf


@pytest.mark.parametrize("where", ["before", "itself"])
def test_what_a_fallbacks_value_became_in_a_subflow_is_not_taken_for_the_value_itself(
    ran, store, tmp_path, where, either_backend
):
    broken = tmp_path / "broken"
    broken.touch()
    result = falls_back(ran, broken, where).run(**either_backend, store=store)
    assert result["after"] == 70 * (0 + 1 + 2)
    ran.take()
    broken.unlink()
    result = falls_back(ran, broken, where).run(**either_backend, store=store, resume=True)
    assert result["after"] == 20 * (0 + 1 + 2)
    made = ran.take()
    assert {name: made[name] for name in ("part-0", "part-2", "part-4", "after")} == {
        "part-0": 1,
        "part-2": 1,
        "part-4": 1,
        "after": 1,
    }
    falls_back(ran, broken, where).run(**either_backend, store=store, resume=True)
    assert ran.take() in ({}, {"split": 1})  # all of the good run is kept


@pytest.mark.parametrize("where", ["before", "itself"])
def test_a_subflow_that_a_fallbacks_value_became_takes_nothing_from_earlier_runs(
    ran, store, tmp_path, where, either_backend
):
    """Its tasks may read what the task before them has written, and that one has done something else now."""
    broken = tmp_path / "broken"
    wf = falls_back(ran, broken, where)
    wf.run(**either_backend, store=store)
    with sqlite3.connect(store) as connection:  # of the tasks of the subflow alone, the values are still there
        connection.execute(
            'DELETE FROM "values" WHERE fingerprint IN (SELECT fingerprint FROM tasks WHERE task < ?)', (len(wf),)
        )
    connection.close()
    ran.take()
    broken.touch()
    result = falls_back(ran, broken, where).run(**either_backend, store=store, resume=True)
    assert result["after"] == 70 * (0 + 1 + 2)
    first = "split" if where == "before" else "stand-in"
    assert ran.take() == {first: 1, "part-0": 1, "part-7": 1, "part-14": 1, "after": 1}


def test_undone_tasks_are_forgotten(ran, store, tmp_path):
    mended = tmp_path / "mended"

    def check(x):
        if not mended.exists():
            raise LookupError("not yet")

    wf = fp.Workflow()
    made = wf.add(fp.task(lambda: ran("made") or 5).options(name="made", compensate=lambda value: ran(f"undo-{value}")))
    wf.add(lambda: ran("beside"))
    wf.add(check, made)
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(backend="inline", store=store)
    assert caught.value.result.rollback.compensated == ("made",)
    assert ran.take() == {"made": 1, "beside": 1, "undo-5": 1}
    mended.touch()
    wf.run(backend="inline", store=store, resume=True)
    assert ran.take() == {"made": 1}


def test_what_was_made_from_an_undone_task_is_made_anew(ran, store, tmp_path):
    """As what is in a table, say, that was dropped; or what holds its name, which is another one then."""
    name, mended = tmp_path / "name", tmp_path / "mended"

    def make_table():
        ran("make")
        return name.read_text()

    def fill(table):
        ran("fill")
        return f"rows in {table}"

    def check(rows):
        if not mended.exists():
            raise LookupError("not yet")
        return rows

    wf = fp.Workflow()
    make = fp.task(make_table).options(compensate=lambda table: ran(f"drop-{table}"))
    checked = wf.add(check, wf.add(fill, wf.add(make)))
    wf.add(lambda: ran("beside"))
    name.write_text("a")
    with pytest.raises(fp.WorkflowFailed):
        wf.run(backend="inline", store=store)
    assert ran.take() == {"make": 1, "fill": 1, "beside": 1, "drop-a": 1}
    name.write_text("b")
    mended.touch()
    result = wf.run(backend="inline", store=store, resume=True)
    assert ran.take() == {"make": 1, "fill": 1}
    assert result[checked] == "rows in b"


def test_the_value_of_an_undone_task_does_not_come_back_when_its_file_is_written_late(ran, store, monkeypatch):
    from forgepar.store.rows import PendingRows
    from forgepar.store.writer import StoreWriter

    forgotten, write, write_rows, finish = threading.Event(), ValueFiles.write, PendingRows.write, StoreWriter.finish

    def written(rows, connection):
        write_rows(rows, connection)
        if rows.forgotten:
            forgotten.set()

    def finished(self, status):
        if self._run and not self._is_ended:
            self._flush(math.inf)  # as the clock may have it just before the end
        finish(self, status)

    monkeypatch.setattr(ValueFiles, "write", lambda files, parts: (forgotten.wait(), write(files, parts))[1])
    monkeypatch.setattr(PendingRows, "write", written)
    monkeypatch.setattr(StoreWriter, "finish", finished)
    wf = fp.Workflow()
    make = fp.task(lambda: np.ones(LARGE)).options(compensate=lambda _: ran("undo"))
    wf.add(lambda _: [][0], wf.add(make))
    with pytest.raises(fp.WorkflowFailed):
        wf.run(backend="inline", store=store)
    assert ran.take() == {"undo": 1}
    with fp.Store.open(store) as opened:
        assert opened.run().stored_values() == []


def interrupted_saga(ran: Ran, state: Path) -> fp.Workflow:
    """Two tasks that can be undone; what follows them interrupts the run, then fails, then is good, as a file says."""

    def make(i):
        ran(f"make-{i}")
        return np.full(LARGE, i)

    def end(_):
        match state.read_text():
            case "interrupt":
                raise KeyboardInterrupt
            case "fail":
                raise LookupError("no")

    wf = fp.Workflow("saga")
    made = wf.map(fp.task(make).options(compensate=lambda value: ran(f"undo-{int(value[0])}")), range(2))
    wf.add(end, made)
    return wf


def test_a_run_that_takes_over_from_one_that_was_killed_undoes_what_that_did(ran, store, tmp_path):
    state = tmp_path / "state"
    wf = interrupted_saga(ran, state)
    state.write_text("interrupt")
    with pytest.raises(KeyboardInterrupt):
        wf.run(backend="inline", store=store)
    state.write_text("fail")
    ran.take()
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(backend="inline", store=store, resume=True)
    assert ran.take() == {"undo-0": 1, "undo-1": 1}
    assert set(caught.value.result.rollback.compensated) == {"make-0", "make-1"}
    state.write_text("good")
    wf.run(backend="inline", store=store, resume=True)
    assert ran.take() == {"make-0": 1, "make-1": 1}


def test_what_a_completed_run_did_is_not_undone_by_a_later_one(ran, store, tmp_path):
    state = tmp_path / "state"
    wf = interrupted_saga(ran, state)
    state.write_text("good")
    wf.run(backend="inline", store=store)
    ran.take()
    state.write_text("fail")
    with pytest.raises(fp.WorkflowFailed):
        wf.run(backend="inline", store=store, resume=fp.Resume(rerun="end"))
    assert ran.take() == {}


def test_what_a_completed_run_took_over_is_not_undone_by_a_later_one(ran, store, tmp_path):
    state = tmp_path / "state"
    wf = interrupted_saga(ran, state)
    state.write_text("interrupt")
    with pytest.raises(KeyboardInterrupt):
        wf.run(backend="inline", store=store)
    state.write_text("good")
    wf.run(backend="inline", store=store, resume=True)
    ran.take()
    state.write_text("fail")
    with pytest.raises(fp.WorkflowFailed):
        wf.run(backend="inline", store=store, resume=fp.Resume(rerun="end"))
    assert ran.take() == {}


def test_what_a_completed_run_did_is_not_undone_once_that_run_is_forgotten(ran, store, tmp_path):
    state = tmp_path / "state"
    wf = interrupted_saga(ran, state)
    state.write_text("good")
    for _ in range(2):
        wf.run(backend="inline", store=store, resume=True)
    collect(store, keep=1)
    ran.take()
    state.write_text("fail")
    with pytest.raises(fp.WorkflowFailed):
        wf.run(backend="inline", store=store, resume=fp.Resume(rerun="end"))
    assert ran.take() == {}


def test_what_is_to_be_undone_and_is_lost_is_told(ran, store, tmp_path):
    state = tmp_path / "state"
    wf = interrupted_saga(ran, state)
    state.write_text("interrupt")
    with pytest.raises(KeyboardInterrupt):
        wf.run(backend="inline", store=store)
    state.write_text("fail")
    ran.take()

    class Remover:
        def write(self, events):
            if any(isinstance(event, WorkflowTaskFailed) for event in events):
                for path in Path(f"{store}.files").glob("??/*"):
                    path.unlink()

    wf2 = fp.Workflow("saga")  # one whose failing task takes nothing, so that the values are not read before
    made = wf2.map(wf.specs[0].fn, range(2))
    wf2.add(fp.task(lambda: (_ for _ in ()).throw(LookupError("no"))).options(after=made))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf2.run(backend="inline", store=store, resume=True, audit=Remover())
    assert ran.take() == {}
    assert set(caught.value.result.rollback.failed) == {"make-0", "make-1"}
    assert all(isinstance(error, fp.StoreError) for error in caught.value.result.rollback.failed.values())


def test_what_is_to_be_undone_and_finds_no_room_is_told(ran, store, tmp_path, monkeypatch):
    state = tmp_path / "state"
    wf = interrupted_saga(ran, state)
    state.write_text("interrupt")
    with pytest.raises(KeyboardInterrupt):
        wf.run(backend="inline", store=store)
    ran.take()

    def load(priors, task, arena):
        if task == 0:
            raise ArenaFull("no room")
        return load_all(priors, task, arena)

    load_all = CachedResults.load
    monkeypatch.setattr(CachedResults, "load", load)
    wf2 = fp.Workflow("saga")  # one whose failing task takes nothing, so that the values are not read before
    made = wf2.map(wf.specs[0].fn, range(2))
    wf2.add(fp.task(lambda: (_ for _ in ()).throw(LookupError("no"))).options(after=made))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf2.run(backend="inline", store=store, resume=True)
    assert ran.take() == {"undo-1": 1}
    assert set(caught.value.result.rollback.failed) == {"make-0"}


# Shapes that are decided while a run goes


@pytest.mark.parametrize("schedule", ["layers", "eager"])
@pytest.mark.parametrize("is_large", [False, True])
def test_branches_are_decided_by_the_value_of_the_earlier_run(ran, store, either_backend, is_large, schedule):
    def gate(x):
        ran("gate")
        return ["x" * 200_000] * x if is_large else x > 0

    def build(x):
        wf = fp.Workflow()
        chosen = wf.add(gate, x)
        then, otherwise = (lambda: ran("then") or 1), (lambda: ran("else") or 2)
        either = fp.when(wf, chosen, lambda: wf.add(then), lambda: wf.add(otherwise))
        wf.add(fp.task(lambda v: ran("join") or v).options(name="join"), either)
        return wf

    for x, branch, value in ((1, "then", 1), (0, "else", 2)):
        build(x).run(**either_backend, store=store, schedule=schedule)
        assert ran.take() == {"gate": 1, branch: 1, "join": 1}
        result = build(x).run(**either_backend, store=store, schedule=schedule, resume=True)
        assert ran.take() == {}
        assert result["join"] == value


def test_tasks_that_join_a_run_are_taken_up_as_well(ran, store, either_backend, tmp_path):
    mended = tmp_path / "mended"

    def part(i):
        ran(f"part-{i}")
        if i == 2 and not mended.exists():
            raise LookupError("not yet")
        return 10 * i

    def split(n):
        ran("split")
        inner = fp.Workflow("inner")
        return fp.Subflow(inner, inner.add(sum, inner.map(part, range(n))))

    wf = fp.Workflow()
    wf.add(lambda x: ran("after") or x, wf.add(split, 4))
    with pytest.raises(fp.WorkflowFailed):
        wf.run(**either_backend, store=store, fail_fast=False)
    ran.take()
    mended.touch()
    result = wf.run(**either_backend, store=store, resume=True)
    assert ran.take() == {"split": 1, "part-2": 1, "after": 1}
    assert result["lambda"] == 60
    result = wf.run(**either_backend, store=store, resume=fp.Resume(rerun="split/part-1"))
    assert ran.take() == {"split": 1, "part-1": 1}
    assert result["lambda"] == 60


def nested(ran: Ran) -> fp.Workflow:
    """A task that becomes three and their sum, which is not kept if a file says so, and one that follows it."""

    def part(i):
        ran(f"part-{i}")
        return np.full(LARGE, i)

    def total(parts):
        ran("total")
        return "x" * 100 * sum(int(part[0]) for part in parts)

    def split(n):
        inner, cache = fp.Workflow("inner"), not ran.path.with_name("not kept").exists()
        return fp.Subflow(inner, inner.add(fp.task(total).options(cache=cache), inner.map(part, range(n))))

    wf = fp.Workflow("nested")
    wf.add(fp.task(lambda x: ran("after") or x).options(name="after"), wf.add(split, 3))
    return wf


def test_what_follows_a_task_within_another_is_run_again_with_it(ran, store, either_backend):
    wf = nested(ran)
    wf.run(**either_backend, store=store)
    ran.take()
    result = wf.run(**either_backend, store=store, resume=fp.Resume(start_from="split/part-1"))
    assert ran.take() == {"part-1": 1, "total": 1, "after": 1}
    assert result["after"] == "x" * 300


def test_files_of_tasks_that_joined_are_read_once(ran, store, monkeypatch):
    def build(n):
        wf = fp.Workflow()
        arrays = wf.map(lambda i: np.full(LARGE, i), range(2))
        for _ in range(n):
            wf.add(lambda x, arrays: x, wf.map(abs, wf.add(lambda: [1])), arrays)
        return wf

    build(3).run(backend="inline", store=store)
    read, names = ValueFiles.read, []
    monkeypatch.setattr(ValueFiles, "read", lambda self, *name: (names.append(name), read(self, *name))[1])
    build(3).run(backend="inline", store=store, resume=fp.Resume(rerun="lambda-[123456789]"))
    assert 0 < len(names) <= 2 * 2  # to see whether it is whole, and when it is needed


def test_a_store_that_breaks_while_tasks_join_is_told_and_they_run(ran, store, monkeypatch):
    nested(ran).run(backend="inline", store=store)
    ran.take()
    find, calls = CachedResults.find, []

    def broken(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise sqlite3.OperationalError("disk I/O error")
        return find(*arguments)

    monkeypatch.setattr(CachedResults, "find", broken)
    with pytest.warns(fp.StoreWarning, match="disk I/O error.*The 5 tasks that joined the run run"):
        result = nested(ran).run(backend="inline", store=store, resume=fp.Resume(rerun="after"))
    assert ran.take() == {"part-0": 1, "part-1": 1, "part-2": 1, "total": 1, "after": 1}
    assert result["after"] == "x" * 300


def test_what_turns_out_to_follow_what_is_not_kept_is_given_all_the_same(ran, store):
    nested(ran).run(backend="inline", store=store)
    ran.take()
    ran.path.with_name("not kept").touch()
    result = nested(ran).run(backend="inline", store=store, resume=True)
    assert ran.take() == {"total": 1}
    assert result["after"] == "x" * 300


def test_a_map_over_a_handle_is_taken_up(ran, store):
    wf = fp.Workflow()
    items = wf.add(lambda: ran("items") or [1, 2, 3])
    squares = wf.map(lambda x: ran(f"square-{x}") or x * x, items)
    total = wf.add(lambda values: ran("sum") or sum(values), squares)
    first = wf.run(backend="inline", store=store)
    ran.take()
    again = wf.run(backend="inline", store=store, resume=True)
    assert not set(ran.take()) & {"items", "square-1", "square-2", "square-3", "sum"}
    assert again[total] == first[total] == 14


# Damage


def value_files(store: Path) -> list[Path]:
    return sorted(path for path in Path(f"{store}.files").glob("??/*"))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def alter(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("damage", [truncate, alter, Path.unlink])
def test_a_damaged_file_is_computed_again_with_a_warning(ran, store, damage):
    wf = tree(ran)
    wf.run(backend="inline", store=store)
    ran.take()
    for path in value_files(store):
        damage(path)
    with pytest.warns(fp.StoreWarning, match="computed again"):
        result = wf.run(backend="inline", store=store, resume=fp.Resume(rerun="total-1"))
    assert ran.take() == {"load-1": 1, "total": 1}
    assert result["join"] == 60.0


def test_what_was_computed_again_for_a_damaged_file_is_kept(ran, store):
    wf = tree(ran)
    wf.run(backend="inline", store=store)
    for path in value_files(store):
        alter(path)
    with pytest.warns(fp.StoreWarning, match="computed again"):
        wf.run(backend="inline", store=store, resume=fp.Resume(rerun="total-1"))
    ran.take()
    wf.run(backend="inline", store=store, resume=fp.Resume(rerun="total-1"))
    assert ran.take() == {"total": 1}


def test_an_altered_row_is_computed_again_with_a_warning(ran, store):
    wf = tree(ran)
    wf.run(backend="inline", store=store)
    ran.take()
    with sqlite3.connect(store) as connection:
        connection.execute('UPDATE "values" SET checksum = checksum + 1')
    connection.close()
    with pytest.warns(fp.StoreWarning, match="and 6 more are not used and will be computed again"):
        result = wf.run(backend="inline", store=store, resume=True)
    assert sum(ran.take().values()) == 9
    assert result["join"] == 60.0


def test_the_newest_value_counts(ran, store, tmp_path):
    wf = fp.Workflow()
    number = tmp_path / "number"
    read = wf.add(fp.task(lambda: int(number.read_text())).options(version=1))
    for i in range(3):
        number.write_text(str(i))
        wf.run(backend="inline", store=store)
    assert wf.run(backend="inline", store=store, resume=True)[read] == 2


def test_an_older_value_stands_in_for_an_altered_one(ran, store):
    wf = tree(ran)
    wf.run(backend="inline", store=store)
    wf.run(backend="inline", store=store)
    ran.take()
    with sqlite3.connect(store) as connection:
        connection.execute("UPDATE \"values\" SET payload = x'00' WHERE run = 2")
    connection.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wf.run(backend="inline", store=store, resume=True)
    assert ran.take() == {}


def test_texts_that_are_no_unicode_are_kept_escaped(store):
    def broken():
        raise OSError("no file caf\udce9")  # as a file's name is that is no UTF-8

    wf = fp.Workflow("caf\udce9")
    wf.add(broken)
    with pytest.raises(fp.WorkflowFailed):
        wf.run(backend="inline", store=store)
    with fp.Store.open(store) as opened:
        table = opened.run().table()
    assert table.workflow == r"caf\udce9"
    assert table.errors == {0: r"OSError: no file caf\udce9"}
    assert r"no file caf\udce9" in table.failures[0].traceback


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_store_that_is_taken_away_meanwhile_is_told(store, is_replaced):
    def take_away():
        store.unlink()
        if is_replaced:
            store.touch(mode=0o600)

    wf = fp.Workflow()
    wf.add(take_away)
    with pytest.warns(
        fp.StoreWarning, match="was removed or replaced during run .* nothing of this run is kept"
    ) as told:
        assert wf.run(backend="inline", store=store).ok
    assert len(told) == 1


# What the store tells is what the result tells


def eventful(tmp_path: Path) -> fp.Workflow:
    """Successes, retries, a failure, what is skipped for it, a branch, tasks that join, a fallback, a large value."""

    def flaky():
        if not (tmp_path / "flaky").exists():
            (tmp_path / "flaky").touch()
            raise OSError("once")
        return 1

    def split(n):
        inner = fp.Workflow("inner")
        inner.add(sum, inner.map(abs, range(n)))
        return fp.Subflow(inner)

    def broken(*_):
        raise LookupError("always")

    wf = fp.Workflow("eventful")
    one = wf.add(fp.task(flaky).options(retries=2))
    many = wf.map(abs, range(-3, 3))
    wf.add(split, one)
    wf.add(lambda *parts: np.full(LARGE, len(parts)), one, many)
    wf.add(fp.task(broken).options(name="instead", fallback=fp.ValueFallback(3)))
    wf.add(fp.task(broken).options(name="left out", fallback=fp.SkipFallback()))
    wf.add(lambda x: x, wf.add(broken, one))
    fp.when(wf, many[0], lambda: wf.add(int, 1), lambda: wf.add(int, 2))
    return wf


@pytest.mark.parametrize("is_resumed", [False, True])
def test_the_store_tells_the_same_as_the_result(store, tmp_path, either_backend, is_resumed):
    wf = eventful(tmp_path)
    for resume in (False, True)[: 1 + is_resumed]:
        with pytest.raises(fp.WorkflowFailed) as caught:
            wf.run(**either_backend, store=store, fail_fast=False, rollback="none", resume=resume)
        result = caught.value.result
    with fp.Store.open(store) as opened:
        run = opened.run()
        table, events = run.table(), list(run.events())
    assert events == list(result.events)
    expected = result.table()
    for field in dataclasses.fields(fp.RunTable):
        if field.name not in ("failures", "names"):
            np.testing.assert_equal(getattr(table, field.name), getattr(expected, field.name), err_msg=field.name)
    assert list(table.names) == list(expected.names)
    assert [failure[:2] + failure[5:6] for failure in table.failures] == sorted(
        failure[:2] + failure[5:6] for failure in expected.failures
    )
    assert "LookupError" in next(failure.traceback for failure in table.failures if failure.traceback)
    assert fp.AuditLog(events).replay() == result.standing()


def test_a_run_that_is_interrupted_is_told_so(ran, store, tmp_path):
    (tmp_path / "state").write_text("interrupt")
    with pytest.raises(KeyboardInterrupt):
        interrupted_saga(ran, tmp_path / "state").run(backend="inline", store=store)
    with fp.Store.open(store) as opened:
        run = opened.run()
        assert run.facts.status == "interrupted"
        assert run.table().status_counts() == {"completed": 2, "cancelled": 1}


class Interrupting:
    """A connection to a store during whose first statement of some kind there is an interrupt."""

    def __init__(self, connection, statement):
        self.connection = connection
        self.statement = statement

    def __getattr__(self, name):
        method = getattr(self.connection, name)

        def call(*arguments):
            found = method(*arguments)
            if self.statement and self.statement in (name, str(arguments and arguments[0])[: len(self.statement)]):
                self.statement = ""
                raise KeyboardInterrupt  # as at the end of a call that was going on at a signal
            return found

        return call


STATEMENTS = ["INSERT INTO runs", "PRAGMA synchronous = FULL", "BEGIN IMMEDIATE", "UPDATE runs SET status", "COMMIT"]


@pytest.mark.parametrize("statement", [*STATEMENTS, "PRAGMA busy_timeout", "close"])
def test_an_interrupt_while_the_store_works_leaves_no_lock_and_no_run_that_goes(ran, store, monkeypatch, statement):
    opened = []
    monkeypatch.setattr(
        "forgepar.store.writer.open_to_write",
        lambda path: opened.append(Interrupting(open_to_write(path), "" if opened else statement)) or opened[-1],
    )
    with pytest.raises(KeyboardInterrupt):
        tree(ran).run(backend="inline", store=store, resume=True)
    assert not opened[0].statement
    assert list(Path(f"{store}.files").glob("*.lock")) == []
    with fp.Store.open(store) as asked:
        assert {facts.status for facts in asked.runs()} <= {"interrupted", "completed"}
    assert tree(ran).run(backend="inline", store=store, resume=True).ok


def test_an_interrupt_while_the_last_values_are_written_leaves_no_lock(ran, store, monkeypatch):
    close, calls = FileWriter.close, []

    def interrupted(writer):
        calls.append(writer)
        if len(calls) == 1:
            raise KeyboardInterrupt
        close(writer)

    monkeypatch.setattr(FileWriter, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tree(ran).run(backend="inline", store=store, resume=True)
    with fp.Store.open(store) as opened:
        assert opened.run().facts.status == "interrupted"
    ran.take()
    tree(ran).run(backend="inline", store=store, resume=True)  # it waits for nobody, and is not refused
    assert ran.take() == {}


def test_a_store_is_read_while_a_run_writes_to_it(store, tmp_path):
    gate = tmp_path / "gate"

    def wait(_):
        wait_until(gate.exists, "the gate")

    wf = fp.Workflow("live")
    wf.add(wait, wf.map(abs, range(50)))
    seen: list[fp.RunTable] = []

    def look():
        def has_rows():
            try:
                with fp.Store.open(store) as opened:
                    seen.append(opened.run().table())
            except fp.StoreError:  # it, or the run, is not there yet
                return False
            return seen[-1].status_counts().get("completed") == 50

        wait_until(has_rows, "rows of a live run")
        gate.touch()

    watcher = threading.Thread(target=look)
    watcher.start()
    wf.run(workers=2, store=store)
    watcher.join()
    assert seen[-1].status == "running"
    assert seen[-1].status_counts() == {"completed": 50, "pending": 1}
    with fp.Store.open(store) as opened:
        assert opened.run().facts.status == "completed"


def test_what_is_done_is_written_and_synced_while_a_long_task_runs(store, tmp_path, monkeypatch):
    """Within a second or so, not when the run ends: else a power cut would take it."""
    gate, synced = tmp_path / "gate", []
    from forgepar.store.writer import StoreWriter

    commit = StoreWriter._commit

    def watched(self, *, is_synced, end=None):
        done = commit(self, is_synced=is_synced, end=end)
        if is_synced and end is None:
            synced.append(self._connection.execute("SELECT count(*) FROM tasks").fetchone()[0])
            if synced[-1] == 3:
                gate.touch()
        return done

    monkeypatch.setattr(StoreWriter, "_commit", watched)
    wf = fp.Workflow("long")
    wf.map(abs, range(3))
    wf.add(lambda: wait_until(gate.exists, "the sync"))
    wf.run(workers=2, store=store)
    assert 3 in synced


# Two at once


def test_two_runs_at_once_on_one_store(ran, store):
    results = []

    def run(offset):
        results.append((offset, tree(ran, 3, offset).run(backend="inline", store=store)["join"]))

    threads = [threading.Thread(target=run, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [(offset, 10.0 * (3 + 3 * offset)) for offset in range(4)]
    with fp.Store.open(store) as opened:
        assert [facts.status for facts in opened.runs()] == ["completed"] * 4


@pytest.mark.parametrize("wait", [False, True])
def test_a_second_run_of_a_resumed_workflow_waits_or_is_refused(ran, store, tmp_path, wait):
    begun, gate = tmp_path / "begun", tmp_path / "gate"

    def hold():
        ran("hold")
        begun.touch()
        wait_until(gate.exists, "the gate")
        return 1

    wf = fp.Workflow("held")
    wf.add(fp.task(hold).options(version=1))
    first = threading.Thread(target=lambda: wf.run(backend="inline", store=store, resume=True))
    first.start()
    wait_until(begun.exists, "the first run")
    try:
        if not wait:
            with pytest.raises(fp.StoreBusy, match=rf"'held' is being run with this store by process {os.getpid()}"):
                wf.run(backend="inline", store=store, resume=True)
    finally:
        if not wait:
            gate.touch()
            first.join()
    if wait:
        results = []
        second = threading.Thread(
            target=lambda: results.append(wf.run(backend="inline", store=store, resume=fp.Resume(wait=True)))
        )
        second.start()
        gate.touch()
        first.join()
        second.join()
        assert results[0].status_counts() == {"cached": 1}
    assert ran.take() == {"hold": 1}


def test_another_workflow_is_not_held_up(ran, store):
    outer = fp.Workflow("outer")
    inner = outer.add(lambda: tree(ran).run(backend="inline", store=store, resume=True)["join"])
    assert outer.run(backend="inline", store=store, resume=True)[inner] == 60.0


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
def test_many_kept_runs_leave_no_descriptors(ran, store):
    wf = tree(ran)
    wf.run(backend="inline", store=store)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        wf.run(backend="inline", store=store, resume=True)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
