"""The audit log: what is written of a run, read back, and gone through again, is where the run really ended."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import stat
import threading

import pytest
from conftest import executor_arguments, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_random_dags import dags, step_or_fail

import forgepar as fp
from forgepar.records.audit_log import AuditLog, JsonLines, event_of, line_of
from forgepar.records.events import (
    Event,
    UnknownEvent,
    WorkflowCancelled,
    WorkflowCompleted,
    WorkflowStarted,
    WorkflowTaskFailed,
    WorkflowTaskParallelStarted,
    WorkflowTaskRetried,
    WorkflowTaskSkipped,
    WorkflowTaskStarted,
    WorkflowTaskTimedOut,
    WorkflowWorkerDied,
)
from forgepar.records.run_status import RunStatus, TaskStatus

SHORT = 0.2  # seconds; a timeout that is meant to be passed, by a task that does nothing else
SCHEDULES = ["layers", "eager"]


def run(wf, executor=None, **rules) -> fp.RunResult:
    """The result of a run, whatever became of it."""
    try:
        return wf.run(**rules) if executor is None else executor.run(wf, **rules)
    except fp.WorkflowFailed as failure:
        return failure.result  # type: ignore[return-value]


def checked(result: fp.RunResult, path) -> RunStatus:
    """Where a run stands by its result, after a look that its events, in memory and in a file, say the same."""
    standing = result.standing()
    assert AuditLog(result.events).replay() == standing
    log = AuditLog.load(path)
    assert log.replay() == standing
    assert log.events == tuple(result.events)
    return standing


def kinds(result, *of: type[Event]) -> list[Event]:
    return [event for event in result.events if isinstance(event, of)]


@pytest.fixture(scope="module", params=["inline", "forkserver"])
def executor(request):
    """Workers that the tests of this module share, as starting them takes longer than all else."""
    with fp.WorkflowExecutor(**executor_arguments(request.param)) as executor:
        warm = fp.Workflow()
        warm.map(abs, range(2))  # a task for each worker: no more are started than a run can use
        executor.run(warm)
        yield executor


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.jsonl"


def fails_at(x, bad):
    if x == bad:
        raise LookupError(f"nothing for {x}")
    return x


def fails_once(mark):
    if not mark.exists():
        mark.touch()
        raise ConnectionError("try again")
    return 1


def dies_once(mark):
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1


def hang(started=None):
    if started is not None:
        started.touch()
    threading.Event().wait()


@pytest.mark.parametrize("schedule", SCHEDULES)
class TestReplay:
    """What a log leads to is what the run's own columns say."""

    def test_success(self, executor, schedule, path):
        wf = fp.Workflow("good")
        wf.add(sum, wf.map(abs, range(300)))
        standing = checked(run(wf, executor, schedule=schedule, audit=path), path)
        assert (standing.status, standing.workflow, standing.task_count) == ("completed", "good", 301)
        assert standing.counts == {"completed": 301}
        assert standing.tasks["sum"][:2] == ("completed", 1)

    def test_the_first_failure_ends_it(self, executor, schedule, path):
        wf = fp.Workflow()
        wf.map(abs, wf.map(fails_at, range(50), bad=7))
        standing = checked(run(wf, executor, schedule=schedule, audit=path), path)
        assert standing.status == "failed"
        assert standing.tasks["fails_at-7"].error == "LookupError: nothing for 7"
        assert standing.counts["failed"] == 1
        assert standing.counts["cancelled"] > 0

    def test_what_waited_for_a_failed_task_is_skipped(self, executor, schedule, path):
        wf = fp.Workflow()
        first = wf.map(fails_at, range(20), bad=7)
        wf.map(abs, wf.map(abs, first))
        result = run(wf, executor, schedule=schedule, fail_fast=False, audit=path)
        standing = checked(result, path)
        assert standing.counts == {"completed": 57, "failed": 1, "skipped": 2}
        assert standing.tasks["abs-7"] == TaskStatus("skipped", 0, -1, None)
        told = [(event.task, event.waited_for) for event in kinds(result, WorkflowTaskSkipped)]
        assert told == [("abs-7", "fails_at-7"), ("abs-27", "fails_at-7")]

    def test_retries(self, executor, schedule, path, tmp_path):
        wf = fp.Workflow()
        again = fp.task(fails_once).options(retries=2)
        wf.map(again, [tmp_path / "a", tmp_path / "b"])
        result = run(wf, executor, schedule=schedule, audit=path)
        assert checked(result, path).counts == {"completed": 2}
        retried = kinds(result, WorkflowTaskRetried)
        assert sorted((event.task, event.attempt, event.error) for event in retried) == [
            ("fails_once-0", 2, "ConnectionError: try again"),
            ("fails_once-1", 2, "ConnectionError: try again"),
        ]
        attempts = [event.attempt for event in kinds(result, WorkflowTaskStarted) if event.task == "fails_once-0"]
        assert attempts == [1, 2]


