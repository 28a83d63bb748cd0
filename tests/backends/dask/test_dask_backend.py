"""The Dask backend: the contract on a real cluster, and what is peculiar to it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import types
import warnings

import numpy as np
import pytest
from conftest import wait_until

distributed = pytest.importorskip("distributed", reason="distributed is in the extra dask")

from daskcluster import cluster, restore_exceptions  # noqa: E402
from test_contract import Contract, add, fail, identity  # noqa: E402

import forgepar as fp  # noqa: E402
from forgepar.backends.dask import cluster as daskcluster  # noqa: E402
from forgepar.backends.dask import worker_site  # noqa: E402
from forgepar.backends.dask.slot_table import SlotTable  # noqa: E402
from forgepar.backends.dask.slots import SentBatch  # noqa: E402
from forgepar.backends.dask.values import ClusterArena  # noqa: E402
from forgepar.backends.worker_board import mark  # noqa: E402
from forgepar.cli.main import main  # noqa: E402
from forgepar.records import events  # noqa: E402

restore_exceptions()


@pytest.fixture(scope="module")
def address():
    with cluster() as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with distributed.Client(address, set_as_default=False) as client:
        yield client


@pytest.fixture(scope="module")
def executor(client):
    with fp.WorkflowExecutor(backend=fp.DaskBackend(client)) as executor:
        warm = fp.Workflow()
        warm.map(identity, [1, 2])
        executor.run(warm)
        yield executor


@pytest.fixture
def wf():
    return fp.Workflow("dask")


class TestDask(Contract):
    kind = "dask"
    begins = (*Contract.begins, "WorkflowWorkerJoined", "WorkflowWorkerJoined")


def wait_for(path):
    wait_until(path.exists, f"{path}")


def kinds(result, kind):
    return [event for event in result.events if isinstance(event, kind)]


def pids_of(executor):
    return {joined.slot: joined.pid for joined in executor._backend.joined()}


def wait_for_workers(executor):
    """Two workers have joined: a nanny starts one anew that was killed."""

    def are_there():
        executor._backend.wait(0.0)
        return len(executor._backend.joined()) == 2

    wait_until(are_there, "two workers")


# Values


def test_the_caller_sees_outputs_alone(executor, wf, monkeypatch):
    read = []
    monkeypatch.setattr(ClusterArena, "read", lambda self, segment: read.append(segment))
    arrays = wf.map(np.full, [100_000] * 6, range(6))
    level = wf.map(np.multiply, arrays, [2] * 6)
    texts = wf.map(lambda array: "x" * 5000, level)
    sums = wf.map(lambda array, text: float(array.sum()) + len(text), level, texts)
    result = executor.run(wf)
    assert result[sums] == [200_000.0 * i + 5000 for i in range(6)]
    assert read == []
    assert result.bytes.written > 12 * 800_000
    assert executor._backend.arena.bytes_held == 0


def test_values_are_freed_on_the_cluster(executor, client, wf):
    last = wf.map(np.sum, wf.map(np.full, [100_000] * 8, range(8)))
    executor.run(wf)
    executor.run(wf, outputs=[last[0]])

    def is_empty():
        held = client.run(lambda dask_worker: [key for key in dask_worker.data if "forgepar" in str(key)])
        return not any(held.values())

    wait_until(is_empty, "workers to let go of all values")


def test_large_constants_and_callables(executor, wf):
    table = np.arange(200_000)
    text = "constant" * 5000
    by_item = wf.map(np.sum, [table, table + 1])
    shared = wf.map(lambda i, table: int(table[i]) + len(text), range(50), table=table)
    result = executor.run(wf)
    assert [int(value) for value in result[by_item]] == [table.sum(), table.sum() + 200_000]
    assert result[shared] == [i + len(text) for i in range(50)]
    assert executor._backend.arena.names() == []


def test_a_value_stays_as_it_was_returned(executor, wf):
    def reuse(i, cache=np.zeros(50_000)):  # noqa: B008  (it is the point)
        cache[:] = i
        return cache

    made = wf.map(reuse, range(12))
    firsts = wf.map(lambda array: int(array[0]), made)
    assert executor.run(wf)[firsts] == list(range(12))


def test_parts_of_a_value_can_be_fetched_while_it_is_held(executor):
    arena = executor._backend.arena
    segment = arena.write([b"pickle", memoryview(b"buffer")])
    assert list(map(bytes, arena.read(segment))) == [b"pickle", b"buffer"]
    assert arena.usage().n_segments == 1
    arena.free(segment)
    assert arena.usage().n_segments == 0


# Workers that go


def test_what_a_killed_worker_held_is_computed_again(executor, wf):
    wait_for_workers(executor)
    pids = pids_of(executor)

    def kill(event):
        if isinstance(event, events.WorkflowTaskParallelCompleted) and event.layer_index == 1:
            os.kill(pids[0], signal.SIGKILL)

    arrays = wf.map(np.full, [50_000] * 8, range(8))
    level = wf.map(np.multiply, arrays, [2] * 8)
    pairs = [wf.add(add, level[i], level[(i + 1) % 8]) for i in range(8)]
    result = executor.run(wf, audit=kill)
    for i, pair in enumerate(pairs):
        np.testing.assert_array_equal(result[pair], np.full(50_000, 2 * (i + (i + 1) % 8)))
    assert [event.pid for event in kinds(result, events.WorkflowWorkerDied)] == [pids[0]]


def test_what_a_killed_worker_ran_is_run_again(executor, wf, tmp_path):
    wait_for_workers(executor)

    def die_once(i):
        if i == 7 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os._exit(3)
        return i

    level = wf.map(die_once, range(40))
    total = wf.add(sum, level)
    result = executor.run(wf)
    assert result[total] == sum(range(40))
    assert len(kinds(result, events.WorkflowWorkerDied)) == 1
    assert len(kinds(result, events.WorkflowWorkerJoined)) >= 2


def test_a_task_with_effects_runs_again_only_as_its_retries_say(executor, wf, tmp_path):
    wait_for_workers(executor)

    def die_once(folder):
        (folder / f"begun-{fp.context().attempt}").touch(exist_ok=False)
        if fp.context().attempt == 1:
            os._exit(3)
        return fp.context().attempt

    for retries in (0, 1):
        folder = tmp_path / str(retries)
        folder.mkdir()
        run = fp.Workflow()
        handle = run.add(fp.task(die_once).options(effects=True, retries=retries), folder)
        if retries:
            assert executor.run(run, rollback="none")[handle] == 2
        else:
            with pytest.raises(fp.WorkflowFailed) as caught:
                executor.run(run, rollback="none")
            assert isinstance(caught.value.exceptions[0], fp.WorkerDied)
        assert len(list(folder.iterdir())) == 1 + retries
    wait_for_workers(executor)


def test_a_run_does_not_wait_for_a_worker_that_takes_up_nothing(executor, client, wf, tmp_path):
    wait_for_workers(executor)

    def occupy(folder):
        (folder / "occupied").touch()
        wait_for(folder / "over")

    busy = client.submit(occupy, tmp_path, workers=[executor._backend.joined()[0].address], pure=False)
    wait_for(tmp_path / "occupied")
    try:
        level = wf.map(identity, range(40))
        result = executor.run(wf, timeout=60.0)
    finally:
        (tmp_path / "over").touch()
    assert result[level] == list(range(40))
    assert result.wall_seconds < 30.0
    assert not kinds(result, events.WorkflowDeadlockTimeout)
    assert not kinds(result, events.WorkflowWorkerDied)
    busy.result()


@pytest.mark.slow
def test_a_task_under_which_worker_after_worker_is_lost_fails_and_no_other(executor, wf):
    wait_for_workers(executor)
    wf.map(lambda i: os._exit(1) if i == 5 else i, range(12))
    with pytest.raises(fp.WorkflowFailed) as caught:
        executor.run(wf, fail_fast=False)
    (error,) = caught.value.exceptions
    assert isinstance(error, fp.WorkerDied)
    assert "while it ran task 'lambda-5'" in str(error)
    assert "tcp://127.0.0.1:" in str(error)
    assert caught.value.result.status_counts() == {"completed": 11, "failed": 1}
    # Three are its own; the first may be counted to the batch before, whose reply it took along.
    assert len(kinds(caught.value.result, events.WorkflowWorkerDied)) in (3, 4)
    wait_for_workers(executor)


def test_tasks_behind_a_slow_one_are_taken_back(executor, wf, tmp_path):
    def meet(i, there):
        if i == 10 and there:
            wait_for(tmp_path / "met")
        if i == 11 and there:
            (tmp_path / "met").touch()
        return i

    for _ in range(2):  # the first teaches that they are quick, so that the second's go out in large batches
        wf.map(meet, range(200), there=False)
    first = wf.map(meet, range(200), there=False)
    second = wf.map(meet, range(200), there=True)
    wf.add_dependency(second[0], after=first[-1])
    assert executor.run(wf)[second] == list(range(200))


# Time and ends


def test_a_timeout_fails_the_task_and_frees_the_slot_when_it_returns(executor, wf, tmp_path):
    def linger():
        wait_until(fp.context().cancelled, "the end of the task")
        (tmp_path / "returned").touch()

    wf.add(fp.task(linger).options(timeout=0.3))
    done = wf.map(identity, range(4))
    with pytest.raises(fp.WorkflowFailed) as caught:
        executor.run(wf, fail_fast=False)
    (error,) = caught.value.exceptions
    assert isinstance(error, fp.TaskTimeout)
    assert "its thread cannot be ended from outside" in str(error)
    assert "in wait_until" in "\n".join(error.__notes__)
    assert caught.value.result[done] == list(range(4))
    wait_for(tmp_path / "returned")
    wait_for_workers(executor)


@pytest.mark.slow
def test_a_restart_ends_what_dask_cannot(client, wf, tmp_path):
    def hang():
        (tmp_path / "pid").write_text(str(os.getpid()))
        threading.Event().wait()

    wf.add(fp.task(hang).options(timeout=0.3))
    with fp.WorkflowExecutor(backend=fp.DaskBackend(client, on_kill="restart")) as executor:
        with pytest.raises(fp.WorkflowFailed) as caught:
            executor.run(wf)
        assert isinstance(caught.value.exceptions[0], fp.TaskTimeout)
        assert "its worker was ended" in str(caught.value.exceptions[0])
        wait_for_workers(executor)
        assert int((tmp_path / "pid").read_text()) not in pids_of(executor).values()


def test_a_run_that_is_called_off(executor, wf, tmp_path):
    token = fp.CancellationToken()

    def stop(event):
        if isinstance(event, events.WorkflowTaskParallelStarted):
            threading.Thread(target=lambda: (wait_for(tmp_path / "runs"), token.cancel())).start()

    def go_on():
        (tmp_path / "runs").touch()
        wait_until(fp.context().cancelled, "the end of the run")
        return "told"

    running = wf.add(go_on)
    after = wf.add(identity, running)
    result = executor.run(wf, audit=stop, cancel=token, outputs="all")
    assert result.status == "cancelled"
    assert result[running] == "told"
    with pytest.raises(fp.MissingResult):
        result[after]
    again = fp.Workflow()
    calm = again.add(lambda: fp.context().cancelled())
    assert executor.run(again)[calm] is False


def test_an_executor_that_was_closed_runs_again(address):
    backend = fp.DaskBackend(address)
    for _ in range(2):
        with fp.WorkflowExecutor(backend=backend) as executor:
            wf = fp.Workflow()
            one = wf.add(add, 1, 2)
            assert executor.run(wf)[one] == 3


def test_an_interrupt_lets_go_of_the_cluster_until_the_next_run(executor, wf):
    def interrupt(event):
        if isinstance(event, events.WorkflowTaskParallelStarted):
            raise KeyboardInterrupt

    handles = wf.map(identity, range(4))
    with pytest.raises(KeyboardInterrupt):
        executor.run(wf, audit=interrupt)
    assert executor.run(wf)[handles] == list(range(4))


def test_a_run_that_takes_too_long_ends_without_what_does_not(executor, wf, tmp_path):
    wf.add(lambda: wait_for(tmp_path / "over"))
    with pytest.raises(fp.WorkflowFailed) as caught:
        executor.run(wf, timeout=0.5)
    error = caught.value.exceptions[0]
    assert isinstance(error, fp.RunTimeout)
    assert error.running == ["lambda"]
    assert "its slot gets no work until it returns" in error.__notes__[0]
    assert len(executor._backend.joined()) == 1
    (tmp_path / "over").touch()
    wait_for_workers(executor)


# What tasks say and ask


def test_what_tasks_print_log_and_warn_of_arrives(executor, wf, capsys, caplog):
    def speak(i):
        print(f"line {i}")  # noqa: T201
        print("no end", end="")  # noqa: T201
        fp.context().log.warning("logged %d", i)
        warnings.warn(f"warned {i}", UserWarning, stacklevel=1)
        return i

    wf.map(speak, range(2))
    with pytest.warns(UserWarning, match="warned") as told, caplog.at_level(logging.WARNING):
        executor.run(wf, show="tagged")
    out = capsys.readouterr().out
    assert sorted(out.splitlines()) == [f"[speak-{i}] {text}" for i in range(2) for text in (f"line {i}", "no end")]
    assert sorted(record.getMessage() for record in caplog.records if record.name.endswith(".dask")) == [
        "logged 0",
        "logged 1",
    ]
    assert sorted(str(warning.message) for warning in told) == ["warned 0", "warned 1"]


def test_a_task_knows_its_context(executor, wf):
    def tell():
        context = fp.context()
        (context.scratch / "file").write_text("x")
        return context.task, context.layer, context.attempt, context.worker, context.rng().integers(1 << 30)

    told = [wf.add(tell), wf.add(tell)]
    result = executor.run(wf, seed=7)
    local = wf.run(backend="inline", seed=7)
    for handle, name in zip(told, ("tell", "tell-1"), strict=True):
        task, layer, attempt, worker, number = result[handle]
        assert (task, layer, attempt) == (name, 0, 1)
        assert worker == result.record(handle).worker
        assert number == local[handle][4]


def test_a_run_in_a_task_is_inline(executor, wf):
    def nested():
        inner = fp.Workflow()
        one = inner.add(add, 1, 1)
        return inner.run()[one]

    handle = wf.add(nested)
    assert executor.run(wf)[handle] == 2


def test_errors_and_results_tell_the_address(executor, wf, address):
    wf.add(fail, "no")
    with pytest.raises(fp.WorkflowFailed) as caught:
        executor.run(wf)
    result = caught.value.result
    joined = kinds(result, events.WorkflowWorkerJoined)
    assert {event.worker: event.address for event in joined} == result.addresses
    where = result.addresses[result.record("fail").worker]
    assert f"({where}, pid " in "\n".join(caught.value.exceptions[0].__notes__)


# Threads


@pytest.mark.slow
def test_a_worker_of_several_threads_is_several_slots(wf, capsys, tmp_path):
    def meet(i, barrier_of):
        (barrier_of / str(i)).touch()
        wait_until(lambda: len(list(barrier_of.iterdir())) == 2, "the other")
        print(f"met {i}")  # noqa: T201
        return fp.context().task

    with cluster(1, threads=2) as address:
        names = wf.map(meet, range(2), barrier_of=tmp_path)
        level = wf.map(identity, range(500))
        for _ in range(5):
            level = wf.map(add, level, [1] * 500)
        with fp.WorkflowExecutor(backend=fp.DaskBackend(address)) as executor:
            assert executor.workers == 2
            result = executor.run(wf, show="tagged")
        assert result[names] == ["meet-0", "meet-1"]
        assert result[level] == [i + 5 for i in range(500)]
        assert len(set(result.addresses.values())) == 1
    assert sorted(capsys.readouterr().out.splitlines()) == ["[meet-0] met 0", "[meet-1] met 1"]


# What cannot be


def test_no_scheduler(monkeypatch):
    monkeypatch.setattr(daskcluster, "_CONNECT_SECONDS", 0.3)
    with pytest.raises(fp.WorkerStartFailed, match=r"No Dask scheduler answers at 'tcp://127\.0\.0\.1:9'"):
        fp.DaskBackend("tcp://127.0.0.1:9")


@pytest.mark.slow
def test_no_worker(wf):
    wf.add(identity, 1)
    with cluster(0) as address:
        with pytest.raises(fp.WorkerStartFailed, match=r"has no worker\. Start some, or pass n_slots="):
            fp.DaskBackend(address)
        backend = fp.DaskBackend(address, n_slots=2, patience=0.2)
        with pytest.raises(fp.WorkerStartFailed, match=r"has had no worker for 0\.2 s"):
            wf.run(backend=backend)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (ModuleNotFoundError("No module named 'forgepar'"), "has no forgepar, or cannot import it"),
        (OSError("lost"), "fails when it is probed (OSError: lost)"),
        (("0.0.0", "3.11.1", 1), "has forgepar 0.0.0 and Python 3.11.1"),
    ],
)
def test_workers_that_cannot_take_work_are_named(answer, fault):
    assert fault in daskcluster._fault_of(answer)


def test_without_distributed_an_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"pip install 'forgepar\[dask\]'"):
        fp.DaskBackend("tcp://127.0.0.1:9")
    for where in ("local", "tcp://127.0.0.1:9"):
        assert main(["run", "forgepar.examples.tree", "--dask", where]) == 2
        assert "pip install 'forgepar[dask]'" in capsys.readouterr().err


@pytest.mark.parametrize("given", [7, None])
def test_what_is_no_cluster(given):
    with pytest.raises(ValueError, match=r"client must be a distributed\.Client"):
        fp.DaskBackend(given)


@pytest.mark.parametrize("wrong", [{"n_slots": 0}, {"on_kill": "ask"}])
def test_wrong_arguments(client, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        fp.DaskBackend(client, **wrong)


def test_a_run_is_taken_up_from_a_store_on_either_side(executor, wf, tmp_path):
    def load(i):
        return np.full(100_000, float(i))

    parts = wf.map(lambda array: float(array.sum()), wf.map(load, range(4)))
    total = wf.add(sum, parts)
    store = tmp_path / "runs.db"
    assert executor.run(wf, store=store)[total] == 600_000.0
    again = executor.run(wf, store=store, resume=fp.Resume(rerun="lambda-*"))  # takes large values from the store
    assert (again[total], again.status_counts()) == (600_000.0, {"completed": 4, "cached": 5})
    here = wf.run(workers=2, store=store, resume=fp.Resume(start_from="load-3"))
    assert (here[total], here.status_counts()) == (600_000.0, {"completed": 3, "cached": 6})
    assert executor.run(wf, store=store, resume=True).status_counts() == {"cached": 9}


def test_arguments_of_local_workers_are_refused(client):
    with pytest.raises(ValueError, match="for workers that forgepar starts, and the backend 'dask' has its own"):
        fp.WorkflowExecutor(2, backend=fp.DaskBackend(client))


def test_memory_is_said_not_to_be_watched(executor, wf):
    handle = wf.add(fp.task(identity).options(memory="1GiB"), 1)
    with pytest.warns(UserWarning, match="memory= of tasks is not watched by the backend 'dask'"):
        assert executor.run(wf)[handle] == 1


def test_the_command_line(address, capsys):
    assert main(["run", "forgepar.examples.tree", "--dask", address]) == 0
    on_dask = capsys.readouterr().out
    assert main(["run", "forgepar.examples.tree", "--backend", "inline"]) == 0
    assert on_dask == capsys.readouterr().out


@pytest.mark.slow
def test_the_command_line_makes_a_cluster(capsys):
    pytest.importorskip("cryptography")
    assert main(["run", "forgepar.examples.tree", "--dask", "local", "--workers", "2"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_cluster_that_cannot_be_secured_is_not_made(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert main(["run", "forgepar.examples.tree", "--dask", "local", "--workers", "1"]) == 2
    assert "secured by TLS, which needs cryptography: pip install 'forgepar[dask]'" in capsys.readouterr().err


# Clocks


def test_a_clock_of_the_same_machine_is_taken_as_it_is():
    clock = daskcluster.ClockOffset()
    assert clock.offset == 0.0
    clock.add_sent(10.0, 10.01)
    clock.add_received(10.03, 10.02)
    assert clock.offset == 0.0


def test_a_clock_of_another_machine_is_known_between_bounds():
    clock = daskcluster.ClockOffset()
    clock.add_sent(109.0, 9.0)
    clock.add_received(110.0, 9.0)
    assert clock.offset == 100.5
    assert list(memoryview(clock.as_here(np.array([9.0, 10.0]).tobytes())).cast("d")) == [109.5, 110.5]


def test_clocks_that_drift_follow_the_newest_bound():
    clock = daskcluster.ClockOffset()
    clock.add_sent(100.0, 0.0)
    clock.add_received(101.0, 0.0)
    clock.add_received(190.0, 100.0)
    assert clock.offset == 90.0


def test_a_caller_has_one_site_on_a_worker_as_long_as_it_is_in_use(monkeypatch):
    """Two would not know what runs on each other: each would bar, as not begun, what the other is at."""
    monkeypatch.setattr(worker_site, "_MOST_SITES", 1)
    monkeypatch.setattr(worker_site, "_sites", {})
    worker = types.SimpleNamespace(address="tcp://somewhere")
    with worker_site._site(worker, "mine") as site:
        for n in range(3):
            worker_site.run_commands(f"another's-{n}", [], worker)
        with worker_site._site(worker, "mine") as found:
            assert found is site
    worker_site.run_commands("another's", [], worker)
    assert [token for _, token in worker_site._sites] == ["another's"]


def nest(folder, i):
    """Run a workflow within one task while another, in a thread beside it, asks who it is."""
    if i == 0:
        inner = fp.Workflow()
        inner.add(wait_for, folder / "asked")
        (folder / "nested").touch()
        inner.run(backend="inline")
        return fp.context().task
    wait_for(folder / "nested")
    name = fp.context().task
    (folder / "asked").touch()
    return name


def test_a_task_that_runs_a_workflow_is_not_taken_for_the_one_beside_it(wf, tmp_path):
    with cluster(1, 2) as address, fp.WorkflowExecutor(backend=fp.DaskBackend(address)) as executor:
        handles = wf.map(nest, [tmp_path] * 2, range(2))
        assert executor.run(wf)[handles] == ["nest-0", "nest-1"]


def test_a_batch_answered_before_an_earlier_one_is_not_lost_with_its_future():
    """It is released once it is answered, which Dask tells as its being cancelled."""
    table = SlotTable(1, None, None, restarts=False)
    slot = table.slots[0]
    slot.worker = daskcluster.ClusterWorker("tcp://somewhere", 1, 1)
    futures = [types.SimpleNamespace(status=status) for status in ("pending", "cancelled")]
    slot.sent.extend(SentBatch(batch, future, 0.0) for batch, future in enumerate(futures, 1))
    slot.answers[2] = []
    assert table.take(daskcluster.DaskTaskFailed(futures[1])) == []
    assert slot.loss is None
    assert slot.waits_for(futures[0])


def test_a_batch_answered_before_an_earlier_one_is_not_handed_out_again():
    """A worker of several threads may begin and end it first: a slot that was limited had come as far as that."""
    table = SlotTable(1, None, None, restarts=False)
    slot = table.slots[0]
    slot.worker, slot.n_limits = daskcluster.ClusterWorker("tcp://somewhere", 1, 1), 1
    table.workers["tcp://somewhere"] = slot.worker
    slot.sent.extend(SentBatch(batch, None, 0.0) for batch in (4, 5))
    slot.answers[5] = []
    table.take(daskcluster.SiteMessage("limited", (0, 1, 0), "tcp://somewhere", 0.0, 0.0))
    assert slot.farthest >= mark(5, 0)
