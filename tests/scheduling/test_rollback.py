"""What was done is undone when a run fails or is called off: the last layer first, as far as it can be."""

from __future__ import annotations

import functools
import os
import signal
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from conftest import wait_until
from hypothesis import given
from hypothesis import strategies as st

import forgepar as fp
from forgepar.records.events import WorkflowRolledBack, WorkflowTaskRolledBack
from forgepar.scheduling.rollback import Rollback
from forgepar.scheduling.run_state import SecondOutcome, Status
from forgepar.values.codec import BLOB_LIMIT
from forgepar.workflow import adapters
from forgepar.workflow.plan import as_index


def fail(*_):
    raise ValueError("no")


def failure_of(wf, **rules) -> fp.WorkflowFailed:
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(**rules)
    return caught.value


# The pure machine


def plan_of(parents: list[list[int]], with_undo: list[bool]):
    wf = fp.Workflow()
    handles = []
    for before, has_undo in zip(parents, with_undo, strict=True):
        task = fp.task(lambda *_: None).options(compensate=print if has_undo else None)
        handles.append(wf.add(task, *[handles[i] for i in before]))
    return wf.plan()


@st.composite
def cases(draw):
    n = draw(st.integers(1, 25))
    parents = [draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else [] for i in range(n)]
    return (
        parents,
        draw(st.lists(st.booleans(), min_size=n, max_size=n)),
        draw(st.lists(st.sampled_from([Status.COMPLETED, Status.FAILED, Status.CANCELLED]), min_size=n, max_size=n)),
    )


@given(cases(), st.data())
def test_tasks_are_undone_once_after_all_that_built_on_them(case, data):
    parents, with_undo, status = case
    plan = plan_of(parents, with_undo)
    rollback = Rollback(plan, np.array(status, np.int8), "all", [])
    undone: list[int] = []
    while not rollback.finished:
        template, _ = rollback.head()
        tasks = rollback.take(data.draw(st.integers(1, 4)))
        if data.draw(st.booleans()):
            rollback.put_back(template, tasks)
            tasks = rollback.take(1)
        numbers = np.arange(plan.n_tasks)[as_index(tasks)].tolist()
        layers = plan.layers
        assert all(layers[task] <= layers[other] for task in numbers for other in undone)
        undone += numbers
        if data.draw(st.booleans()):
            rollback.completed(tasks)
        else:
            for task in numbers:
                rollback.failed(task, OSError())
    expected = [i for i, has in enumerate(with_undo) if has and status[i] == Status.COMPLETED]
    assert sorted(undone) == expected
    report = rollback.report()
    assert len(report.compensated) + len(report.failed) == len(expected)
    assert report.n_without == len(report.skipped) == status.count(Status.COMPLETED) - len(expected)


def numbers(tasks):
    return [int(task) for task in tasks]


def rollback_of(parents, *, without=(), strategy="all", failed=(), retries=0):
    """The rollback of tasks of which all have completed but those that failed."""
    wf, handles = fp.Workflow(), []
    for number, before in enumerate(parents):
        undo = fp.task(print).options(retries=retries, backoff=fp.Backoff(4.0, jitter=0.0))
        task = fp.task(lambda *_: None).options(compensate=None if number in without else undo, name=f"t{number}")
        handles.append(wf.add(task, *[handles[i] for i in before]))
    status = np.full(len(parents), Status.COMPLETED, np.int8)
    status[list(failed)] = Status.FAILED
    return Rollback(wf.plan(), status, strategy, failed)


def take_all(rollback):
    taken = []
    while rollback.head() is not None:
        taken += numbers(rollback.take(9))
    return taken


