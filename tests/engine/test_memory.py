"""Memory: what is admitted at once, what is ended for taking more, and what happens while there is none to be had."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
from conftest import wait_until

import forgepar as fp
from forgepar.backends.base import Traits
from forgepar.backends.worker_board import mark
from forgepar.engine import memory as memory_module
from forgepar.engine.memory import LEAST_SHARE, Memory, MemoryMonitor
from forgepar.machine import available_memory
from forgepar.records.events import WorkflowMemoryLow, WorkflowTaskMemoryExceeded

MIB = 1 << 20


def touch_bytes(n):
    """Take memory, and have it for as long as this runs."""
    taken = bytearray(n)
    for at in range(0, n, 4096):
        taken[at] = 1
    return taken


def take_and_hang(n):
    taken = touch_bytes(n)
    threading.Event().wait()
    return taken


def failure_of(wf, **rules) -> fp.WorkflowFailed:
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(**rules)
    return caught.value


# What is declared


@pytest.mark.parametrize("memory", [0, -1, "much", "0", 1.5, True])
def test_what_cannot_be_declared_is_refused(memory):
    with pytest.raises(fp.WorkflowError, match="memory must be a number of bytes of at least 1"):
        fp.task(abs).options(memory=memory)


def test_sizes_are_bytes_or_text():
    assert fp.task(abs).options(memory="2GiB").task_options.memory == 2 << 30
    assert fp.task(abs).options(memory=10).task_options.memory == 10


def test_what_can_never_be_had_is_refused_before_anything_runs(any_backend, tmp_path):
    wf = fp.Workflow()
    first = wf.add((tmp_path / "ran").touch)
    wf.add(fp.task(abs).options(name="huge", memory="900TiB", after=first), 1)
    with pytest.raises(fp.InsufficientMemory, match=r"task 'huge' declares memory=900\.0 TiB, but only") as caught:
        wf.run(**any_backend)
    assert (caught.value.task, caught.value.needed) == ("huge", 900 << 40)
    assert 0 < caught.value.available < 900 << 40
    assert not (tmp_path / "ran").exists()


# What runs at once


def overlapping(folder, name, memory):
    """Say how much the tasks that ran beside this one declared, itself included, at most."""
    mine = folder / f"{name}-{memory}"
    mine.touch()
    most = 0
    for _ in range(40):
        most = max(most, sum(int(path.name.rpartition("-")[2]) for path in folder.iterdir()))
        time.sleep(0.001)  # to be there for others to see; nothing depends on how long
    mine.unlink()
    return most


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_tasks_at_once_never_declare_more_than_there_is(tmp_path, monkeypatch, schedule):
    there_is = 100 * MIB
    monkeypatch.setattr(memory_module, "available_memory", lambda: there_is)
    monkeypatch.setattr(memory_module, "total_memory", lambda: there_is)
    wf = fp.Workflow()
    handles = []
    for number, memory in enumerate([60, 60, 60, 30, 30, 30, 100, 100, 20, 20]):
        one = fp.task(overlapping).options(memory=memory * MIB)
        handles.append(wf.add(one, tmp_path, number, memory * MIB))
    free = wf.map(abs, range(-50, 0))
    result = wf.run(workers=4, outputs="all", schedule=schedule)
    assert max(result[handles]) <= there_is
    assert result[free] == list(range(50, 0, -1))


def test_others_run_while_a_large_one_waits(tmp_path, monkeypatch):
    def hold(started, done):
        started.touch()
        wait_until(done.exists, "the task that declares nothing")

    def small(started, done):
        wait_until(started.exists, "the large one to start")
        done.touch()

    monkeypatch.setattr(memory_module, "available_memory", lambda: 100 * MIB)
    monkeypatch.setattr(memory_module, "total_memory", lambda: 100 * MIB)
    wf = fp.Workflow()
    large = fp.task(hold).options(memory=80 * MIB)
    for _ in range(2):  # the second waits for the first, which waits for what comes after both
        wf.add(large, tmp_path / "started", tmp_path / "done")
    wf.add(small, tmp_path / "started", tmp_path / "done")
    assert wf.run(workers=2).ok


def test_tasks_that_declare_all_of_it_run_one_by_one(monkeypatch):
    monkeypatch.setattr(memory_module, "available_memory", lambda: 100 * MIB)
    monkeypatch.setattr(memory_module, "total_memory", lambda: 100 * MIB)
    wf = fp.Workflow()
    handles = wf.map(
        fp.task(lambda i: (i, time.perf_counter(), time.perf_counter())).options(memory=100 * MIB), range(50)
    )
    result = wf.run(workers=3)
    spans = sorted((start, end) for _, start, end in result[handles])
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


# What takes more


@pytest.mark.parametrize("start_method", ["forkserver", "spawn", "fork"])
def test_a_task_that_takes_more_is_ended_and_no_other(start_method, tmp_path):
    def until_over(path):
        wait_until(path.exists, "the other's end")
        return "done"

    def try_twice(path, started):
        if started.exists():
            path.touch()
            return
        started.touch()
        take_and_hang(300 * MIB)

    wf = fp.Workflow()
    other = wf.add(until_over, tmp_path / "over")
    wf.add(
        fp.task(try_twice).options(name="greedy", memory=150 * MIB, retries=1), tmp_path / "over", tmp_path / "started"
    )
    result = wf.run(workers=2, start_method=start_method, outputs="all")
    assert result[other] == "done"
    assert result.record(other).attempt == 1
    (event,) = [event for event in result.events if isinstance(event, WorkflowTaskMemoryExceeded)]
    assert (event.task, event.attempt, event.limit) == ("greedy", 1, 150 * MIB)
    assert event.used > event.limit


def test_the_error_has_the_figures():
    wf = fp.Workflow()
    wf.add(fp.task(take_and_hang).options(memory="120MiB"), 300 * MIB)
    (error,) = failure_of(wf, workers=1).exceptions
    assert isinstance(error, fp.TaskMemoryExceeded)
    assert error.limit == 120 * MIB
    assert error.limit < error.used < 400 * MIB
    assert "more than the 120.0 MiB that it declares" in str(error)


def test_what_it_started_counts_and_is_ended(tmp_path):
    def with_child(path):
        code = (
            f"x = bytearray({300 * MIB})\nfor at in range(0, len(x), 4096): x[at] = 1\n"
            f"open({str(path)!r}, 'w').close()\nimport signal; signal.pause()"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    wf = fp.Workflow()
    wf.add(fp.task(with_child).options(memory=200 * MIB), tmp_path / "ready")
    (error,) = failure_of(wf, workers=1).exceptions
    assert isinstance(error, fp.TaskMemoryExceeded)


def test_shared_inputs_do_not_count():
    import numpy as np

    def made():
        return np.ones(200 * MIB // 8)

    wf = fp.Workflow()
    array = wf.add(made)
    totals = [wf.add(fp.task(lambda array: (float(array.sum()), time.sleep(0.1))[0]).options(memory=150 * MIB), array)]
    assert wf.run(workers=1)[totals] == [float(200 * MIB // 8)]


def test_what_an_earlier_task_left_behind_is_not_the_next_one_s():
    def leave(n):
        import builtins

        builtins.left = touch_bytes(n)

    def modest():
        time.sleep(0.2)  # long enough to be looked at
        return "done"

    wf = fp.Workflow()
    first = wf.add(leave, 300 * MIB)
    second = wf.add(fp.task(modest).options(memory=200 * MIB, after=first))
    result = wf.run(workers=1)
    assert result[second] == "done"
    assert result.record(second).attempt == 1


# Looking, with a backend that tells what a test puts in


class Slots:
    traits = Traits()

    def __init__(self):
        self.at = 0

    def position(self, _):
        return self.at

    def n_given(self, _):
        return 1


def memory_of(*needs, available=1000):
    wf = fp.Workflow()
    for number, need in enumerate(needs):
        wf.add(fp.task(abs).options(name=f"t{number}", memory=need), number)
    slots = Slots()
    guard = MemoryMonitor()
    memory = Memory(wf.plan(), slots, guard)
    memory._available = available
    return memory, slots


def flight(number, template, tasks=(0,)):
    return SimpleNamespace(id=number, template=template, tasks=tasks)


def test_tasks_of_one_slot_count_once():
    memory, _ = memory_of(600, 500, None)
    assert memory.fits(0, 0, [[], []])
    assert memory.fits(0, 0, [[flight(1, 1)], []])
    assert not memory.fits(0, 0, [[], [flight(1, 1)]])
    assert memory.fits(0, 2, [[], [flight(1, 0), flight(2, 1)]])


def test_what_fits_exactly_is_admitted_and_a_byte_more_is_not():
    memory, _ = memory_of(600, 400, 401)
    busy = [[flight(1, 0)], [], []]
    assert memory.fits(1, 1, busy)
    assert not memory.fits(1, 2, busy)
    assert memory.fits(0, 2, busy)  # after the other one
    assert not memory.fits(2, 1, [[flight(1, 0)], [flight(2, 1)], []])


@pytest.mark.parametrize(("need", "is_refused"), [(1000, False), (1001, True)])
def test_what_a_task_may_declare_is_what_is_available(monkeypatch, need, is_refused):
    monkeypatch.setattr(memory_module, "available_memory", lambda: 1000)
    wf = fp.Workflow()
    wf.add(fp.task(abs).options(name="small", memory=7), 1)
    wf.add(fp.task(abs).options(name="large", memory=need), 1)
    if is_refused:
        with pytest.raises(fp.InsufficientMemory) as caught:
            Memory(wf.plan(), Slots(), MemoryMonitor())
        assert (caught.value.task, caught.value.needed, caught.value.available) == ("large", need, 1000)
    else:
        assert Memory(wf.plan(), Slots(), MemoryMonitor()).is_declared


def test_where_tasks_are_not_watched_none_is_ended():
    memory, _ = memory_of(600)
    memory._watches = False
    assert memory.next_look([[flight(1, 0)]]) == math.inf
    assert memory.fits(0, 0, [[]])


def test_only_slots_whose_task_has_a_limit_are_looked_at(monkeypatch):
    memory, slots = memory_of(600, None)
    slots.at, asked = mark(3, 1), []
    monkeypatch.setattr(memory, "_of_tree", lambda slot, pid, look: asked.append((slot, pid, look)) or 601)
    flights = [[flight(1, 1)], [], [flight(3, 0, (1, 0))], [flight(4, 0)]]
    found = memory.exceeding(flights, [11, 12, 13, 0], 50.0)
    assert asked == [(2, 13, True)]
    assert [(slot, task, error.used, error.limit) for slot, task, error in found] == [(2, 0, 601, 600)]


def test_memory_up_to_the_limit_is_no_fault(monkeypatch):
    memory, slots = memory_of(600)
    slots.at = mark(1, 0)
    monkeypatch.setattr(memory, "_of_tree", lambda slot, pid, look: 600)
    assert memory.exceeding([[flight(1, 0)]], [1], 50.0) == []


def test_looks_are_some_time_apart_and_those_at_trees_more(monkeypatch):
    memory, slots = memory_of(600)
    slots.at, clock, looks = mark(1, 0), [100.0], []
    monkeypatch.setattr(memory_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def of_tree(slot, pid, look):
        looks.append(look)
        clock[0] += 0.5 if look else 0.0  # to measure a tree takes half a second here
        return 0

    monkeypatch.setattr(memory, "_of_tree", of_tree)
    flights = [[flight(1, 0)]]

    def look(at):
        clock[0] = at
        memory.exceeding(flights, [1], at)

    look(100.0)
    assert memory.next_look(flights) == pytest.approx(100.02)
    look(100.019)
    assert looks == [True]
    look(100.021)
    look(110.4)  # 100.5 and twenty times 0.5
    assert looks == [True, False, False]
    look(110.6)
    assert looks[3:] == [True]


def test_what_an_idle_worker_has_is_not_its_tasks_and_children_are(monkeypatch):
    memory, _ = memory_of(600, None)
    own, children = [100], [SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=70, shared=30)) for _ in range(2)]
    monkeypatch.setattr(memory, "_of_process", lambda slot, pid: own[0])
    memory.weigh_idle(2, 11, 1)  # of a template without a limit
    assert memory._idle == {}
    memory.weigh_idle(2, 11, 0)
    own[0] = 130
    memory._processes[2] = SimpleNamespace(children=lambda recursive: children if recursive else [])
    assert memory._of_tree(2, 11, look=False) == 30
    assert memory._of_tree(2, 11, look=True) == 30 + 2 * 40
    assert memory._of_tree(2, 11, look=False) == 30 + 2 * 40  # the children that were found before


def test_a_worker_that_took_the_place_of_another_is_measured_itself(monkeypatch):
    import psutil

    memory, _ = memory_of(600)
    made = []

    class Process:
        def __init__(self, pid):
            self.pid = pid
            made.append(pid)

        def memory_info(self):
            if self.pid == 9:
                raise psutil.NoSuchProcess(9)
            return SimpleNamespace(rss=self.pid * 10, shared=3)

    monkeypatch.setattr(psutil, "Process", Process)
    memory._trees[1] = ["a child of the first"]
    assert memory._of_process(1, 5) == 47
    assert memory._trees == {}
    memory._trees[1] = ["a child"]
    assert memory._of_process(1, 5) == 47
    assert memory._trees == {1: ["a child"]}
    assert memory._of_process(1, 7) == 67
    assert memory._of_process(1, 9) == 0
    assert made == [5, 7, 9]


def test_scarcity_is_looked_at_a_tenth_of_a_second_apart(monkeypatch):
    available, guard = [0], MemoryMonitor()
    monkeypatch.setattr(memory_module, "available_memory", lambda: available[0])
    guard.__dict__["total"] = 1000
    assert guard.is_scarce(10.0)
    available[0] = 50
    assert guard.is_scarce(10.09)
    assert guard.look_at == pytest.approx(10.1)
    assert not guard.is_scarce(10.11)  # a twentieth is enough
    available[0] = 49
    assert guard.is_scarce(10.22)


def test_nothing_is_looked_at_where_nothing_is_declared():
    memory, _ = memory_of(None)
    assert not memory.is_declared
    assert memory.next_look([[flight(1, 0)]]) == math.inf


def test_a_task_that_began_meanwhile_is_not_blamed(monkeypatch):
    memory, slots = memory_of(600)
    slots.at = mark(1, 0)
    monkeypatch.setattr(memory, "_of_tree", lambda slot, pid, look: setattr(slots, "at", mark(1, 1)) or 10_000)
    assert memory.exceeding([[flight(1, 0, (0, 1))]], [1], 100.0) == []
    slots.at = mark(1, 0)
    monkeypatch.setattr(memory, "_of_tree", lambda slot, pid, look: 10_000)
    assert [found[:2] for found in memory.exceeding([[flight(1, 0, (0, 1))]], [1], 200.0)] == [(0, 0)]


# The guard


def test_while_memory_is_low_nothing_is_handed_out_and_it_says_so(monkeypatch):
    """Memory is low until the guard has looked some times; tasks run one at a time until then, and all are done."""
    looks = []

    def available():
        looks.append(None)
        return 0 if len(looks) < 5 else 1 << 40

    monkeypatch.setattr(memory_module, "available_memory", available)
    monkeypatch.setattr(memory_module, "_MONITOR_SECONDS", 0.005)
    wf = fp.Workflow()
    handles = wf.map(lambda i: time.sleep(0.003) or i, range(60))
    result = wf.run(workers=2)
    assert result[handles] == list(range(60))
    (event,) = [event for event in result.events if isinstance(event, WorkflowMemoryLow)]
    assert event.total > 0
    assert len(looks) >= 5


def test_a_twentieth_is_the_least(monkeypatch):
    guard = MemoryMonitor()
    for share, scarce in ((LEAST_SHARE * 0.9, True), (LEAST_SHARE * 1.1, False)):
        monkeypatch.setattr(memory_module, "available_memory", lambda share=share: int(guard.total * share))
        assert guard.is_scarce(guard.look_at + 1) is scarce


def test_what_undoes_tasks_declares_no_memory(tmp_path):
    """Two compensations do not fit beside each other by what their tasks declare; they run nevertheless."""
    most = available_memory() * 6 // 10

    def undo(value):
        (tmp_path / f"undone-{value}").touch()

    def fail(_values):
        raise ValueError("no")

    wf = fp.Workflow()
    made = [wf.add(fp.task(abs).options(name=f"t{i}", memory=most, compensate=undo), i) for i in range(2)]
    wf.add(fail, made)
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(workers=2)
    assert sorted(caught.value.result.rollback.compensated) == ["t0", "t1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["undone-0", "undone-1"]