def undo(value):
    if value == 2:
        raise OSError("cannot be undone")


@pytest.mark.parametrize("schedule", SCHEDULES)
class TestReplayOfTheUnusual:
    """The same in this process, for what depends on no worker."""

    def test_a_task_that_was_to_be_tried_again_is_cancelled_with_the_run(self, schedule, path):
        wf = fp.Workflow()
        wf.add(fp.task(fails_at).options(name="waits", retries=1, backoff=600.0), 1, 1)
        wf.add(fp.task(fails_at).options(name="ends it"), 1, bad=1)
        standing = checked(run(wf, backend="inline", schedule=schedule, audit=path), path)
        assert standing.status == "failed"
        assert standing.tasks["waits"][:2] == ("cancelled", 2)

    @pytest.mark.parametrize("fallback", [7, fp.RetryFallback(1), fp.SkipFallback(), abs])
    @pytest.mark.parametrize("ends", [False, True])
    def test_fallbacks(self, schedule, path, fallback, ends):
        wf = fp.Workflow()
        first = wf.add(fp.task(fails_at).options(fallback=fallback), 1, bad=1)
        wf.add(fp.task(abs).options(after=first), 1)
        if ends:
            wf.add(fp.task(fails_at).options(name="ends it"), 1, bad=1)
        checked(run(wf, backend="inline", schedule=schedule, audit=path), path)

    def test_rollback(self, schedule, path):
        wf = fp.Workflow()
        done = wf.map(fp.task(fails_at).options(compensate=undo), range(4), bad=9)
        wf.add(fp.task(fails_at).options(name="ends it", after=list(done)), 1, bad=1)
        standing = checked(run(wf, backend="inline", schedule=schedule, audit=path), path)
        assert standing.counts == {"compensated": 3, "completed": 1, "failed": 1}

    def test_tasks_that_join_and_one_that_is_left_out(self, schedule, path):
        def more():
            added = fp.Workflow()
            return fp.Subflow(added, added.map(abs, range(3)))

        wf = fp.Workflow()
        wf.add(fp.task(abs).options(after=wf.add(more)), 1)
        wf.add(fp.task(fails_at).options(name="broken", fallback=fp.SkipFallback()), 1, bad=1)
        standing = checked(run(wf, backend="inline", schedule=schedule, audit=path), path)
        assert standing.task_count >= 6
        assert standing.counts["skipped"] == 1


def test_replay_of_workers_that_die(path, tmp_path):
    wf = fp.Workflow()
    wf.map(abs, range(20))
    wf.add(fp.task(dies_once).options(name="again", retries=1), tmp_path / "mark")
    wf.add(fp.task(os._exit).options(name="dead"), 7)
    result = run(wf, workers=2, fail_fast=False, audit=path)
    standing = checked(result, path)
    assert standing.counts == {"completed": 21, "failed": 1}
    assert standing.tasks["dead"].status == "failed"
    assert standing.tasks["again"][:2] == ("completed", 2)
    of_dead = [type(e).__name__ for e in result.events if getattr(e, "task", None) == "dead"]
    assert of_dead.count("WorkflowTaskStarted") == of_dead.count("WorkflowTaskFailed") == 1
    assert of_dead.index("WorkflowTaskStarted") < of_dead.index("WorkflowTaskFailed")
    assert {event.task for event in kinds(result, WorkflowWorkerDied)} == {"again", "dead"}


def test_replay_of_timeouts(path):
    wf = fp.Workflow()
    wf.map(abs, range(20))
    wf.add(fp.task(hang).options(name="slow", timeout=SHORT))
    result = run(wf, workers=2, fail_fast=False, audit=path)
    standing = checked(result, path)
    assert standing.tasks["slow"].status == "failed"
    assert standing.tasks["slow"].error.startswith("TaskTimeout: ")
    told = [e for e in result.events if getattr(e, "task", None) == "slow"]
    assert [type(e) for e in told] == [WorkflowTaskStarted, WorkflowTaskTimedOut, WorkflowTaskFailed]
    assert told[1].at - told[0].at >= SHORT


def test_replay_of_a_run_that_ran_out_of_time(path):
    wf = fp.Workflow()
    wf.add(hang, None)
    standing = checked(run(wf, workers=1, timeout=SHORT, audit=path), path)
    assert standing.status == "cancelled"
    assert standing.tasks["hang"] == TaskStatus("cancelled", 1, 0, None)


