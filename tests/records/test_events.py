"""Events in memory and those who listen: order, numbers, times; sinks of all kinds, and sinks that fail."""

from __future__ import annotations

import dataclasses
import io
import logging
from datetime import UTC, timedelta

import numpy as np
import pytest
from conftest import executor_arguments
from test_dispatcher import grid

import forgepar as fp
from forgepar.backends.inline import InlineBackend
from forgepar.backends.messages import Failure, Reply
from forgepar.engine.recorder import Recorder
from forgepar.records import events as kinds
from forgepar.records.events import (
    Event,
    WorkflowStarted,
    WorkflowTaskCompleted,
    WorkflowTaskFailed,
    WorkflowTaskParallelCompleted,
    WorkflowTaskParallelStarted,
    WorkflowTaskStarted,
)
from forgepar.records.keeper import NullKeeper


@pytest.fixture(scope="module", params=["inline", "forkserver"])
def executor(request):
    """Workers that the tests of this module share, as starting them takes longer than all else."""
    with fp.WorkflowExecutor(**executor_arguments(request.param)) as executor:
        warm = fp.Workflow()
        warm.map(abs, range(2))  # a task for each worker: no more are started than a run can use
        executor.run(warm)
        yield executor


class Memory:
    """A sink that keeps what it gets."""

    def __init__(self):
        self.batches = []
        self.n_flushed = 0

    def write(self, events):
        self.batches.append(list(events))

    def flush(self):
        self.n_flushed += 1

    @property
    def events(self):
        return [event for batch in self.batches for event in batch]


def fail(x):
    raise LookupError(f"nothing for {x}")


def run_grid(**rules):
    wf, _ = grid(6, 4)
    return wf.run(**{"backend": "inline", **rules})


# In memory


def test_events_are_frozen_and_know_their_time():
    event = WorkflowStarted(86400.5, "w", 1, 1)
    assert (event.seq, event.run_id) == (-1, "")
    assert event.time.utcoffset() == timedelta(0)
    assert (event.time.tzinfo, event.time.isoformat()) == (UTC, "1970-01-02T00:00:00.500000+00:00")
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.at = 0.0


@pytest.mark.parametrize("name", [name for name in vars(kinds) if name.startswith("Workflow")])
def test_every_kind_is_a_documented_event(name):
    kind = getattr(kinds, name)
    assert issubclass(kind, Event)
    assert kind.__doc__ and not kind.__doc__.startswith(f"{name}(")  # noqa: PT018


def test_events_are_numbered_and_carry_the_runs_id(executor):
    seen = []
    wf = fp.Workflow()
    who = wf.add(lambda: fp.context().run_id)
    result = executor.run(wf, audit=seen.append)
    assert [event.seq for event in result.events] == list(range(len(result.events)))
    assert {event.run_id for event in result.events} == {result.run_id} == {result[who]}
    assert seen == list(result.events)


def test_two_runs_have_two_ids():
    assert run_grid().run_id != run_grid().run_id


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_events_of_tasks_agree_with_the_records(executor, schedule):
    wf, _ = grid(30, 12)
    result = executor.run(wf, schedule=schedule)
    (began,) = [event.at for event in result.events if isinstance(event, WorkflowStarted)]
    started = {event.task: event for event in result.events if isinstance(event, WorkflowTaskStarted)}
    completed = {event.task: event for event in result.events if isinstance(event, WorkflowTaskCompleted)}
    assert len(started) == len(completed) == 360
    for record in result.records:
        begin, end = started[record.name], completed[record.name]
        assert (begin.layer, begin.attempt, begin.worker) == (record.layer, record.attempt, record.worker)
        assert (end.attempt, end.worker, end.bytes) == (record.attempt, record.worker, record.bytes)
        assert end.seconds == record.duration
        assert begin.at - began == pytest.approx(record.start, abs=1e-5)
        assert end.at - begin.at == pytest.approx(record.duration, abs=1e-5)
        assert begin.seq < end.seq


