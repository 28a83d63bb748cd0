"""The contract that every backend keeps, whatever runs the tasks; each backend inherits the whole suite."""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import executor_arguments

import forgepar as fp


def identity(value):
    return value


def add(*values):
    return sum(values)


def describe(*args, **kwargs):
    return args, kwargs


def fail(message="no"):
    raise ValueError(message)


def append_to(values, value):
    values.append(value)
    return values


class Refuses(Exception):
    """Pickles, but its constructor wants more than it passes on."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def hold_until(path):
    while not path.exists():
        threading.Event().wait(0.005)


class Point(NamedTuple):
    x: object
    y: object


@dataclass(frozen=True)
class Box:
    content: object
    label: str = "box"


@dataclass
class Weight:
    """Callable, as models are."""

    factor: int

    def __call__(self, value):
        return self.factor * value

    def times(self, value):
        return self.factor * value


@fp.task(retries=2)
def decorated(value):
    return value + 1


@fp.task(retries=2)
def fails_twice(path):
    with path.open("a") as file:
        file.write("x")
    if path.stat().st_size < 3:
        raise RuntimeError("not yet")
    return path.stat().st_size


@pytest.fixture(scope="class")
def executor(request):
    with fp.WorkflowExecutor(**executor_arguments(request.cls.kind)) as executor:
        warm = fp.Workflow()
        warm.map(identity, [1, 2])  # a task for each worker: no more are started than a run can use
        executor.run(warm)
        yield executor


class Contract:
    """Inherited by every backend; `kind` is what `executor_arguments` takes."""

    kind: str
    begins: Sequence[str] = ("WorkflowStarted", "WorkflowDeadlockCheck")  # events before the first layer's

    @pytest.fixture
    def wf(self):
        return fp.Workflow("contract")

    def test_diamond(self, executor, wf):
        top = wf.add(identity, 1)
        left, right = wf.add(add, top, 10), wf.add(add, top, 100)
        bottom = wf.add(add, left, right)
        result = executor.run(wf)
        assert result[bottom] == 112
        assert result.ok
        assert [record.layer for record in result.records] == [0, 1, 1, 2]

    def test_handles_anywhere_in_arguments(self, executor, wf):
        one, two = wf.add(identity, 1), wf.add(identity, [2])
        many = wf.map(identity, range(3))
        end = wf.add(
            describe,
            [one, (two, "x")],
            {"k": one, "l": [two]},
            Point(one, two),
            many,
            box=Box({"in": one}),
            many=[many],
        )
        args, kwargs = executor.run(wf)[end]
        assert args == ([1, ([2], "x")], {"k": 1, "l": [[2]]}, Point(1, [2]), [0, 1, 2])
        assert kwargs == {"box": Box({"in": 1}), "many": [[0, 1, 2]]}

    def test_map_over_rows_handles_and_constants(self, executor, wf):
        numbers = wf.map(identity, range(5))
        rows = wf.map(describe, numbers, list("abcde"), extra={"shared": [1, 2]})
        mixed = wf.map(describe, [numbers[0], 7, [numbers[1], 8]])
        result = executor.run(wf)
        assert result[rows][3] == ((3, "d"), {"extra": {"shared": [1, 2]}})
        assert [args for args, _ in result[mixed]] == [(0,), (7,), ([1, 8],)]

    def test_map_over_nothing_gives_an_empty_list(self, executor, wf):
        total = wf.add(lambda values: sum(values), wf.map(identity, []))
        assert executor.run(wf)[total] == 0

    @pytest.mark.parametrize(
        "value",
        [
            None,
            True,
            10**40,
            1.5,
            "text",
            "long " * 5000,
            b"bytes" * 9000,
            [1, [2, {"three": {4}}]],
            (1, "two"),
            (b"looks like a blob",),
            {"a": np.arange(3).tolist()},
            Point(1, (2,)),
            Box([1, 2]),
            ...,
            range(4),
            frozenset({1}),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_values_pass_through_as_they_are(self, executor, wf, value):
        first = wf.add(identity, value)
        end = wf.add(identity, first)
        same = executor.run(wf, outputs="all")
        assert same[first] == same[end] == value
        assert type(same[end]) is type(value)

    @pytest.mark.parametrize("n", [0, 10, 100_000], ids=["empty", "small", "large"])
    def test_arrays_pass_through(self, executor, wf, n):
        first = wf.map(np.arange, [n, n + 1])
        ends = wf.map(identity, first)
        for array, length in zip(executor.run(wf)[ends], (n, n + 1), strict=True):
            np.testing.assert_array_equal(array, np.arange(length))

    def test_a_task_cannot_change_anothers_input(self, executor, wf):
        first = wf.add(list, [1])
        changed = wf.map(append_to, [first] * 6, range(6))
        assert executor.run(wf)[changed] == [[1, i] for i in range(6)]

    def test_lambdas_closures_partials_methods_and_instances(self, executor, wf):
        factor, weight = 3, Weight(5)
        handles = [
            wf.add(lambda x: x * factor, 2),
            wf.add(functools.partial(add, 1, 2), 4),
            wf.add(weight, 2),
            wf.add(weight.times, 3),
            wf.add(decorated, 1),
            wf.add(fp.task(lambda: "named").options(name="chosen")),
            wf.add(len, "four"),
        ]
        assert executor.run(wf)[handles] == [6, 7, 10, 15, 2, "named", 4]

    def test_after_orders_without_passing_a_value(self, executor, wf, tmp_path):
        path = tmp_path / "made"
        made = wf.map(lambda p: p.write_text("x"), [path])
        seen = wf.add(fp.task(lambda p: p.exists()).options(after=made), path)
        assert executor.run(wf)[seen] is True
        assert wf.execution_layers() == [["lambda-0"], ["lambda-1"]]

    def test_every_task_runs_once(self, executor, wf, tmp_path):
        log = tmp_path / "log"

        def note(i):
            with log.open("a") as file:
                file.write(f"{i}\n")
            return i

        level = wf.map(note, range(200))
        wf.map(lambda i, x: note(1000 + i), range(200), level)
        executor.run(wf)
        assert Counter(log.read_text().split()) == Counter(map(str, [*range(200), *range(1000, 1200)]))

    def test_many_small_tasks_and_many_layers(self, executor, wf):
        level = wf.map(identity, range(500))
        for _ in range(20):
            level = wf.map(add, level, [1] * 500)
        assert executor.run(wf)[level] == [i + 20 for i in range(500)]

    def test_batches_and_replies_longer_than_a_message(self, executor, wf):
        texts = [f"{i}:" + "x" * 900 for i in range(300)]
        for _ in range(3):  # the later rounds know how quick the tasks are, and go out in large batches
            level = wf.map(identity, texts)
            wf.add(lambda values: len(values), wf.map(str.upper, level))
        result = executor.run(wf, outputs=[level])
        assert result[level] == texts

    def test_eager_schedule_gives_the_same_values(self, executor, wf):
        level = wf.map(identity, range(40))
        for _ in range(5):
            level = wf.map(add, level, level)
        total = wf.add(add, level[3], level[39])
        assert executor.run(wf, schedule="eager")[total] == (3 + 39) * 32

    # Failures

    def test_a_failure_carries_the_tasks_own_exception(self, executor, wf):
        wf.add(fail, "why")
        with pytest.raises(fp.WorkflowFailed, match="'fail' \\(ValueError: why\\)") as caught:
            executor.run(wf)
        (error,) = caught.value.exceptions
        assert type(error) is ValueError
        notes = "\n".join(error.__notes__)
        assert "task 'fail', layer 0, attempt 1, worker" in notes
        assert "in fail\n    raise ValueError(message)" in notes
        assert str(Path("backends", "worker.py")) not in notes

    def test_fail_fast_starts_nothing_after_the_failure(self, executor, wf, tmp_path):
        done = wf.add(identity, 5)
        failed = wf.add(fp.task(fail).options(after=done))
        wf.add(lambda x: (tmp_path / "started").touch(), failed)
        with pytest.raises(fp.WorkflowFailed) as caught:
            executor.run(wf)
        result = caught.value.result
        assert result.status_counts() == {"completed": 1, "failed": 1, "cancelled": 1}
        assert result[done] == 5
        assert not (tmp_path / "started").exists()
        with pytest.raises(fp.MissingResult, match="'fail' has no value: it failed with ValueError: no"):
            result[failed]

    def test_without_fail_fast_only_what_follows_is_left_out(self, executor, wf):
        values = wf.map(lambda i: 1 // i, [0, 1, 2, 0])
        after = wf.map(identity, values)
        other = wf.add(add, after[1], after[2])
        with pytest.raises(fp.WorkflowFailed) as caught:
            executor.run(wf, fail_fast=False)
        result = caught.value.result
        assert [type(error) for error in caught.value.exceptions] == [ZeroDivisionError] * 2
        assert result.status_counts() == {"completed": 5, "failed": 2, "skipped": 2}
        assert result[other] == 1
        assert [result.record(task).skipped_for for task in after] == [values[0].name, None, None, values[3].name]
        with pytest.raises(fp.MissingResult, match="it was skipped because its dependency 'lambda-0' failed with Zero"):
            result[after[0]]

    def test_retries(self, executor, wf, tmp_path):
        handle = wf.add(fails_twice, tmp_path / "tries")
        result = executor.run(wf)
        assert result[handle] == 3
        assert result.record(handle).attempt == 3
        assert result.errors == {}

    def test_retries_end(self, executor, wf):
        wf.add(fp.task(fail).options(retries=1))
        with pytest.raises(fp.WorkflowFailed) as caught:
            executor.run(wf)
        assert "attempt 2" in "".join(caught.value.exceptions[0].__notes__)
        assert [type(event).__name__ for event in caught.value.result.events].count("WorkflowTaskRetried") == 1

    @pytest.mark.filterwarnings("ignore:The task on worker:RuntimeWarning")
    def test_a_timeout_says_whether_the_task_was_ended(self, executor, wf, tmp_path):
        if executor._backend.name == "inline":
            pytest.skip("nothing ends a task that runs in this process")
        held = wf.add(fp.task(hold_until).options(timeout=0.2), tmp_path / "release")
        try:
            with pytest.raises(fp.WorkflowFailed) as caught:
                executor.run(wf)
        finally:
            (tmp_path / "release").touch()
        error = caught.value.result.errors[held.name]
        assert isinstance(error, fp.TaskTimeout)
        told = (
            "its worker was ended" if executor._backend.traits.ends_tasks else "its thread cannot be ended from outside"
        )
        assert told in str(error)

    def test_a_result_that_cannot_be_pickled(self, executor, wf):
        wf.add(threading.Lock)
        with pytest.raises(fp.WorkflowFailed) as caught:
            executor.run(wf)
        (error,) = caught.value.exceptions
        assert isinstance(error, fp.UnpicklableResult)
        assert "_thread.lock" in str(error)
        assert "Return plain data" in str(error)

    def test_an_exception_that_plain_pickling_cannot_restore(self, executor, wf):
        def refuse():
            raise Refuses("one", "two")

        wf.add(refuse)
        with pytest.raises(fp.WorkflowFailed) as caught:
            executor.run(wf)
        (error,) = caught.value.exceptions
        assert type(error) is Refuses
        assert str(error) == "one and two"
        assert "raise Refuses" in "".join(error.__notes__)

    def test_an_exception_without_a_text(self, executor, wf):
        def raise_it():
            raise Unspeakable

        wf.add(raise_it)
        with pytest.raises(ExceptionGroup) as caught:
            executor.run(wf)
        assert len(caught.value.exceptions) == 1

    @pytest.mark.parametrize(
        ("leave", "code"),
        [(lambda: sys.exit(3), 3), (lambda: sys.exit("bye"), "bye"), (lambda: sys.exit(), None)],
        ids=["number", "text", "nothing"],
    )
    def test_sys_exit_fails_the_task_alone(self, executor, wf, leave, code):
        wf.add(leave)
        with pytest.raises(fp.WorkflowFailed) as caught:
            executor.run(wf)
        (error,) = caught.value.exceptions
        assert isinstance(error, fp.TaskExited)
        assert error.code == code
        assert "Return from it" in str(error)

    def test_the_executor_runs_on_after_failures(self, executor, wf):
        wf.map(fail, ["a", "b", "c"])
        for _ in range(3):
            with pytest.raises(fp.WorkflowFailed):
                executor.run(wf)
        again = fp.Workflow()
        handle = again.add(add, 1, 2)
        assert executor.run(again)[handle] == 3

    # Bad input: found before anything runs

    def test_an_argument_that_cannot_be_pickled(self, executor, wf):
        wf.add(identity, 1)
        wf.add(fp.task(describe).options(name="bad"), 1, lock=threading.Lock())
        with pytest.raises(fp.UnpicklableArgument, match=r"task 'bad'.*kwargs\['lock'\] is a lock") as caught:
            executor.run(wf)
        assert (caught.value.task, caught.value.position) == ("bad", "kwargs['lock']")

    def test_a_callable_that_cannot_be_pickled(self, executor, wf):
        lock = threading.Lock()
        wf.add(lambda: lock)
        with pytest.raises(fp.UnpicklableCallable, match="task 'lambda' has a callable that cannot be pickled"):
            executor.run(wf)

    def test_an_empty_workflow(self, executor, wf):
        with pytest.raises(fp.EmptyWorkflow, match="'contract' has no task"):
            executor.run(wf)

    def test_a_cycle(self, executor, wf):
        a = wf.add(fp.task(identity).options(name="a"), 1)
        b = wf.add(fp.task(identity).options(name="b"), a)
        wf.add_dependency(a, after=b)
        with pytest.raises(fp.CyclicWorkflow, match=r"a -> b -> a|b -> a -> b") as caught:
            executor.run(wf)
        assert sorted(caught.value.cycle) == ["a", "b"]

    # Outputs and records

    def test_outputs_are_leaves_unless_named(self, executor, wf):
        first = wf.add(list, (1, 2))
        last = wf.add(len, first)
        result = executor.run(wf)
        assert result["len"] == 2
        with pytest.raises(fp.ResultReleased, match=r"run\(outputs=\['list'\]\)"):
            result["list"]
        assert executor.run(wf, outputs=[first])[first] == [1, 2]
        assert executor.run(wf, outputs="list")[first] == [1, 2]
        assert executor.run(wf, outputs="all")[[first, last]] == [[1, 2], 2]

    def test_large_values_leave_no_segment_behind(self, executor, wf):
        level = wf.map(np.full, [50_000] * 4, range(4))
        sums = wf.map(np.sum, level)
        copies = wf.map(np.copy, level)
        result = executor.run(wf)
        assert result[sums] == [0, 50_000, 100_000, 150_000]
        assert executor._backend.arena.names() == []
        np.testing.assert_array_equal(result[copies][2], np.full(50_000, 2))

    def test_records_tell_when_where_and_how_long(self, executor, wf):
        handles = wf.map(identity, range(4))
        result = executor.run(wf)
        for handle in handles:
            record = result.record(handle)
            assert record.status == "completed"
            assert 0 <= record.start <= result.wall_seconds
            assert 0 <= record.duration <= result.wall_seconds
            assert 0 <= record.worker < executor.workers
            assert record.attempt == 1

    def test_events_tell_each_layer_and_task(self, executor, wf):
        wf.add(identity, wf.map(identity, range(3)))
        names = [type(event).__name__ for event in executor.run(wf).events]
        begin, end = "WorkflowTaskParallelStarted", "WorkflowTaskParallelCompleted"
        task = ["WorkflowTaskStarted", "WorkflowTaskCompleted"]
        assert names == [*self.begins, begin, *3 * task, end, begin, *task, end, "WorkflowCompleted"]


class TestInline(Contract):
    kind = "inline"


class TestForkserver(Contract):
    kind = "forkserver"


class TestSpawn(Contract):
    kind = "spawn"


class TestFork(Contract):
    kind = "fork"