def test_tasks_that_were_not_begun_are_handed_out_again_and_a_layer_waits_for_them():
    rollback = rollback_of([[], [], [], [0, 1, 2]])
    assert numbers(rollback.take(9)) == [3]
    assert rollback.head() is None
    rollback.completed(range(3, 4))
    assert rollback.head()[1] == 3
    taken = take_all(rollback)
    rollback.put_back(rollback._template[taken[0]], range(taken[0], taken[0] + 1))
    assert rollback.head()[1] == 1
    for task in taken[1:]:
        rollback.completed(range(task, task + 1))
    assert not rollback.finished
    assert numbers(rollback.take(9)) == taken[:1]
    rollback.failed(taken[0], LookupError("no"))
    assert rollback.finished
    assert rollback.compensated == [3, *taken[1:]]


def test_an_attempt_is_repeated_after_its_wait_as_often_as_is_said_and_no_longer_than_the_rollback_goes():
    rollback = rollback_of([[], [0]], retries=2)
    fault = LookupError("no")
    rollback.take(1)
    assert rollback.tries_again(1, fault) == 4.0
    assert rollback.head() is None
    assert not rollback.finished
    with pytest.raises(SecondOutcome, match="'t1'"):
        rollback.completed(range(1, 2))
    rollback.retry(1)
    rollback.retry(1)  # it waits no longer
    assert rollback.head()[1] == 1
    rollback.take(1)
    assert rollback.tries_again(1, fault) is not None
    rollback.retry(1)
    rollback.take(1)
    assert rollback.attempts == {1: 3}
    assert rollback.tries_again(1, fault) is None
    rollback.failed(1, fault)
    assert numbers(rollback.take(1)) == [0]
    rollback.give_up(TimeoutError("over"))
    assert rollback.tries_again(0, fault) is None


def test_when_the_time_is_over_all_that_is_not_undone_has_failed_and_what_is_out_may_end():
    rollback = rollback_of([[], [0], [1], [1], [1], [1]], retries=1, without=[0])
    over = TimeoutError("over")
    waiting, undone, back, out = (numbers(rollback.take(1))[0] for _ in range(4))
    rollback.tries_again(waiting, LookupError("no"))
    rollback.completed(range(undone, undone + 1))
    rollback.give_up(over)
    assert rollback.halted
    assert rollback.head() is None
    assert not rollback.finished
    assert rollback.errors == {1: over, waiting: over}
    rollback.put_back(rollback._template[back], range(back, back + 1))
    rollback.retry(waiting)
    assert rollback.head() is None
    assert not rollback.finished
    rollback.completed(range(out, out + 1))
    assert rollback.finished
    report = rollback.report()
    assert report.compensated == (f"t{undone}", f"t{out}")
    assert report.failed == {"t1": over, f"t{waiting}": over, f"t{back}": over}
    assert (report.skipped, report.n_without, report.ok) == (("t0",), 1, False)
    assert str(report).splitlines()[0] == "2 compensated, 3 failed, 1 without compensation"


def test_a_function_chooses_by_name_and_what_it_raises_for_counts_as_not_undone():
    def choose(name):
        return {"t0": 1, "t1": "", "t2": None}[name]

    rollback = rollback_of([[], [], [], [], []], strategy=choose, failed=[4])
    assert take_all(rollback) == [0]
    assert list(rollback.errors) == [3]  # the task that failed is not asked for
    rollback.completed(range(1))
    assert rollback.finished


def test_upstream_is_what_a_failed_task_depended_on():
    plan = plan_of([[], [], [0], [2], [1]], [True] * 5)
    status = np.array([Status.COMPLETED] * 3 + [Status.FAILED, Status.COMPLETED], np.int8)
    rollback = Rollback(plan, status, "upstream", [3])
    taken = []
    while not rollback.finished:
        tasks = rollback.take(10)
        taken += list(tasks)
        rollback.completed(tasks)
    assert sorted(taken) == [0, 2]


# Runs


def note(path: Path, word: str) -> str:
    with path.open("a") as file:
        file.write(word + "\n")
    return word