def test_tasks_lie_between_the_events_of_their_layer(executor):
    wf, _ = grid(30, 6)
    result = executor.run(wf)
    begin: dict[int, Event] = {}
    for event in result.events:
        if isinstance(event, WorkflowTaskParallelStarted):
            begin[event.layer_index] = event
        if isinstance(event, WorkflowTaskStarted):
            assert list(begin)[-1] == event.layer
            assert event.at >= begin[event.layer].at - 1e-6
        if isinstance(event, WorkflowTaskParallelCompleted):
            assert list(begin)[-1] == event.layer_index


def test_a_failing_task_is_told_to_have_started_and_no_more(executor):
    wf = fp.Workflow()
    wf.add(fail, 3)
    with pytest.raises(fp.WorkflowFailed) as caught:
        executor.run(wf)
    told = [event for event in caught.value.result.events if getattr(event, "task", None) == "fail"]
    assert [type(event) for event in told] == [WorkflowTaskStarted, WorkflowTaskFailed]
    assert told[1].error == "LookupError: nothing for 3"


def test_events_are_a_sequence():
    events = run_grid().events
    every = list(events)
    assert len(events) == len(every) == 2 + 4 * 2 + 24 * 2 + 1
    assert [events[place] for place in range(len(events))] == every
    assert [events[place - len(every)] for place in range(len(events))] == every
    for first in range(0, len(every), 3):
        for end in (first, first + 1, first + 2, first + 7, len(every)):
            assert events[first:end] == every[first:end]
    assert events[::-1] == every[::-1]
    assert events[3::5] == every[3::5]
    assert events.index(every[7]) == 7
    assert repr(events) == f"<EventLog of {len(every)} events>"
    with pytest.raises(IndexError):
        events[len(every)]


def test_nothing_is_made_that_nobody_looks_at(monkeypatch):
    made = []
    monkeypatch.setattr("forgepar.records.event_log.WorkflowTaskStarted", lambda *a, **k: made.append(a) or 1 / 0)
    result = run_grid()
    assert made == []
    with pytest.raises(ZeroDivisionError):
        list(result.events)


@pytest.mark.parametrize("begun", [0, 1, 3])
@pytest.mark.parametrize("fails", [False, True])
def test_a_task_whose_time_was_over_as_its_reply_came_is_told_once(begun, fails):
    """The parent told that it began, to say that its time was over; then the reply that was on its way came in."""
    wf = fp.Workflow()
    wf.map(abs, range(4))
    plan = wf.plan()
    backend = InlineBackend()
    backend.open()
    recorder = Recorder(plan, "id", (), 2, backend.arena, NullKeeper())
    recorder.begin()
    recorder.begun(begun, 1, 5.5)
    failure = Failure(3, None, "LookupError", "none", "") if fails else None
    marks = np.arange(5.0).tobytes()
    recorder.reply(range(4), Reply(1, 7, 0, [None] * 4, marks, failure, True, 0.0, 0))
    recorder.keep()
    backend.close()
    told = [
        (type(event).__name__.removeprefix("WorkflowTask"), event.task)
        for event in recorder.events
        if hasattr(event, "task")
    ]
    names = [plan.name(task) for task in range(4)]
    pairs = [(kind, name) for name in names for kind in ("Started", "Completed")][: 7 if fails else 8]
    pairs.remove(("Started", names[begun]))
    assert told == [("Started", names[begun]), *pairs]
    assert [event.seq for event in recorder.events] == list(range(len(recorder.events)))


# Sinks


def test_sinks_get_what_the_result_tells_in_order(executor):
    sink, called = Memory(), []
    result = executor.run(grid(6, 4)[0], audit=[sink, called.append])
    assert sink.events == called == list(result.events)
    assert len(sink.batches) < len(sink.events)
    assert all(sink.batches)
    assert sink.n_flushed == 1


