"""What the original engine promised, row by row, over real processes."""

from __future__ import annotations

import os
import threading

import pytest
from conftest import wait_until

import forgepar as fp
from forgepar.records import events as kinds


def of(result, kind):
    return [event for event in result.events if isinstance(event, kind)]


def test_execution_layers_are_by_longest_path_and_empty_and_cyclic_are_errors():
    wf = fp.Workflow()
    with pytest.raises(fp.EmptyWorkflow):
        wf.execution_layers()
    a = wf.add(fp.task(abs).options(name="a"), -1)
    b = wf.add(fp.task(abs).options(name="b"), a)
    c = wf.add(fp.task(max).options(name="c"), a, b)  # the longest path to it is two long, the shortest one
    assert wf.execution_layers() == [["a"], ["b"], ["c"]]
    assert wf.run(workers=2)[c] == 1
    wf.add_dependency(a, after=c)
    with pytest.raises(fp.CyclicWorkflow) as caught:
        wf.run(workers=2)
    assert set(caught.value.cycle) == {"a", "b", "c"}


def test_execute_parallel_runs_all_of_a_layer_and_waits_for_all_before_the_next(tmp_path):
    def meet(i):
        (tmp_path / f"here-{i}").touch()
        wait_until(lambda: all((tmp_path / f"here-{j}").exists() for j in range(3)), "all of the layer at once")
        (tmp_path / f"done-{i}").touch()
        return os.getpid()

    def count(_):
        return len(list(tmp_path.glob("done-*")))

    wf = fp.Workflow()
    met = wf.map(meet, range(3))
    counted = wf.map(count, met)
    result = wf.run(workers=3, outputs="all")
    assert len(set(result[met])) == 3
    assert result[counted] == [3, 3, 3]


def test_audit_events_tell_a_layers_start_and_end_with_its_index_and_task_count(tmp_path):
    wf = fp.Workflow("told")
    wf.map(abs, wf.map(abs, range(4)))
    result = wf.run(workers=2, audit=tmp_path / "run.jsonl")
    started, ended = of(result, kinds.WorkflowTaskParallelStarted), of(result, kinds.WorkflowTaskParallelCompleted)
    assert [(e.layer_index, e.task_count) for e in started] == [(0, 4), (1, 4)]
    assert [(e.layer_index, e.task_count) for e in ended] == [(0, 4), (1, 4)]
    assert started[0].seq < ended[0].seq < started[1].seq < ended[1].seq
    log = fp.AuditLog.load(tmp_path / "run.jsonl")
    assert list(log.events) == list(result.events)
    assert log.replay() == result.standing()


def test_fail_fast_then_rollback_of_what_had_completed(tmp_path):
    def write(i):
        (tmp_path / f"file-{i}").touch()
        return tmp_path / f"file-{i}"

    def fail(paths):
        raise ValueError(f"{len(paths)} files are not wanted")

    wf = fp.Workflow()
    written = wf.map(fp.task(write).options(compensate=os.unlink, effects=True), range(5))
    wf.map(abs, [wf.add(fail, written)])
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(workers=2)
    result = caught.value.result
    assert list(tmp_path.iterdir()) == []
    assert len(result.rollback.compensated) == 5
    assert result.status_counts() == {"failed": 1, "cancelled": 1, "compensated": 5}
    assert len(of(result, kinds.WorkflowTaskRolledBack)) == 5
    assert len(of(result, kinds.WorkflowRolledBack)) == 1


def test_cancellation_is_checked_between_layers(tmp_path):
    token = fp.CancellationToken()

    def wait(i):
        (tmp_path / str(i)).touch()
        wait_until(fp.context().cancelled, "the token")
        return i

    wf = fp.Workflow()
    first = wf.map(wait, range(2))
    wf.map(abs, first)
    canceller = threading.Thread(
        target=lambda: (wait_until(lambda: len(list(tmp_path.iterdir())) == 2, "the layer"), token.cancel())
    )
    canceller.start()
    result = wf.run(workers=2, cancel=token, outputs="all")
    canceller.join()
    assert result.status == "cancelled"
    assert result[first] == [0, 1]
    assert result.status_counts() == {"completed": 2, "cancelled": 2}
    assert len(of(result, kinds.WorkflowCancelled)) == 1