def test_replay_of_a_run_that_was_killed(path, tmp_path):
    wf = fp.Workflow()
    wf.map(abs, wf.map(hang, [tmp_path / "a", tmp_path / "b"]))
    token = fp.CancellationToken()

    def call_off():
        wait_until(lambda: len(list(tmp_path.glob("[ab]"))) == 2, "the tasks to start")
        token.cancel(kill=True)

    caller = threading.Thread(target=call_off)
    caller.start()
    result = run(wf, workers=2, cancel=token, audit=path)
    caller.join()
    standing = checked(result, path)
    assert standing.counts == {"cancelled": 4}
    assert {name: task[:2] for name, task in standing.tasks.items()} == {
        "hang-0": ("cancelled", 1),
        "hang-1": ("cancelled", 1),
    }
    assert kinds(result, WorkflowCancelled)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(parents=dags(), data=st.data())
def test_replay_of_random_graphs_with_failures(parents, data):
    failing = data.draw(st.sets(st.sampled_from(range(len(parents))), max_size=3))
    wf = fp.Workflow()
    handles = []
    for node, mine in enumerate(parents):
        step = fp.task(step_or_fail).options(retries=data.draw(st.integers(0, 1)))
        handles.append(wf.add(step, node, node in failing, *[handles[parent] for parent in mine]))
    schedule, fail_fast = data.draw(st.sampled_from(SCHEDULES)), data.draw(st.booleans())
    result = run(wf, backend="inline", schedule=schedule, fail_fast=fail_fast)
    assert AuditLog(result.events).replay() == result.standing()
    assert [event.seq for event in result.events] == list(range(len(result.events)))
    at = data.draw(st.integers(0, len(result.events) - 1))
    assert AuditLog(event_of(line_of(event).encode()) for event in result.events[: at + 1]).replay().run_id


# Logs that stop, and files that are not whole


def small_run(path, name="small"):
    wf = fp.Workflow(name)
    wf.map(abs, range(3))
    return wf.run(backend="inline", audit=path)


def test_a_log_without_an_end_tells_of_a_running_run():
    wf = fp.Workflow()
    wf.map(abs, range(3))
    events = wf.run(backend="inline").events
    standing = AuditLog(events[:6]).replay()
    assert standing.status == "running"
    assert standing.counts == {"completed": 1, "running": 1, "pending": 1}
    assert {name: task.status for name, task in standing.tasks.items()} == {"abs-0": "completed", "abs-1": "running"}


@pytest.mark.parametrize("n_torn", [1, 5, 60])
def test_a_torn_last_line_is_left_out(path, n_torn):
    result = small_run(path)
    path.write_bytes(path.read_bytes()[:-n_torn])
    log = AuditLog.load(path)
    assert log.events == tuple(result.events)[: len(result.events) - (n_torn > 1)]
    assert log.replay().status == ("completed" if n_torn == 1 else "running")


def test_a_run_behind_a_torn_line_begins_a_new_one(path):
    first = small_run(path)
    path.write_bytes(path.read_bytes()[:-5])
    second = small_run(path)
    assert AuditLog.load(path).replay() == second.standing()
    assert AuditLog.load(path, first.run_id).replay().status == "running"


def test_a_torn_line_elsewhere_is_an_error(path):
    small_run(path)
    lines = path.read_text().splitlines()
    lines[3] = lines[3][:-9]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"run\.jsonl, line 4 is not an event: .*Correct or remove that line"):
        AuditLog.load(path)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("[1]", "the field 'event' is missing"),
        ('{"event": "WorkflowStarted", "seq": 0, "run_id": "a"}', "the field 'at' is missing"),
        ('{"event": "Later", "at": 1.0, "run_id": "a"}', "the field 'seq' is missing"),
    ],
)
def test_a_line_that_is_no_event_says_why(path, line, fault):
    small_run(path)
    path.write_text(f"{line}\n{line}\n{path.read_text()}")
    with pytest.raises(ValueError, match=f"line 1 is not an event: .*{fault}"):
        AuditLog.load(path)


def test_a_missing_event_is_an_error(path):
    events = small_run(path).events
    with pytest.raises(ValueError, match=r"lacks event 2; event 3 is in its place"):
        AuditLog([*events[:2], *events[3:]]).replay()
    with pytest.raises(ValueError, match=r"lacks event 0"):
        AuditLog(events[1:]).replay()


def test_a_log_that_begins_otherwise_is_an_error():
    with pytest.raises(ValueError, match="begins with a WorkflowTaskParallelStarted"):
        AuditLog([WorkflowTaskParallelStarted(0.0, 0, 3, seq=0)]).replay()


def test_runs_in_one_file_are_told_apart(path):
    results = [small_run(path, name) for name in ("a", "b", "c")]
    ids = tuple(result.run_id for result in results)
    assert AuditLog.load(path).run_ids == ids
    assert len(set(ids)) == 3
    assert AuditLog.load(path).run_id == ids[-1]
    for result in results:
        assert AuditLog.load(path, result.run_id).replay() == result.standing()
    with pytest.raises(ValueError, match=rf"^run_id must be that of a run in .* \({', '.join(ids)}\), got 'x'\.$"):
        AuditLog.load(path, "x")