def test_a_sink_is_flushed_however_the_run_ends():
    sink = Memory()
    wf = fp.Workflow()
    wf.add(fail, 1)
    with pytest.raises(fp.WorkflowFailed):
        wf.run(backend="inline", audit=sink)
    wf = fp.Workflow()
    wf.add(interrupt)
    with pytest.raises(KeyboardInterrupt):
        wf.run(backend="inline", audit=sink)
    assert sink.n_flushed == 2


def interrupt():
    raise KeyboardInterrupt


def test_a_logger_gets_levels(caplog):
    logger = logging.getLogger("audit of a test")
    wf = fp.Workflow("logged")
    wf.map(abs, range(2))
    wf.add(fp.task(fail).options(retries=1), 1)
    with caplog.at_level(logging.DEBUG, logger.name), pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(backend="inline", fail_fast=False, audit=logger)
    records = [record for record in caplog.records if record.name == logger.name]
    assert [record.event for record in records] == list(caught.value.result.events)
    levels = {type(record.event).__name__: record.levelname for record in records}
    assert levels == {
        "WorkflowStarted": "INFO",
        "WorkflowDeadlockCheck": "INFO",
        "WorkflowTaskParallelStarted": "INFO",
        "WorkflowTaskStarted": "DEBUG",
        "WorkflowTaskCompleted": "DEBUG",
        "WorkflowTaskRetried": "WARNING",
        "WorkflowTaskFailed": "ERROR",
        "WorkflowTaskParallelCompleted": "INFO",
        "WorkflowCompleted": "ERROR",
    }
    (text,) = [record.getMessage() for record in records if record.levelname == "WARNING"]
    assert text == "WorkflowTaskRetried task='fail' attempt=2 error='LookupError: nothing for 1'"


def test_a_logger_that_wants_no_details_gets_none(caplog):
    logger = logging.getLogger("audit of a test")
    with caplog.at_level(logging.INFO, logger.name):
        run_grid(audit=logger)
    assert {type(record.event).__name__ for record in caplog.records if record.name == logger.name} == {
        "WorkflowStarted",
        "WorkflowDeadlockCheck",
        "WorkflowTaskParallelStarted",
        "WorkflowTaskParallelCompleted",
        "WorkflowCompleted",
    }


def test_a_sink_that_raises_is_reported_once_and_dropped():
    class Broken(Memory):
        def write(self, events):
            super().write(events)
            raise OSError("disk full")

        def __repr__(self):
            return "Broken()"

    broken, other = Broken(), Memory()
    with pytest.warns(RuntimeWarning, match="Broken") as told:
        result = run_grid(audit=[broken, other])
    assert [str(warning.message) for warning in told] == [
        "The audit sink Broken() raised OSError: disk full. It gets no more events of this run, which continues."
    ]
    assert result.ok
    assert len(broken.batches) == 1
    assert broken.n_flushed == 0
    assert other.events == list(result.events)


def test_a_sink_that_raises_stops_nothing_where_warnings_are_errors(caplog):
    assert run_grid(audit=fail).ok  # as they are in these tests
    (record,) = [record for record in caplog.records if record.name == "forgepar.audit"]
    assert "raised LookupError" in record.getMessage()


def test_an_interrupt_in_a_sink_is_one():
    with pytest.raises(KeyboardInterrupt):
        run_grid(audit=lambda _event: interrupt())


@pytest.mark.parametrize("audit", [7, [7], [Memory(), None]])
def test_what_cannot_listen_is_an_error(audit):
    with pytest.raises(ValueError, match=r"^audit must be a path, a logger, .*, got (7|None)\.$"):
        run_grid(audit=audit)


def test_a_file_object_is_told_to_be_none(tmp_path):
    with pytest.raises(ValueError, match="Give its path"):
        run_grid(audit=io.StringIO())