def test_parallel_tasks_are_several_tasks_as_one_concurrently_and_fail_fast(tmp_path):
    def meet(mine, other):
        (tmp_path / mine).touch()
        wait_until((tmp_path / other).exists, "the other task, beside this one")
        if mine == "b":
            raise ValueError("b fails")

    wf = fp.Workflow()
    both = fp.ParallelTasks([(meet, "a", "b"), (meet, "b", "a")]).add_to(wf)
    after = wf.add(fp.task(abs).options(after=both), 1)
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(workers=2)
    assert [str(error) for error in caught.value.exceptions] == ["b fails"]
    assert caught.value.result.record(after).status == "cancelled"


def test_a_task_context_is_there_in_each_task():
    def told(_):
        here = fp.context()
        return here.run_id, here.task, here.layer, here.attempt, here.worker, here.seed, here.run.n_tasks

    wf = fp.Workflow()
    handles = wf.map(told, range(20))
    result = wf.run(workers=2, seed=9)
    for i, (run_id, task, layer, attempt, worker, seed, n_tasks) in enumerate(result[handles]):
        assert (run_id, task, layer, attempt, seed, n_tasks) == (result.run_id, f"told-{i}", 0, 1, 9, 20)
        assert worker == result.record(task).worker


def test_concurrent_state_is_a_consistent_snapshot_while_tasks_run(tmp_path):
    def wait(i):
        (tmp_path / str(i)).touch()
        wait_until((tmp_path / "go").exists, "the snapshot")

    states = []

    def look():
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2, "both to run")
        states.append(executor.state)
        (tmp_path / "go").touch()

    wf = fp.Workflow()
    wf.map(abs, wf.map(wait, range(2)))
    with fp.WorkflowExecutor(workers=2) as executor:
        looker = threading.Thread(target=look)
        looker.start()
        with pytest.raises(fp.WorkflowFailed):  # abs(None)
            executor.run(wf)
        looker.join()
    (state,) = states
    assert dict(state.counts) == {"pending": 2, "running": 2}
    assert {task.task for task in state.running} == {"wait-0", "wait-1"}
    assert (state.layer, state.n_layers) == (0, 2)


def test_deadlock_detection_is_cycles_before_a_timeout_per_layer_during_and_warnings():
    def hang():
        threading.Event().wait()

    wf = fp.Workflow()
    wf.add(fp.task(hang).options(name="stuck"))
    assert "no timeout" in [finding.kind for finding in wf.check(workers=1, layer_timeout=1.0)]
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(workers=1, layer_timeout=1.0)
    (error,) = caught.value.exceptions
    assert isinstance(error, fp.RunTimeout)
    assert error.running == ["stuck"]
    assert "in hang" in error.stacks["stuck"]
    result = caught.value.result
    (checked,) = of(result, kinds.WorkflowDeadlockCheck)
    assert (checked.task_count, checked.cycle) == (1, ())
    (timed_out,) = of(result, kinds.WorkflowDeadlockTimeout)
    assert (timed_out.layer_index, timed_out.running) == (0, ("stuck",))
    again = fp.Workflow()
    a, b = again.add(abs, 1), again.add(abs, 2)
    again.add_dependency(a, after=b)
    again.add_dependency(b, after=a)
    assert [finding.kind for finding in again.check()] == ["cycle"]


def test_tool_execution_registry_and_fallback_handlers(tmp_path):
    (tmp_path / "in.txt").write_text("b\na\n")
    tools = fp.ToolRegistry()
    tools.add("sort", env={"LC_ALL": "C"})
    tools.add("no-such-sort")
    assert tools.missing() == ["no-such-sort"]
    wf = fp.Workflow()
    ordered = wf.add(tools.shell("sort {path}", path=tmp_path / "in.txt"))

    def instead(error):
        return f"{type(error).__name__}: {error.program}"

    fallen = wf.add(fp.task(tools.shell("no-such-sort {path}")).options(fallback=instead), path=tmp_path / "in.txt")
    given = wf.add(fp.task(fp.shell("sort {path}", path=tmp_path / "not there")).options(fallback=None))
    result = wf.run(workers=2)
    assert result[ordered].stdout == "a\nb\n"
    assert result[fallen] == "ToolNotFound: no-such-sort"
    assert result[given] is None
    fell = of(result, kinds.WorkflowToolFallback)
    assert sorted(event.error.split(":")[0] for event in fell) == ["ToolFailed", "ToolNotFound"]
