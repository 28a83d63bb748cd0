"""What travels, and that both sides agree on what a worker holds."""

from __future__ import annotations

import functools
import pickle
import socket
import tempfile
import threading
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forgepar as fp
from forgepar.backends.messages import Batch
from forgepar.backends.surroundings import UNKNOWN, pack
from forgepar.backends.worker import Worker
from forgepar.backends.worker_board import Board
from forgepar.engine import worker_cache
from forgepar.engine.batches import BatchWriter, PickledPlan
from forgepar.scheduling.run_state import RunPolicy, RunState
from forgepar.values.arena import Arena
from forgepar.values.codec import BLOB_LIMIT, decode, encode, is_segment
from forgepar.workflow.context import RunContext
from forgepar.workflow.plan import Plan, as_tasks


def echo(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def other(*args: Any) -> Any:
    return args


@pytest.fixture
def arena(tmp_path):
    return Arena(tmp_path)


FACTS = RunContext("id", "shipped", 0, float("inf"))


def shipment_of(wf: fp.Workflow, arena: Arena, n_slots: int = 2) -> BatchWriter:
    return BatchWriter(PickledPlan(Plan(wf)), arena, 5, n_slots, FACTS, pack(UNKNOWN))


def tasks_of(*numbers: int) -> Any:
    return as_tasks(np.array(numbers, np.int32))


# Cargo


class Stubborn:
    """Pickles nowhere."""

    def __reduce__(self):
        raise RuntimeError("will not travel")

    def __call__(self, *args):
        return args


@pytest.mark.parametrize(
    ("declare", "task", "position"),
    [
        (lambda wf, one: wf.add(echo, one, Stubborn()), "echo-1", "args[1]"),
        (lambda wf, one: wf.add(echo, 1, x=2, y=Stubborn()), "echo-1", "kwargs['y']"),
        (lambda wf, one: wf.add(echo, [1, {"a": (Stubborn(),)}]), "echo-1", "args[0]"),
        (lambda wf, one: wf.add(echo, one, 1, [one, Stubborn()]), "echo-1", "args[2]"),
        (lambda wf, one: wf.add(echo, x={one}), "echo-1", "kwargs['x']"),
        (lambda wf, one: wf.add(echo, {one: 1}), "echo-1", "args[0]"),
        (lambda wf, one: wf.map(echo, range(3), ["a", Stubborn(), "b"]), "echo-2", "args[1]"),
        (lambda wf, one: wf.map(echo, [one, 1, Stubborn()], range(3)), "echo-3", "args[0]"),
        (lambda wf, one: wf.map(echo, range(3), x=1, y=[Stubborn()]), "echo-1", "kwargs['y']"),
    ],
)
def test_an_argument_that_cannot_travel_is_named(declare, task, position):
    wf = fp.Workflow()
    declare(wf, wf.add(echo, 1))
    with pytest.raises(fp.UnpicklableArgument) as caught:
        PickledPlan(Plan(wf))
    assert (caught.value.task, caught.value.position) == (task, position)
    assert f"task {task!r} got an argument that cannot be pickled: {position} is a " in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("make", [threading.Lock, socket.socket, lambda: (i for i in ())])
def test_an_argument_that_cannot_travel_is_told_by_its_type(make):
    value = make()
    wf = fp.Workflow()
    wf.add(echo, value)
    with pytest.raises(fp.UnpicklableArgument, match=f"is a {type(value).__name__} .*make it inside the task"):
        PickledPlan(Plan(wf))
    if isinstance(value, socket.socket):
        value.close()


@pytest.mark.parametrize("make", [Stubborn, lambda: fp.task(Stubborn()), lambda: functools.partial(echo, Stubborn())])
@pytest.mark.parametrize("declare", ["add", "map"])
def test_a_callable_that_cannot_travel_names_the_first_task_that_has_it(make, declare):
    wf = fp.Workflow()
    fn = make()
    wf.map(echo, range(3))
    first = wf.add(fn, 1) if declare == "add" else wf.map(fn, range(2))[0]
    wf.add(fn, 2)
    with pytest.raises(fp.UnpicklableCallable, match="will not travel") as caught:
        PickledPlan(Plan(wf))
    assert caught.value.task == first.name
    assert f"task {first.name!r} has a callable" in str(caught.value)


def test_a_callable_is_pickled_once_however_many_options_it_has():
    wf = fp.Workflow()
    for fn in (echo, fp.task(echo, retries=1), fp.task(echo, name="mine"), other):
        wf.add(fn, 1)
    plan = Plan(wf)
    assert len(PickledPlan(plan).callables) == 2
    assert list(plan.callable_of) == [0, 0, 0, 1]


def test_checking_arguments_writes_nothing(arena):
    wf = fp.Workflow()
    wf.add(echo, [np.zeros(BLOB_LIMIT), Stubborn])
    PickledPlan(Plan(wf))
    assert arena.names() == []


# Callables, templates and constants


def test_a_callable_and_its_templates_go_once_to_each_slot(arena):
    wf = fp.Workflow()
    one = wf.add(echo, 1)
    wf.add(echo, one)
    wf.add(echo, 2)
    batch_writer = shipment_of(wf, arena)
    values = [0, 0, 0]

    def news(slot: int, template: int, task: int) -> tuple[list[int], list[int]]:
        batch = batch_writer.batch(slot, 1, template, tasks_of(task), values)
        return [number for number, _ in batch.callables], [row.number for row in batch.templates]

    assert news(0, 0, 0) == ([0], [0])
    assert news(0, 0, 2) == ([], [])
    assert news(0, 1, 1) == ([], [1])
    assert news(1, 1, 1) == ([0], [1])
    assert news(1, 0, 0) == ([], [0])
    batch_writer.forget(0)
    assert news(0, 1, 1) == ([0], [1])
    assert news(1, 0, 0) == ([], [])


def test_a_batch_says_what_it_is(arena):
    wf = fp.Workflow()
    wf.map(echo, range(10))
    batch_writer = shipment_of(wf, arena)
    batch = batch_writer.batch(1, 77, 0, tasks_of(3, 4, 5), [])
    assert (batch.id, batch.run, batch.template, batch.n_tasks, batch.tasks) == (77, 5, 0, 3, 3)
    assert batch.constants == [3, 4, 5]
    batch = batch_writer.batch(1, 78, 0, tasks_of(2, 5, 9), [])
    assert array("i", batch.tasks).tolist() == [2, 5, 9]
    assert batch.constants == [2, 5, 9]


def test_shared_constants_travel_with_their_template_only(arena):
    wf = fp.Workflow()
    wf.map(echo, range(4), table=list(range(5)), big=bytes(10**6))
    batch_writer = shipment_of(wf, arena)
    first = batch_writer.batch(0, 1, 0, range(2), []).templates[0].shared
    assert {name: decode(wire, arena) for name, wire in first.items()} == {
        "table": [0, 1, 2, 3, 4],
        "big": bytes(10**6),
    }
    second = batch_writer.batch(1, 2, 0, range(2, 4), []).templates[0].shared
    assert second["big"] == first["big"]
    assert arena.names() == [first["big"][0]]
    batch_writer.close()
    assert arena.names() == []


def test_large_constants_are_freed_at_the_end(arena):
    wf = fp.Workflow()
    wf.map(echo, [np.zeros(BLOB_LIMIT), 1, [bytes(10**6)]])
    batch_writer = shipment_of(wf, arena)
    batch = batch_writer.batch(0, 1, 0, range(3), [])
    assert list(map(is_segment, batch.constants)) == [True, False, True]
    assert len(arena.names()) == 2
    batch_writer.close()
    assert arena.names() == []


# Values


def readers(references: list[list[int]]) -> fp.Workflow:
    """A workflow of enough sources, and tasks that take their values, as many each."""
    wf = fp.Workflow()
    sources = wf.map(echo, range(max(map(max, references)) + 1))
    for row in references:
        wf.add(other, *[sources[i] for i in row])
    return wf


def inputs_of(batch: Batch, references: list[list[int]]) -> list[list[Any]]:
    """What each task of a batch gets, read as the message's description says."""
    places = array("i", batch.references)
    flat = [batch.values[i] for i in places] if places else batch.values
    return [flat[i * len(row) : (i + 1) * len(row)] for i, row in enumerate(references)]


@pytest.mark.parametrize(
    ("references", "n_sent"),
    [
        ([[i, i + 1, i + 2] for i in range(40)], 42),  # a stencil
        ([[7 * i % 97] for i in range(40)], 40),  # scattered
        ([[7 * i % 97, 5] for i in range(40)], 41),  # scattered, one of them to all
        ([[3, 3], [90, 3]], 4),  # few
    ],
    ids=["dense", "sparse", "shared", "few"],
)
@pytest.mark.parametrize("kind", ["scalars", "blobs", "mixed"])
def test_each_task_gets_the_values_it_takes(arena, references, n_sent, kind):
    wf = readers(references)
    batch_writer = shipment_of(wf, arena, 1)
    n_sources = len(wf) - len(references)

    def value_of(task: int) -> Any:
        return task if kind == "scalars" or (kind == "mixed" and task % 2) else ["value", task]

    values = [encode(value_of(task), arena) for task in range(n_sources)] + [None] * len(references)
    batch = batch_writer.batch(0, 1, 1, range(n_sources, len(wf)), values)
    assert len(batch.values) == n_sent
    worker = Worker(0, arena, Board.create(arena.folder / "board", 1))
    (reply,) = worker.run(batch)
    expected = [tuple(map(value_of, row)) for row in references]
    assert [decode(wire, arena) for wire in reply.values] == expected
    if kind == "scalars":
        assert inputs_of(batch, references) == references


def test_a_small_value_goes_once_to_each_slot_and_then_by_its_number(arena):
    wf = readers([[0, 1], [1, 2]])
    batch_writer = shipment_of(wf, arena)
    values = [encode([i], arena) for i in range(3)]
    blobs = [(wire[0], task) for task, wire in enumerate(values)]
    assert batch_writer.batch(0, 1, 1, tasks_of(3), values).values == [blobs[0], blobs[1]]
    assert batch_writer.batch(0, 2, 1, tasks_of(4), values).values == [(1,), blobs[2]]
    assert batch_writer.batch(1, 3, 1, tasks_of(3, 4), values).values == [blobs[0], blobs[1], (1,), blobs[2]]
    batch_writer.forget(0)
    assert batch_writer.batch(0, 4, 1, tasks_of(4), values).values == [blobs[1], blobs[2]]


def test_a_value_that_a_worker_made_is_not_sent_back_to_it(arena):
    wf = readers([[0, 1]])
    batch_writer = shipment_of(wf, arena)
    values = [encode([i], arena) for i in range(2)]
    batch_writer.keep(0, 1, values[1])
    assert batch_writer.batch(0, 1, 1, tasks_of(2), values).values == [(values[0][0], 0), (1,)]


def test_scalars_and_segments_are_sent_as_they_are(arena):
    wf = readers([[0, 1]])
    values = [3, encode(np.zeros(BLOB_LIMIT), arena)]
    batch_writer = shipment_of(wf, arena)
    for number in range(2):
        assert batch_writer.batch(0, number, 1, tasks_of(2), values).values == values


def test_the_least_recently_used_values_are_dropped_first(arena, monkeypatch):
    wf = readers([[0], [1], [0], [2], [3]])
    values = [encode([i], arena) for i in range(4)]
    monkeypatch.setattr(worker_cache, "KEPT_BYTES", 2 * len(values[0][0]))
    batch_writer = shipment_of(wf, arena)
    drops = [list(batch_writer.batch(0, number, 1, tasks_of(4 + number), values).drop) for number in range(5)]
    assert drops == [[], [], [], [1], [0]]


class Checked(Worker):
    """A worker that lets a test look at what it keeps."""

    @property
    def kept(self) -> dict[int, Any]:
        return self._cache.values


def mix(size: int, *inputs: Any) -> Any:
    """A value of about so many bytes (none: a number) that depends on all the inputs."""
    total = 1 + sum(value if isinstance(value, int) else value[0] for value in inputs)
    return [total, bytes(size)] if size else total


def mix_nested(size: int, inputs: dict[str, list[Any]]) -> Any:
    return mix(size, *inputs["values"])


@st.composite
def graphs(draw: st.DrawFn) -> list[tuple[int, list[int]]]:
    """The size of each task's value and the tasks whose values it takes."""
    n = draw(st.integers(1, 40))
    sizes = st.sampled_from([0, 20, 100, 300, 1000])
    width = draw(st.integers(1, 12))  # how far back a task takes values from
    return [
        (draw(sizes), draw(st.lists(st.integers(max(0, task - width), task - 1), max_size=4)) if task else [])
        for task in range(n)
    ]


def expected_values(graph: list[tuple[int, list[int]]]) -> list[Any]:
    values: list[Any] = []
    for size, row in graph:
        values.append(mix(size, *[values[i] for i in row]))
    return values


class Flow:
    """A run without processes: two workers, two batches in flight each, outcomes taken in any order."""

    def __init__(self, wf: fp.Workflow, schedule: str, folder: Path) -> None:
        self.plan = Plan(wf)
        self.arena = Arena(folder)
        self.state = RunState(self.plan, RunPolicy(schedule=schedule))
        self.batch_writer = BatchWriter(PickledPlan(self.plan), self.arena, 1, 2, FACTS, pack(UNKNOWN))
        self.board = Board.create(folder / "board", 2)
        self.workers = [Checked(slot, self.arena, self.board) for slot in range(2)]
        self.values: list[Any] = [None] * self.plan.n_tasks
        self.flights: list[list[tuple[Batch, Any]]] = [[], []]
        self.n_batches = 0

    def run(self, choose: Any, forget: bool) -> None:
        self.state.begin()
        while not self.state.finished:
            slot = choose(2)
            head = self.state.head()
            if head is not None and len(self.flights[slot]) < 2:
                self.send(slot, head[0], 1 + choose(5))
            elif self.flights[slot]:
                if forget and not choose(6):
                    self.lose(slot)
                else:
                    self.take_reply(slot)

    def send(self, slot: int, template: int, most: int) -> None:
        tasks = self.state.take(most)
        self.n_batches += 1
        batch = self.batch_writer.batch(slot, self.n_batches, template, tasks, self.values)
        self.flights[slot].append((pickle.loads(pickle.dumps(batch)), tasks))

    def take_reply(self, slot: int) -> None:
        batch, tasks = self.flights[slot].pop(0)
        n_done = 0
        for reply in self.workers[slot].run(batch):
            assert reply.failure is None, reply.failure.traceback
            for task, value in zip(list(tasks)[n_done:], reply.values, strict=False):
                self.values[task] = value
                if type(value) is tuple and not is_segment(value):
                    self.batch_writer.keep(slot, int(task), value)
            n_done += len(reply.values)
        self.state.completed(tasks)

    def lose(self, slot: int) -> None:
        """The worker dies with all it was sent, and another takes its place."""
        for batch, tasks in reversed(self.flights[slot]):
            self.state.put_back(batch.template, tasks)
        self.flights[slot].clear()
        self.batch_writer.forget(slot)
        self.workers[slot] = Checked(slot, self.arena, self.board)


@settings(deadline=None, max_examples=150)
@given(
    graph=graphs(),
    kept_bytes=st.sampled_from([0, 50, 400, 2500, 1 << 20]),
    nested=st.booleans(),
    schedule=st.sampled_from(["layers", "eager"]),
    forget=st.booleans(),
    random=st.randoms(use_true_random=False),
)
def test_workers_compute_the_right_values_whatever_they_are_told_to_drop(
    graph, kept_bytes, nested, schedule, forget, random
):
    wf = fp.Workflow()
    handles: list[fp.TaskHandle] = []
    for task, (size, row) in enumerate(graph):
        inputs = [handles[i] for i in row]
        if nested and task % 2:
            handles.append(wf.add(mix_nested, size, {"values": inputs}))
        else:
            handles.append(wf.add(mix, size, *inputs))
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(worker_cache, "KEPT_BYTES", kept_bytes)
        flow = Flow(wf, schedule, Path(folder))
        flow.run(random.randrange, forget)
        assert [decode(wire, flow.arena) for wire in flow.values] == expected_values(graph)


def test_a_worker_keeps_no_more_than_it_is_meant_to(tmp_path, monkeypatch):
    """What it makes and gets in one batch it may hold; what it was told to drop with the next is gone."""
    limit = 2000
    monkeypatch.setattr(worker_cache, "KEPT_BYTES", limit)
    wf = fp.Workflow()
    handle = wf.add(mix, 300)
    for _ in range(60):
        handle = wf.add(mix, 300, handle)
    flow = Flow(wf, "layers", tmp_path)
    flow.state.begin()
    most = 0
    while not flow.state.finished:
        flow.send(0, flow.state.head()[0], 1)
        flow.take_reply(0)
        most = max(most, sum(len(wire[0]) for wire in flow.workers[0].kept.values()))
    assert 300 < most <= limit + 2 * 400
