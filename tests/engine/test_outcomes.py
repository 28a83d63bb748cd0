"""Each outcome counts once: what is told late, twice or not at all, and what a lost worker had done."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
from conftest import is_gone, wait_until
from delays import check_result

import forgepar as fp
from forgepar.backends import worker
from forgepar.backends.base import UNKNOWN_POSITION, Joined, Lost, Traits
from forgepar.backends.inline import InlineBackend
from forgepar.backends.messages import Failure, Reply
from forgepar.engine.in_flight import Flight, own_part
from forgepar.records import events
from forgepar.scheduling.durations import Durations
from forgepar.scheduling.rollback import Rollback
from forgepar.scheduling.run_state import RunPolicy, RunState, SecondOutcome, Status
from forgepar.workflow.plan import Plan

N = 60


def begin(log):
    """Note that an attempt begins; return the task's name."""
    context = fp.context()
    with open(log, "a") as file:  # noqa: PTH123
        file.write(f"{context.task} {context.attempt}\n")
    return context.task


def step(log, i, dies_at, _=None):
    """Note that an attempt begins; the first of one task ends its worker."""
    name = begin(log)
    if i == dies_at and fp.context().attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return name


def begun(log):
    return Counter(log.read_text().splitlines())


def steps(log, dies_at, **options):
    """Quick tasks, so that the next go out in large batches, and as many of which one ends its worker."""
    wf = fp.Workflow("steps")
    fn = fp.task(step).options(retries=1, **options)
    first = wf.map(fn, [log] * N, range(N), [None] * N)
    wf.map(fn, [log] * N, range(N), [dies_at] * N, first)
    return wf


@pytest.fixture
def silent(monkeypatch):
    """Workers, forked from here, that tell of a batch at its end; however slow they are, N // 2 is its third task."""
    monkeypatch.setattr(worker, "REPLY_SECONDS", 60.0)
    monkeypatch.setattr(Durations, "batch_size", lambda *_: 7)
    return {"workers": 2, "start_method": "fork"}


# Workers that die