def noted(wf, log, word, *after, layer_word="undo"):
    """A task that notes a word, and when undone notes that."""
    undo = lambda value: note(log, f"{layer_word} {value}")  # noqa: E731
    return wf.add(fp.task(note).options(compensate=undo, name=word, after=after), log, word)


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_the_last_layer_is_undone_first(either_backend, tmp_path, schedule):
    log = tmp_path / "log"
    wf = fp.Workflow()
    a, b = noted(wf, log, "a"), noted(wf, log, "b")
    c = noted(wf, log, "c", a, b)
    wf.add(fail, c)
    failure = failure_of(wf, **either_backend, schedule=schedule, outputs="all")
    words = log.read_text().splitlines()
    assert sorted(words[:2]) == ["a", "b"]
    assert words[2:4] == ["c", "undo c"]
    assert sorted(words[4:]) == ["undo a", "undo b"]
    result = failure.result
    assert result.rollback.compensated[0] == "c"
    assert sorted(result.rollback.compensated) == ["a", "b", "c"]
    assert result.rollback.ok
    assert result.status_counts() == {"failed": 1, "compensated": 3}
    assert "rolled back 3 tasks" in str(failure)
    assert result["c"] == "c"  # what was undone can still be seen
    told = [event for event in result.events if isinstance(event, WorkflowTaskRolledBack)]
    assert [event.task for event in told] == list(result.rollback.compensated)
    (end,) = [event for event in result.events if isinstance(event, WorkflowRolledBack)]
    assert (end.compensated, end.failed, end.without_compensation) == (3, 0, 0)


@pytest.mark.parametrize(
    ("strategy", "undone"),
    [("all", ["a", "b", "c"]), ("upstream", ["a", "c"]), ("none", []), (lambda name: name in "ab", ["a", "b"])],
)
def test_strategies_choose_what_is_undone(tmp_path, strategy, undone):
    log = tmp_path / "log"
    wf = fp.Workflow()
    a, b = noted(wf, log, "a"), noted(wf, log, "b")
    c = noted(wf, log, "c", a)
    gate = wf.add(fp.task(abs).options(after=[b, c]), 1)
    wf.add(fp.task(fail).options(after=c if strategy == "upstream" else gate))
    report = failure_of(wf, workers=1, rollback=strategy, fail_fast=False).result.rollback
    assert sorted(report.compensated) == undone


def test_a_strategy_that_is_not_known_is_refused():
    wf = fp.Workflow()
    wf.add(abs, 1)
    with pytest.raises(
        ValueError, match="rollback must be one of 'all', 'upstream', 'none', or a function, got 'some'"
    ):
        wf.run(backend="inline", rollback="some")


def test_a_strategy_that_raises_leaves_that_task_and_tells(tmp_path):
    def choose(name):
        return {"a": True}[name]

    wf = fp.Workflow()
    a, b = noted(wf, tmp_path / "log", "a"), noted(wf, tmp_path / "log", "b")
    wf.add(fail, [a, b])
    report = failure_of(wf, workers=1, rollback=choose).result.rollback
    assert report.compensated == ("a",)
    assert isinstance(report.failed["b"], KeyError)


def test_one_that_cannot_be_undone_is_told_and_the_others_are_undone(either_backend):
    wf = fp.Workflow()
    first = wf.map(fp.task(abs).options(name="fine", compensate=lambda value: None), range(3))
    bad = wf.add(fp.task(len).options(name="bad", compensate=fail), first)
    wf.add(fail, bad)
    failure = failure_of(wf, **either_backend)
    report = failure.result.rollback
    assert sorted(report.compensated) == [f"fine-{i}" for i in range(3)]
    assert list(report.failed) == ["bad"]
    assert str(report.failed["bad"]) == "no"
    assert not report.ok
    assert "but not 'bad'" in str(failure)
    assert "rolled back: 3 compensated, 1 failed" in failure.result.summary()
    assert failure.result.record("bad").status == "completed"