def test_runs_that_write_at_once_do_not_mix_within_a_line(path):
    results = []
    callers = [threading.Thread(target=lambda: results.append(small_run(path))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for result in results:
        assert AuditLog.load(path, result.run_id).replay() == result.standing()


def test_files_without_events_and_lists_of_several_runs_are_errors(path):
    path.touch()
    with pytest.raises(ValueError, match="has no events"):
        AuditLog.load(path)
    with pytest.raises(FileNotFoundError):
        AuditLog.load(path.with_name("missing"))
    with pytest.raises(ValueError, match=r"^events must be those of one run, got events of 2 runs\.$"):
        AuditLog([*small_run(path).events, *small_run(path).events])
    with pytest.raises(ValueError, match=r"^events must be those of one run, got events of 0 runs\.$"):
        AuditLog([])


def test_events_of_a_newer_version_are_kept(path):
    result = small_run(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    newer = {"event": "WorkflowMoved", "at": 1.5, "seq": len(lines), "run_id": result.run_id, "to": ["a", 1]}
    lines[0]["colour"] = "red"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, newer]))
    log = AuditLog.load(path)
    assert log.replay() == result.standing()
    assert log.events[0] == result.events[0]
    event = UnknownEvent(1.5, "WorkflowMoved", {"to": ["a", 1]}, seq=len(lines), run_id=result.run_id)
    assert log.events[-1] == event
    assert event_of(line_of(event).encode()) == event


# The file


def test_a_line_has_the_name_the_common_fields_and_its_own(path):
    result = small_run(path)
    first, *_, last = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(first) == ["event", "at", "seq", "run_id", "workflow", "task_count", "layer_count"]
    assert (first["event"], first["seq"], first["run_id"]) == ("WorkflowStarted", 0, result.run_id)
    assert (last["event"], last["seq"], last["succeeded"]) == ("WorkflowCompleted", len(result.events) - 1, True)


def test_the_file_is_for_its_owner_alone(path):
    small_run(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_values_of_any_type_come_back():
    for event in (
        WorkflowWorkerDied(1.5, 1, 2, None, None),
        WorkflowCompleted(0.1 + 0.2, False, 1, 2, seq=3, run_id="a"),
        WorkflowCancelled(-1e300, True, ("a", "b\n")),
        WorkflowTaskTimedOut(0.0, "%s", 1, 0, float("inf")),
    ):
        line = line_of(event)
        assert event_of(line.encode()) == event
        assert line == json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)})


def test_names_and_texts_of_any_kind_come_back(path):
    strange = 'a "b"\n\u2028\ud800é'

    def fail():
        raise ValueError(strange)

    wf = fp.Workflow(strange)
    wf.add(fp.task(fail).options(name=strange))
    standing = checked(run(wf, backend="inline", audit=path), path)
    assert standing.tasks[strange].error == f"ValueError: {strange}"


def test_what_was_told_is_in_the_file_while_the_run_goes_on(path):
    """Tasks of the second and third layer wait until the file tells of the layer, and of the failure, before them."""

    def wait_for(kind, n):
        wait_until(lambda: path.read_text().count(kind) == n, f"{n} lines of {kind}")

    waiting = fp.task(wait_for)
    wf = fp.Workflow()
    first = wf.add(fails_at, 1, 2)
    second = wf.add(waiting.options(after=first), "WorkflowTaskParallelCompleted", 1)
    wf.add(fp.task(fails_at).options(name="bad", after=first), 1, 1)
    wf.add(waiting.options(after=second), "WorkflowTaskFailed", 1)
    result = run(wf, workers=1, fail_fast=False, audit=path)
    assert result.status_counts() == {"completed": 3, "failed": 1}


@pytest.mark.parametrize("where", ["folder/run.jsonl", "."])
def test_a_file_that_cannot_be_written_is_an_error_before_anything_runs(tmp_path, where):
    wf = fp.Workflow()
    wf.add(lambda: (tmp_path / "ran").touch())
    with pytest.raises(ValueError, match=r"The audit log '.*' cannot be written \((No such|Is a)"):
        wf.run(backend="inline", audit=tmp_path / where)
    assert not (tmp_path / "ran").exists()


def test_a_batch_is_one_write(path, monkeypatch):
    written = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: written.append(data) or write(file, data))
    sink = JsonLines(path)
    sink.write([WorkflowStarted(0.0, "w", 2, 1, seq=0, run_id="a"), WorkflowCompleted(1.0, True, 2, 0, seq=1)])
    sink.close()
    assert len(written) == 1
    assert written[0].count(b"\n") == 2
