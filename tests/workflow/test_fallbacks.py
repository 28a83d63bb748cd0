"""What stands in for a task that failed."""

from __future__ import annotations

import os
import pickle
import threading

import numpy as np
import pytest

import forgepar as fp
from forgepar.records.events import WorkflowTaskFailed, WorkflowToolFallback
from forgepar.workflow.fallbacks import MISSING, NO_STEPS, steps_of


def fail(*_, **__):
    raise ValueError("no")


def failure_of(wf, **rules) -> fp.WorkflowFailed:
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(**rules)
    return caught.value


@pytest.mark.parametrize("schedule", ["layers", "eager"])
@pytest.mark.parametrize("value", [None, 7, "text", [1, {"a": 2}], range(3)])
def test_a_value_stands_for_that_of_a_task_that_failed(either_backend, schedule, value):
    wf = fp.Workflow()
    failed = wf.add(fp.task(fail).options(name="failed", fallback=value))
    after = wf.add(lambda x: [x], failed)
    result = wf.run(**either_backend, schedule=schedule, outputs="all")
    assert result[after] == [value]
    assert result[failed] == value
    assert result.ok
    record = result.record("failed")
    assert (record.status, record.error, record.fallback) == ("completed", None, repr(value))
    (event,) = [event for event in result.events if isinstance(event, WorkflowToolFallback)]
    assert (event.task, event.attempt, event.error) == ("failed", 1, "ValueError: no")


def test_a_large_value_stands_too(either_backend):
    array = np.arange(100_000)
    wf = fp.Workflow()
    failed = wf.map(fp.task(fail).options(fallback=array), range(3))
    total = wf.map(np.sum, failed)
    assert wf.run(**either_backend)[total] == [array.sum()] * 3


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_a_function_gets_the_error_and_if_it_takes_them_the_arguments(either_backend, schedule):
    def error_alone(error):
        return f"{type(error).__name__}: {error}"

    def all_of_it(error, first, second, *, key):
        return str(error), first, second, key, fp.context().task

    wf = fp.Workflow()
    five = wf.add(abs, -5)
    alone = wf.add(fp.task(fail).options(name="alone", fallback=error_alone), five, key=1)
    whole = wf.add(fp.task(fail).options(name="whole", fallback=all_of_it), five, [five, "x"], key=(five,))
    mapped = wf.map(fp.task(fail).options(name="mapped", fallback=lambda error, i, j: i + j), range(40), range(40))
    result = wf.run(**either_backend, schedule=schedule)
    assert result[alone] == "ValueError: no"
    assert result[whole] == ("no", 5, [5, "x"], (5,), "whole")
    assert result[mapped] == list(range(0, 80, 2))


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (lambda: os._exit(3), fp.WorkerDied),
        (lambda: threading.Event().wait(), fp.TaskTimeout),
        (lambda: threading.Lock(), fp.UnpicklableResult),
    ],
)
def test_every_end_of_a_task_can_be_handled(end, kind):
    wf = fp.Workflow()
    handled = wf.add(fp.task(end).options(timeout=0.5, fallback=lambda error: type(error)))
    assert wf.run(workers=1)[handled] is kind


def test_an_error_that_cannot_travel_is_stood_for():
    class Stubborn(Exception):
        def __reduce__(self):
            raise TypeError("not me")

    def refuse():
        raise Stubborn("text")

    wf = fp.Workflow()
    handled = wf.add(fp.task(refuse).options(fallback=lambda error: (type(error), error.text)))
    assert wf.run(workers=1)[handled] == (fp.RemoteError, "text")


def test_retries_come_first(either_backend, tmp_path):
    def count(path):
        with path.open("a") as file:
            file.write("x")
        raise OSError

    wf = fp.Workflow()
    counted = wf.add(fp.task(count).options(retries=2, fallback="given up"), tmp_path / "tries")
    result = wf.run(**either_backend)
    assert result[counted] == "given up"
    assert (tmp_path / "tries").read_text() == "xxx"
    assert result.record(counted).attempt == 3