def test_a_worker_that_dies_of_undoing_is_told_too():
    wf = fp.Workflow()
    deadly = fp.task(abs).options(name="deadly", compensate=lambda _: os.kill(os.getpid(), signal.SIGKILL))
    first = wf.add(fp.task(abs).options(name="fine", compensate=lambda value: None), 1)
    wf.add(fail, wf.add(deadly, first))
    report = failure_of(wf, workers=1).result.rollback
    assert report.compensated == ("fine",)
    assert isinstance(report.failed["deadly"], fp.WorkerDied)


def test_undoing_that_hangs_is_ended_by_the_tasks_timeout():
    wf = fp.Workflow()
    slow = fp.task(abs).options(name="slow", timeout=0.5, compensate=lambda _: threading.Event().wait())
    wf.add(fail, wf.add(slow, 1))
    report = failure_of(wf, workers=1).result.rollback
    assert isinstance(report.failed["slow"], fp.TaskTimeout)


def test_what_undoes_gets_the_value_however_large_and_the_context_if_it_asks(either_backend, tmp_path):
    def make(n):
        return np.arange(n)

    def undo(array, context):
        (tmp_path / "undone").write_text(f"{array.sum()} {context.task} {context.layer} {context.cancelled()}")

    wf = fp.Workflow()
    made = wf.add(fp.task(make).options(name="made", compensate=undo), BLOB_LIMIT)
    taken = wf.add(lambda array: float(array.sum()), made)  # its last consumer: else it would be released
    wf.add(fail, taken)
    failure_of(wf, **either_backend)
    assert (tmp_path / "undone").read_text() == f"{sum(range(BLOB_LIMIT))} made 0 False"


def test_a_run_that_is_called_off_is_rolled_back(tmp_path):
    token = fp.CancellationToken()
    log = tmp_path / "log"

    def wait(started):
        started.touch()
        wait_until(fp.context().cancelled, "the token")

    wf = fp.Workflow()
    first = noted(wf, log, "first")
    second = wf.add(fp.task(wait).options(after=first), tmp_path / "started")
    wf.add(fp.task(abs).options(after=second), 1)
    canceller = threading.Thread(
        target=lambda: (wait_until((tmp_path / "started").exists, "the start"), token.cancel())
    )
    canceller.start()
    result = wf.run(workers=1, cancel=token)
    canceller.join()
    assert result.status == "cancelled"
    assert result.rollback.compensated == ("first",)
    assert log.read_text().split() == ["first", "undo", "first"]


def test_a_run_that_is_well_undoes_nothing(either_backend, tmp_path):
    wf = fp.Workflow()
    noted(wf, tmp_path / "log", "a")
    result = wf.run(**either_backend)
    assert result.rollback == fp.RollbackReport()
    assert (tmp_path / "log").read_text() == "a\n"


def test_what_undoes_must_be_a_function_that_travels():
    with pytest.raises(fp.WorkflowError, match="compensate must be callable, got 3"):
        fp.task(abs).options(compensate=3)
    lock = threading.Lock()
    wf = fp.Workflow()
    wf.add(fp.task(abs).options(name="locked", compensate=lambda _: lock), 1)
    with pytest.raises(fp.UnpicklableCallable, match="task 'locked'"):
        wf.run(workers=1)


# What undoes: its arguments, its options, its time


def undo_plainly(value, folder="own"):
    return folder


def undo_named(value, folder="own", context=None):
    return (folder, context.task)


def undo_annotated(value, told: fp.TaskContext, folder="own"):
    return (folder, told.task)


def undo_by_position(value, context, /):
    return context.task


def undo_by_keyword(value, *, context):
    return context.task


def undo_any(*values):
    return len(values)


def given_a_database(undo):
    """Decorate a function: what it takes is not what the function takes that it wraps."""

    @functools.wraps(undo)
    def wrapper(value):
        return undo("database", value)

    return wrapper


@given_a_database
def undo_wrapped(database, value, context=None):
    return database, value, context