@pytest.mark.parametrize("start_method", ["forkserver", "spawn", "fork"])
def test_records_and_events_tell_of_all_that_ran_again(tmp_path, start_method):
    log = tmp_path / "log"
    result = steps(log, N // 2).run(workers=2, start_method=start_method, outputs="all")
    assert result.ok
    check_result(result, begun(log))
    assert fp.AuditLog(result.events).replay() == result.standing()


def test_what_had_ended_unreported_runs_again_as_another_attempt(tmp_path, silent):
    log = tmp_path / "log"
    result = steps(log, N // 2).run(**silent, outputs="all")
    check_result(result, begun(log))
    again = [record for record in result.records if record.attempt > 1]
    assert len(again) == 3
    assert {record.attempt for record in again} == {2}
    told = [event for event in result.events if isinstance(event, events.WorkflowTaskRetried)]
    assert {event.task for event in told} == {record.name for record in again}
    unreported = [event for event in told if event.error == "the worker ended before it reported this attempt"]
    assert len(unreported) == len(again) - 1
    assert fp.AuditLog(result.events).replay() == result.standing()


def test_tasks_with_effects_that_ended_never_run_again(tmp_path, silent):
    log = tmp_path / "log"
    result = steps(log, N // 2, effects=True).run(**silent, outputs="all", rollback="none")
    check_result(result, begun(log))
    assert [record.name for record in result.records if record.attempt > 1] == [f"step-{N + N // 2}"]


def test_jobs_of_a_pool_count_their_attempts_too(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "REPLY_SECONDS", 60.0)
    log = tmp_path / "log"
    with fp.ForgeExecutor(1, start_method="fork") as executor:
        for effects in (False, True):
            log.write_text("")
            fn = fp.task(step).options(retries=1, effects=effects)
            futures = [executor.submit(fn, log, i, N // 2) for i in range(N)]
            names = [future.result() for future in futures]
            counts = begun(log)
            assert max(counts.values()) == 1
            assert Counter(line.split()[0] for line in counts).keys() == set(names)
            if effects:
                assert len(counts) == N + 1


class Losing(InlineBackend):
    """Loses its worker under the first batch, after some tasks of it and without having told of them."""

    def __init__(self, n_done, *, is_unknown):
        super().__init__()
        self.n_done, self.is_unknown = n_done, is_unknown
        self.traits = Traits(remembers=False, tells_at_end=True)

    def wait(self, timeout):
        if self._waiting and self.n_done is not None:
            batch, self.n_done = self._waiting[0], None
            self._waiting.clear()
            position = UNKNOWN_POSITION if self.is_unknown else batch.id << 32 | 0
            return [Lost(0, 1, None, position, 0.0, None, also=(batch.id << 32 | 2,)), Joined(0, 2)]
        return super().wait(timeout)


@pytest.mark.parametrize("is_unknown", [True, False])
def test_effects_that_may_have_been_had_are_not_had_again_unasked(is_unknown):
    wf = fp.Workflow()
    wf.add(fp.task(abs).options(effects=True), -1)
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(backend=Losing(0, is_unknown=is_unknown), rollback="none")
    (error,) = caught.value.exceptions
    assert isinstance(error, fp.WorkerDied)
    assert caught.value.result.status_counts() == {"failed": 1}


def test_effects_that_may_have_been_had_are_had_again_as_retries_say():
    wf = fp.Workflow()
    one = wf.add(fp.task(abs).options(effects=True, retries=1), -1)
    result = wf.run(backend=Losing(0, is_unknown=True), rollback="none")
    assert (result[one], result.record(one).attempt) == (1, 2)


# Replies that come late, twice, or for what is others' by now


class Repeating(InlineBackend):
    """Tells everything twice, and once more of batches long gone."""

    def __init__(self):
        super().__init__()
        self.told = []

    def wait(self, timeout):
        notices = super().wait(timeout)
        replies = [notice for notice in notices if type(notice) is Reply]
        self.told += replies
        return [*notices, *replies, *self.told[:3]]


def test_a_reply_that_is_told_again_changes_nothing():
    wf = fp.Workflow()
    level = wf.map(abs, range(50))
    total = wf.add(sum, level)
    result = wf.run(backend=Repeating(), outputs="all")
    assert (result[level], result[total]) == (list(range(50)), sum(range(50)))
    done = Counter(event.task for event in result.events if isinstance(event, events.WorkflowTaskCompleted))
    assert set(done.values()) == {1}


def reply_of(first, n, failure=None, subflows=()):
    marks = np.arange(first, first + n + 1, dtype=np.float64).tobytes()
    return Reply(0, 7, first, list(range(first, first + n)), marks, failure, True, 0.0, 0, subflows)


@pytest.mark.parametrize(
    ("n_done", "n_own", "first", "n", "own"),
    [
        (0, 10, 0, 10, range(10)),
        (0, 4, 0, 10, range(4)),
        (3, 10, 0, 10, range(3, 10)),
        (3, 5, 0, 10, range(3, 5)),
        (4, 4, 0, 10, range(0)),
        (6, 4, 0, 10, range(0)),
        (2, 10, 5, 3, range(0)),
    ],
)
def test_of_a_reply_only_what_is_the_slots_own_and_open_counts(n_done, n_own, first, n, own):
    flight = Flight(7, 0, 0, range(100, 110), True)
    flight.n_done, flight.n_own = n_done, n_own
    failure = Failure(first + n - 1, None, "E", "", "")
    part, left_out = own_part(flight, reply_of(first, n, failure, [(0, "first"), (n - 1, "last")]))
    assert part.values == list(own)
    assert len(part.marks) == 8 * (len(own) + 1)
    if own:
        assert part.first == own.start
        assert memoryview(part.marks).cast("d")[0] == own.start
    assert (part.failure is failure) == (bool(own) and own.stop == first + n)
    assert [part.values[place] for place, _ in part.subflows] == [i for i in (first, first + n - 1) if i in own]
    assert [first + place for place in left_out] == [i for i in range(first, first + n) if i not in own]


def state_of(n):
    wf = fp.Workflow()
    wf.map(fp.task(abs).options(retries=1), range(n))
    plan = Plan(wf)
    state = RunState(plan, RunPolicy())
    state.begin()
    return plan, state


@pytest.mark.parametrize("tasks", [range(1, 2), range(4), np.array([0, 3], np.int32)])
def test_a_second_outcome_is_refused_and_changes_nothing(tasks):
    _, state = state_of(5)
    template, _ = state.head()
    state.take(4)
    state.completed(range(1, 2))
    state.completed(range(3, 4))
    settled, out = state.n_settled, state.n_out
    for tell in (state.completed, state.cancelled, lambda tasks: state.put_back(template, tasks)):
        with pytest.raises(SecondOutcome, match=r"task 'abs-[13]' is completed"):
            tell(tasks)
    with pytest.raises(SecondOutcome):
        state.failed(1)
    with pytest.raises(SecondOutcome, match="task 'abs-4' is pending"):
        state.failed(4)
    assert (state.n_settled, state.n_out) == (settled, out) == (2, 2)


def test_a_second_outcome_of_undoing_is_refused():
    wf = fp.Workflow()
    wf.map(fp.task(abs).options(compensate=abs), range(3))
    plan = Plan(wf)
    rollback = Rollback(plan, np.full(3, Status.COMPLETED, np.int8), "all", [])
    rollback.take(2)
    rollback.completed(range(1))
    with pytest.raises(SecondOutcome, match="undoing task 'abs-0'"):
        rollback.completed(range(1))
    with pytest.raises(SecondOutcome, match="undoing task 'abs-2'"):
        rollback.failed(2, ValueError())


def test_what_runs_again_for_a_lost_worker_uses_no_retry_up():
    _, state = state_of(1)
    state.take(1)
    for attempt in (2, 3):
        assert state.repeated(0) == attempt
        state.put_back(0, range(1))
        state.take(1)
    assert state.tries(0) == 1
    assert [effect.attempt for effect in state.failed(0)] == [4]
    state.retry(0)
    state.take(1)
    assert state.tries(0) == 2
    state.failed(0)
    assert state.status[0] == Status.FAILED


def test_a_timeout_ends_a_run_whatever_the_counters_say(monkeypatch, either_backend):
    begin_run = RunState.begin

    def miscounting(self):
        self._out += 3
        return begin_run(self)

    monkeypatch.setattr(RunState, "begin", miscounting)
    wf = fp.Workflow()
    wf.map(abs, range(5))
    heard = []
    with fp.WorkflowExecutor(**either_backend) as executor, suppress(fp.WorkflowFailed):
        executor.run(wf, timeout=1.0, audit=heard.append)  # it fails only where a busy machine has not begun by then
    assert [event for event in heard if isinstance(event, events.WorkflowDeadlockTimeout)]
    assert isinstance(heard[-1], events.WorkflowCompleted)


# Tasks that return a workflow when the run is over


@pytest.mark.parametrize("how", ["cancelled", "timeout"])
def test_a_subflow_of_a_run_that_was_ended_does_not_complete_its_task(tmp_path, how, either_backend):
    token = fp.CancellationToken()

    def late():
        (tmp_path / "runs").touch()
        wait_until(fp.context().cancelled, "the end of the run")
        inner = fp.Workflow()
        return fp.Subflow(inner, inner.add(pow, 2, 10))

    wf = fp.Workflow()
    one = wf.add(late)
    after = wf.add(abs, one)
    if how == "timeout":
        if either_backend["backend"] == "inline":
            pytest.skip("no clock is looked at while an inline task runs")
        with pytest.raises(fp.WorkflowFailed) as caught:
            wf.run(**either_backend, timeout=0.5)
        result = caught.value.result
    else:
        stopper = threading.Thread(target=lambda: (wait_until((tmp_path / "runs").exists, "the task"), token.cancel()))
        stopper.start()
        result = wf.run(**either_backend, outputs="all", cancel=token)
        stopper.join()
    assert result.status != "completed"
    for handle in (one, after):
        with pytest.raises(fp.MissingResult):
            result[handle]
    assert fp.AuditLog(result.events).replay() == result.standing()
    if how == "timeout":  # a call-off may be heard of behind the task's reply
        assert result.status_counts() == {"cancelled": 2}
        assert not [event for event in result.events if isinstance(event, events.WorkflowTaskCompleted)]


def test_a_subflow_does_not_join_a_run_that_a_failure_has_halted(tmp_path):
    """Its tasks would be pending in a run that hands out nothing more."""

    def late():
        (tmp_path / "runs").touch()
        wait_until((tmp_path / "failed").exists, "the failure to be known")
        inner = fp.Workflow()
        return fp.Subflow(inner, inner.add(pow, 2, 10))

    def fail():
        wait_until((tmp_path / "runs").exists, "the other task")
        raise LookupError("no")

    def listen(event):
        if isinstance(event, events.WorkflowTaskFailed):
            (tmp_path / "failed").touch()

    wf = fp.Workflow()
    after = wf.add(abs, wf.add(late))
    wf.add(fail)
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(workers=2, audit=listen)
    result = caught.value.result
    assert result.status_counts() == {"failed": 1, "cancelled": 2}
    assert not [event for event in result.events if isinstance(event, events.WorkflowTasksAdded)]
    assert fp.AuditLog(result.events).replay() == result.standing()
    with pytest.raises(fp.MissingResult):
        result[after]


# Tasks that a workflow gets beside those of its user


class Deadly(list):
    """A list that ends the first worker which looks into it, or decides by it."""

    def __init__(self, items, folder):
        super().__init__(items)
        self.folder = folder

    def __iter__(self):
        self.strike("iter")
        return super().__iter__()

    def __bool__(self):
        self.strike("bool")
        return True

    def strike(self, kind):
        if fp.context().task != "deadly" and not (self.folder / kind).exists():
            (self.folder / kind).touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Trap:
    """Ends the first worker that unpickles it."""

    def __init__(self, folder):
        self.folder = folder

    def __setstate__(self, state):
        self.__dict__ |= state
        if worker.inside_worker() and not (self.folder / "trap").exists():
            (self.folder / "trap").touch()
            os.kill(os.getpid(), signal.SIGKILL)


def deadly(folder):
    made = Deadly([], folder)
    list.extend(made, range(5))
    return made


def test_the_death_of_a_worker_under_what_fans_out_fails_no_run(tmp_path):
    wf = fp.Workflow()
    values = wf.map(fp.task(abs).options(retries=1), wf.add(deadly, tmp_path))
    result = wf.run(workers=2)
    assert result[values] == list(range(5))
    assert (tmp_path / "iter").exists()


def test_the_death_of_a_worker_under_the_output_of_a_subflow_fails_no_run(tmp_path):
    def sub():
        inner = fp.Workflow()
        return fp.Subflow(inner, inner.add(fp.task(Trap).options(retries=1), tmp_path))

    wf = fp.Workflow()
    one = wf.add(fp.task(sub).options(retries=1))
    assert isinstance(wf.run(workers=2)[one], Trap)
    assert (tmp_path / "trap").exists()


def test_the_death_of_a_worker_under_a_condition_fails_no_run(tmp_path):
    wf = fp.Workflow()
    value = fp.when(wf, wf.add(deadly, tmp_path), lambda: wf.add(abs, -1))
    assert wf.run(workers=2)[value] == 1
    assert (tmp_path / "bool").exists()


def test_an_error_under_what_fans_out_is_not_tried_again():
    wf = fp.Workflow()
    wf.map(abs, wf.add(abs, -1))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(backend="inline")
    assert not [event for event in caught.value.result.events if isinstance(event, events.WorkflowTaskRetried)]


def note_or_die(log, number):
    """Note that this task runs; the worker ends under the sixth when that runs first."""
    with open(log, "a") as file:  # noqa: PTH123
        file.write(f"{number} {os.getpid()}\n")
    if number == 5 and fp.context().attempt == 1:
        os._exit(1)
    return number


@pytest.mark.parametrize("method", ["forkserver", "fork"])
def test_what_a_worker_told_before_its_death_counts_though_it_left_work_unread(tmp_path, method):
    log = tmp_path / "log"
    wf = fp.Workflow()
    handles = wf.map(fp.task(note_or_die).options(effects=True, retries=1), [str(log)] * 12, range(12))
    wf.map(abs, range(12))  # behind the others, in a batch that the worker never comes to

    def wait_for_the_end(event):
        """Have the parent look at nothing until the worker is gone, as where it is busy."""
        if isinstance(event, events.WorkflowTaskCompleted) and event.task == "note_or_die-0":
            wait_until(lambda: (lines := noted(log))[-1][0] == 5 and has_hung_up(lines[-1][1]), "its end")

    result = wf.run(workers=1, start_method=method, outputs="all", audit=wait_for_the_end)
    assert result[handles] == list(range(12))
    assert Counter(number for number, _ in noted(log)) == Counter([*range(12), 5])


def has_hung_up(pid):
    """Tell whether a process has closed what it had open: its last thread has, the first may have ended before."""
    try:
        return is_gone(pid) and len(os.listdir(f"/proc/{pid}/task")) == 1  # noqa: PTH208
    except FileNotFoundError:
        return is_gone(pid)


def noted(log):
    return [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