def test_a_chain_goes_on_until_something_does_not_fail(either_backend, tmp_path):
    def count(path):
        with path.open("a") as file:
            file.write("x")
        raise OSError

    chain = fp.ChainFallback(fp.RetryFallback(2, wait=0.01), fail, lambda error: f"after {error}", "never")
    wf = fp.Workflow()
    counted = wf.add(fp.task(count).options(fallback=chain), tmp_path / "tries")
    result = wf.run(**either_backend)
    assert result[counted] == "after no"
    assert (tmp_path / "tries").read_text() == "xxx"
    events = [event for event in result.events if isinstance(event, WorkflowToolFallback)]
    assert [event.fallback for event in events] == ["retry", "retry", "fail", "<lambda>"]


def test_a_handler_that_fails_fails_the_task_and_both_errors_are_seen(either_backend):
    def worse(error):
        raise KeyError("worse")

    wf = fp.Workflow()
    wf.add(fp.task(fail).options(name="failed", fallback=worse))
    failure = failure_of(wf, **either_backend)
    (error,) = failure.exceptions
    assert isinstance(error, KeyError)
    assert isinstance(error.__context__, ValueError)
    (event,) = [event for event in failure.result.events if isinstance(event, WorkflowTaskFailed)]
    assert event.task == "failed"


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_a_task_may_be_left_out_with_what_follows_it(either_backend, schedule):
    wf = fp.Workflow()
    failed = wf.add(fp.task(fail).options(name="failed", fallback=fp.SkipFallback()))
    after = wf.add(len, failed)
    other = wf.add(abs, -3)
    result = wf.run(**either_backend, schedule=schedule)
    assert result[other] == 3
    assert result.ok
    assert result.status == "completed"
    assert result.status_counts() == {"completed": 1, "skipped": 2}
    assert result.record(after).skipped_for == "failed"
    with pytest.raises(fp.MissingResult, match="because its dependency 'failed' was skipped"):
        result[after]


def test_a_function_may_be_a_value():
    wf = fp.Workflow()
    given = wf.add(fp.task(fail).options(fallback=fp.ValueFallback(len)))
    assert wf.run(workers=1)[given] is len


def test_attempt_is_a_task_whose_error_another_function_gets(either_backend):
    wf = fp.Workflow()
    caught = wf.add(fp.attempt(fail, catch=repr), 1)
    fine = wf.add(fp.attempt(abs, catch=repr), -1)
    kept = wf.add(fp.attempt(fp.task(fail).options(name="kept"), catch=lambda error, x: x), 4)
    result = wf.run(**either_backend)
    assert result[[caught, fine, kept]] == ["ValueError('no')", 1, 4]
    assert kept.name == "kept"


def test_what_cannot_be_is_refused():
    with pytest.raises(fp.WorkflowError, match="needs at least one fallback"):
        fp.ChainFallback()
    with pytest.raises(fp.WorkflowError, match="times must be an integer from 1 to 10000, got 0"):
        fp.RetryFallback(0)
    with pytest.raises(fp.WorkflowError, match="wait must be a finite number of at least 0, got -1"):
        fp.RetryFallback(1, wait=-1)
    wf = fp.Workflow()
    wf.add(fp.task(abs).options(name="locked", fallback=threading.Lock()), 1)
    with pytest.raises(fp.UnpicklableArgument, match="task 'locked' got an argument that cannot be pickled: fallback="):
        wf.run(workers=1)


def test_steps_are_made_once():
    assert steps_of(MISSING) is NO_STEPS
    steps = steps_of(fp.ChainFallback(fp.RetryFallback(2), 1))
    assert steps_of(steps) is steps
    assert [step.kind for step in steps] == ["retry", "retry", "value"]
    assert pickle.loads(pickle.dumps(MISSING)) is MISSING