def passed_on(undo):
    @functools.wraps(undo)
    def wrapper(*args, **kwargs):
        return undo(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    ("undo", "given"),
    [
        (undo_plainly, "own"),
        (undo_named, ("own", "made")),
        (undo_annotated, ("own", "made")),
        (undo_by_position, "made"),
        (undo_by_keyword, "made"),
        (undo_any, 1),
        (undo_wrapped, ("database", 1, None)),
        (fp.task(undo_wrapped), ("database", 1, None)),
        (passed_on(undo_named), ("own", "made")),
        (functools.partial(undo_named, folder="other"), ("other", "made")),
    ],
)
def test_the_context_goes_to_a_parameter_of_that_name_or_annotation_alone(undo, given):
    fp.task(abs).options(compensate=undo)
    undo = getattr(undo, "fn", undo)

    def undo_it(value):
        raise ValueError(repr(adapters.as_compensation(undo)(value)))

    wf = fp.Workflow()
    wf.add(fail, wf.add(fp.task(abs).options(name="made", compensate=undo_it), 1))
    report = failure_of(wf, backend="inline").result.rollback
    assert str(report.failed["made"]) == repr(given)


@pytest.mark.parametrize(
    "undo", [lambda: None, [].clear, fp.shell("rmdir d1"), fp.shell("mv {a} {b}"), lambda a, b: None, lambda *, a: None]
)
def test_what_cannot_take_the_value_alone_is_refused(undo):
    with pytest.raises(fp.WorkflowError, match=r"compensate must be callable with the task's value alone"):
        fp.task(abs).options(compensate=undo)


@pytest.mark.parametrize(
    "undo", [print, Path.unlink, os.unlink, fp.shell("rm {path}"), [].append, {}.pop, str.upper, int]
)
def test_what_can_take_it_is_not(undo):
    fp.task(abs).options(compensate=undo)


def undo_at(attempts, log, value):
    """Fail so often."""
    with open(log, "a") as file:  # noqa: PTH123
        file.write(f"{value}\n")
    if Path(log).read_text().count(f"{value}\n") <= attempts:
        raise ValueError(value)


@pytest.mark.parametrize("n_failures", [2, 3])
def test_what_undoes_may_be_tried_again(either_backend, tmp_path, n_failures):
    undo = fp.task(functools.partial(undo_at, n_failures, str(tmp_path / "log"))).options(retries=2, backoff=0.001)
    wf = fp.Workflow()
    made = wf.map(fp.task(abs).options(name="made", compensate=undo), [1, 2])
    wf.add(fail, made)
    report = failure_of(wf, **either_backend).result.rollback
    assert sorted((tmp_path / "log").read_text().split()) == ["1"] * 3 + ["2"] * 3
    assert sorted(report.compensated if n_failures == 2 else report.failed) == ["made-0", "made-1"]


def test_what_undoes_has_a_timeout_of_its_own():
    slow = fp.task(lambda _: threading.Event().wait()).options(timeout=0.2)
    wf = fp.Workflow()
    wf.add(fail, wf.add(fp.task(abs).options(name="slow", compensate=slow), 1))
    error = failure_of(wf, workers=1, start_method="fork").result.rollback.failed["slow"]
    assert isinstance(error, fp.TaskTimeout)
    assert error.seconds == 0.2


@pytest.mark.parametrize(
    "options", [{"name": "a"}, {"effects": True}, {"memory": 1}, {"compensate": abs}, {"fallback": 1}]
)
def test_it_has_no_other_options(options):
    with pytest.raises(fp.WorkflowError, match=f"with the option {next(iter(options))}="):
        fp.task(abs).options(compensate=fp.task(abs).options(**options))


@pytest.mark.parametrize("limits", [{"rollback_timeout": 0.2}, {"timeout": 60.0, "rollback_timeout": 0.2}])
def test_undoing_ends_with_its_time_and_says_what_was_not_undone(limits, tmp_path):
    def undo(value):
        if value == "hangs":
            threading.Event().wait()
        (tmp_path / f"undone-{value}").touch()

    wf = fp.Workflow()
    last = None
    for name in ("first", "hangs", "last"):
        last = wf.add(fp.task(lambda name, _: name).options(name=name, compensate=undo), name, last)
    wf.add(fail, last)
    with fp.WorkflowExecutor(workers=1, start_method="fork") as executor:
        with pytest.raises(fp.WorkflowFailed) as caught:
            executor.run(wf, **limits)
        failure = caught.value
        report = failure.result.rollback
        assert report.compensated == ("last",)
        assert sorted(report.failed) == ["first", "hangs"]
        assert all(isinstance(error, fp.RunTimeout) for error in report.failed.values())
        assert "within the 0.2 s that the rollback was given" in str(report.failed["first"])
        assert "rolled back 1 tasks, but not" in str(failure)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["undone-last"]
        again = fp.Workflow()
        again.add(abs, 1)
        assert executor.run(again).ok


def test_a_rollback_takes_as_long_again_as_the_run_was_given():
    wf = fp.Workflow()
    wf.add(fail, wf.add(fp.task(abs).options(name="slow", compensate=lambda _: threading.Event().wait()), 1))
    error = failure_of(wf, workers=1, start_method="fork", timeout=1.0).result.rollback.failed["slow"]
    assert (type(error), error.seconds) == (fp.RunTimeout, 1.0)


# A saga over real files and a real database


def write_file(folder: Path, name: str, *_) -> Path:
    path = folder / name
    path.write_text(name)
    return path


def insert_row(database: Path, name: str, *_) -> tuple[Path, str]:
    with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        connection.execute("insert into rows values (?)", (name,))
    return database, name


def delete_row(inserted: tuple[Path, str]) -> None:
    database, name = inserted
    if name == "row-2-1":
        raise PermissionError("the ledger of row-2-1 is closed")
    with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        connection.execute("delete from rows where name = ?", (name,))


def state_of(folder: Path, database: Path) -> tuple[set[str], set[str]]:
    with closing(sqlite3.connect(database)) as connection:
        rows = {name for (name,) in connection.execute("select name from rows")}
    return {path.name for path in folder.iterdir()}, rows


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_rollback_of_a_saga_leaves_files_and_rows_as_they_were_but_for_what_it_names(tmp_path, schedule):
    """40 tasks in 6 layers write files and insert rows in turn; the last one fails, and so does undoing one row."""
    folder, database = tmp_path / "files", tmp_path / "rows.db"
    folder.mkdir()
    (folder / "before").write_text("there before")
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("create table rows (name text)")
        connection.execute("insert into rows values ('before')")
    before = state_of(folder, database)
    wf = fp.Workflow("saga")
    layer: list[fp.TaskHandle] = []
    everything: list[fp.TaskHandle] = []
    for depth in range(5):
        step = []
        for i in range(8 if depth < 4 else 7):
            if i % 2:
                row = fp.task(insert_row).options(name=f"row-{depth}-{i}", compensate=delete_row, effects=True)
                step.append(wf.add(row, database, f"row-{depth}-{i}", *layer[i - 1 : i + 1]))
            else:
                file = fp.task(write_file).options(name=f"file-{depth}-{i}", compensate=Path.unlink, effects=True)
                step.append(wf.add(file, folder, f"file-{depth}-{i}", *layer[i - 1 : i + 1]))
        layer = step
        everything += step
    # Behind all of them: without layers it could fail before some, that nothing waits for, have run.
    wf.add(fp.task(fail).options(name="publish", after=everything), layer)
    assert len(wf) == 40
    assert len(wf.execution_layers()) == 6
    result = failure_of(wf, workers=3, schedule=schedule).result
    files, rows = state_of(folder, database)
    assert files == before[0]
    assert rows == before[1] | {"row-2-1"}
    assert list(result.rollback.failed) == ["row-2-1"]
    assert len(result.rollback.compensated) == 38
    assert result.rollback.skipped == ()
