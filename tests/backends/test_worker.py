"""What a worker does with a batch, in this process: outcomes, times, and all the ways in which a task can fail."""

from __future__ import annotations

import gc
import os
import pickle
import sys
import threading
import time
import traceback
import weakref
from array import array
from typing import Any

import cloudpickle
import pytest

from forgepar.backends import worker as worker_module
from forgepar.backends.messages import Batch, Reply, Template
from forgepar.backends.worker import Worker
from forgepar.backends.worker_board import LIMIT, NO_LIMIT, POSITION, STARTED, Board, mark
from forgepar.errors import TaskExited, UnpicklableResult, text_of
from forgepar.values.arena import Arena
from forgepar.values.codec import BLOB_LIMIT, decode, encode, is_segment
from forgepar.workflow.arguments import CONSTANT, NESTED, REFERENCE, Hole, HoleRun

N_TASKS = 4


@pytest.fixture
def arena(tmp_path):
    return Arena(tmp_path)


@pytest.fixture
def board(tmp_path):
    return Board.create(tmp_path / "board", 2)


@pytest.fixture
def worker(arena, board):
    return Worker(1, arena, board)


def batch_of(fn: Any, **changes: Any) -> Batch:
    """A batch of tasks that get one number each, from 0 on."""
    kinds = changes.pop("kinds", (CONSTANT,))
    keywords = changes.pop("keywords", ())
    shared = changes.pop("shared", {})
    n_tasks = changes.get("n_tasks", N_TASKS)
    batch = Batch(
        id=1,
        run=0,
        template=0,
        n_tasks=n_tasks,
        tasks=10,
        constants=list(range(n_tasks)),
        values=[],
        references=b"",
        callables=[(0, cloudpickle.dumps(fn))],
        templates=[Template(0, 0, (kinds, keywords), shared)],
        drop=[],
    )
    return batch._replace(**changes)


def positions(*numbers: int) -> bytes:
    return array("i", numbers).tobytes()


def outcomes(replies: list[Reply]) -> list[Any]:
    return [value for reply in replies for value in reply.values]


def check(replies: list[Reply], batch: Batch) -> list[Reply]:
    """What holds for the replies to every batch."""
    assert [reply.ended for reply in replies] == [False] * (len(replies) - 1) + [True]
    first = 0
    for reply in replies:
        assert (reply.slot, reply.batch, reply.first) == (1, batch.id, first)
        times = array("d", reply.marks).tolist()
        assert len(times) == len(reply.values) + 1
        assert times == sorted(times)
        assert reply.cpu_seconds >= 0
        assert reply.failure is None or (reply is replies[-1] and reply.values[-1] is None)
        first += len(reply.values)
    return replies


def run(worker: Worker, batch: Batch) -> list[Reply]:
    return check(list(worker.run(batch)), batch)


def failing(worker: Worker, fn: Any, **changes: Any) -> Any:
    """The failure of a function that fails at its first task."""
    (reply,) = run(worker, batch_of(fn, **changes))
    assert reply.values == [None]
    assert reply.failure.position == 0
    return reply.failure


# Outcomes


def test_a_batch_has_one_reply_with_all_values(worker):
    (reply,) = run(worker, batch_of(lambda i: i * i))
    assert reply.values == [0, 1, 4, 9]
    assert reply.failure is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kinds": (), "constants": []}, [((), {})] * 3),
        ({"kinds": (CONSTANT, CONSTANT), "constants": [1, 2, 3, 4, 5, 6]}, [((1, 2), {}), ((3, 4), {}), ((5, 6), {})]),
        ({"kinds": (REFERENCE,), "constants": [], "values": [7, 8, 9]}, [((7,), {}), ((8,), {}), ((9,), {})]),
        (
            {"kinds": (REFERENCE,), "constants": [], "values": [7, 8], "references": positions(1, 0, 1)},
            [((8,), {}), ((7,), {}), ((8,), {})],
        ),
        (
            {"kinds": (REFERENCE, CONSTANT, REFERENCE), "constants": "abc", "values": [1, 2, 3, 4, 5, 6]},
            [((1, "a", 2), {}), ((3, "b", 4), {}), ((5, "c", 6), {})],
        ),
        (
            {"kinds": (CONSTANT, REFERENCE), "keywords": ("key",), "constants": "abc", "values": [1, 2, 3]},
            [(("a",), {"key": 1}), (("b",), {"key": 2}), (("c",), {"key": 3})],
        ),
        ({"shared": {"s": 5}, "constants": "abc"}, [(("a",), {"s": 5}), (("b",), {"s": 5}), (("c",), {"s": 5})]),
        (
            {
                "kinds": (NESTED + 2, REFERENCE),
                "constants": [(pickle.dumps([Hole(0), {"x": Hole(1)}]),)] * 3,
                "values": [1, 2, 3, 4, 5, 6, 7, 8, 9],
            },
            [(([1, {"x": 2}], 3), {}), (([4, {"x": 5}], 6), {}), (([7, {"x": 8}], 9), {})],
        ),
        (
            {"kinds": (NESTED + 1,), "constants": [(pickle.dumps(HoleRun(0, 1)),)] * 3, "values": [1, 2, 3]},
            [(([1],), {}), (([2],), {}), (([3],), {})],
        ),
        ({"constants": [(pickle.dumps([1]),), 2, (pickle.dumps((3,)),)]}, [(([1],), {}), ((2,), {}), (((3,),), {})]),
    ],
)
def test_arguments_stand_where_the_layout_says(worker, arena, changes, expected):
    changes = {"n_tasks": 3, **changes, "constants": list(changes.get("constants", []))}
    replies = run(worker, batch_of(lambda *args, **kwargs: (args, kwargs), **changes))
    assert [decode(wire, arena) for wire in outcomes(replies)] == expected


def test_large_values_go_by_the_arena_both_ways(worker, arena):
    given = encode(bytes(10**6), arena)
    replies = run(
        worker, batch_of(lambda data: data + b"x", kinds=(REFERENCE,), constants=[], values=[given] * N_TASKS)
    )
    assert all(map(is_segment, outcomes(replies)))
    assert [decode(wire, arena) for wire in outcomes(replies)] == [bytes(10**6) + b"x"] * N_TASKS


@pytest.mark.parametrize("tasks", [10, positions(10, 13, 17, 11)])
def test_small_values_are_kept_under_their_tasks_number_until_dropped(worker, arena, tasks):
    run(worker, batch_of(lambda i: ("made", i), tasks=tasks))
    last = 13 if tasks == 10 else 11
    come = (pickle.dumps("sent"), 99)
    take = batch_of(lambda x: x, n_tasks=2, kinds=(REFERENCE,), constants=[], template=1)
    take = take._replace(templates=[take.templates[0]._replace(number=1)])
    for values in ([(last,), come], [(last,), (99,)]):
        wires = outcomes(run(worker, take._replace(values=values, drop=[])))
        assert [decode(wire, arena) for wire in wires] == [("made", 3), "sent"]
    assert len(outcomes(run(worker, take._replace(values=[(last,), (99,)], drop=[last])))) == 2
    (reply,) = run(worker, take._replace(values=[(99,), (last,)]))
    assert reply.failure.type_name == "builtins.KeyError"


def test_callables_and_templates_are_kept_within_a_run_only(worker):
    first = batch_of(lambda i: -i)
    bare = first._replace(callables=[], templates=[])
    run(worker, first)
    assert outcomes(run(worker, bare._replace(id=2))) == [0, -1, -2, -3]
    (reply,) = run(worker, bare._replace(id=3, run=1))
    assert reply.failure.type_name == "builtins.KeyError"
    assert outcomes(run(worker, first._replace(id=4, run=2))) == [0, -1, -2, -3]


# Replies in time, the board and its limit


def test_replies_come_as_often_as_work_was_done(worker, monkeypatch):
    monkeypatch.setattr(worker_module, "REPLY_SECONDS", 0.0)
    replies = run(worker, batch_of(lambda i: i))
    assert [reply.values for reply in replies] == [[0], [1], [2], [3]]


def test_a_reply_is_out_before_the_next_task_begins(worker, monkeypatch):
    monkeypatch.setattr(worker_module, "REPLY_SECONDS", 0.0)
    begun = []
    batch = batch_of(abs)
    worker.run(batch)
    monkeypatch.setattr(pickle, "loads", lambda data: begun.append)
    for n, _ in enumerate(worker.run(batch), 1):
        assert begun == list(range(n))


def test_the_board_tells_which_task_runs(worker, board):
    seen = []
    rows = board.integers(1), board.floats(1)
    batch = batch_of(abs, id=5)

    def look(i):
        seen.append((rows[0][POSITION], rows[1][STARTED]))

    (reply,) = list(worker_with(worker, look).run(batch._replace(callables=[])))
    assert [position for position, _ in seen] == [mark(5, i) for i in range(N_TASKS)]
    assert [start for _, start in seen] == array("d", reply.marks).tolist()[:-1]
    assert board.integers(0)[POSITION] == 0


def worker_with(worker: Worker, fn: Any) -> Worker:
    """A worker that has a callable as it is, unpickled: one that sees the test's own variables."""
    worker._run = 0
    worker._cache.callables[0] = fn
    return worker


def test_a_worker_says_where_it_is_before_it_unpickles_anything(worker, board):
    seen = []

    class Telling:
        def __reduce__(self):
            return exec, ("raise SystemError",)

    list(worker.run(batch_of(abs, id=6, callables=[(0, pickle.dumps(Telling()))])))
    seen.append(board.integers(1)[POSITION])
    assert seen == [mark(6, 0)]


@pytest.mark.parametrize("n_done", range(N_TASKS + 1))
def test_the_limit_is_not_crossed(worker, board, n_done):
    board.integers(1)[LIMIT] = mark(1, n_done)
    (reply,) = run(worker, batch_of(lambda i: i))
    assert reply.values == list(range(n_done))
    assert reply.failure is None
    board.integers(1)[LIMIT] = NO_LIMIT
    assert outcomes(run(worker, batch_of(lambda i: i, id=2))) == list(range(N_TASKS))


def test_a_limit_holds_for_batches_behind_it(worker, board):
    board.integers(1)[LIMIT] = mark(1, 2)
    (reply,) = run(worker, batch_of(lambda i: i, id=2))
    assert reply.values == []


def test_a_limit_that_comes_amid_a_batch_stops_it(worker, board):
    row = board.integers(1)

    def limit_behind(i):
        row[LIMIT] = mark(1, 2)
        return i

    (reply,) = list(worker_with(worker, limit_behind).run(batch_of(abs, callables=[])))
    assert reply.values == [0, 1]


# Failures


def raise_it(i: Any) -> Any:
    raise LookupError("no such", i)


def test_a_failure_ends_its_batch(worker):
    (reply,) = run(worker, batch_of(lambda i: 6 // (i - 2)))
    assert reply.values == [-3, -6, None]
    assert reply.failure.position == 2
    assert reply.failure.type_name == "builtins.ZeroDivisionError"


def test_a_failure_after_other_replies_counts_from_the_batchs_begin(worker, monkeypatch):
    monkeypatch.setattr(worker_module, "REPLY_SECONDS", 0.0)
    replies = run(worker, batch_of(lambda i: 6 // (i - 2)))
    assert replies[-1].failure.position == 2
    assert [len(reply.values) for reply in replies] == [1, 1, 1]


def test_a_failure_carries_the_exception_and_its_text(worker):
    failure = failing(worker, raise_it)
    error = pickle.loads(failure.pickled)
    assert type(error) is LookupError
    assert error.args == ("no such", 0)
    assert (failure.type_name, failure.text) == ("builtins.LookupError", str(error))
    assert failure.traceback.endswith("LookupError: ('no such', 0)\n")
    assert "raise_it" in failure.traceback


@pytest.mark.parametrize("how", ["plain", "cause", "context", "group", "exit"])
def test_what_a_failed_task_held_goes_without_a_garbage_collection(worker, how):
    class Large:
        pass

    refs = []

    def hold(i):
        large = Large()
        refs.append(weakref.ref(large))
        error = SystemExit(3) if how == "exit" else ValueError(i)  # which the traceback's frame refers to
        if how in ("plain", "exit"):
            raise error
        try:
            raise error
        except ValueError:
            if how == "cause":
                raise KeyError(i) from error
            if how == "group":
                raise ExceptionGroup("several", [error]) from None
            raise KeyError(i)  # noqa: B904  (the context is what this is about)

    gc.collect()
    gc.disable()
    try:
        (reply,) = run(worker_with(worker, hold), batch_of(hold, callables=[]))
        assert reply.failure is not None
        assert [ref() for ref in refs] == [None]
    finally:
        gc.enable()


def unpicklable(i: Any) -> Any:
    return threading.Lock()


def wrong_arguments() -> None:
    """Takes none, and is given one."""


def exits(i: Any) -> Any:
    sys.exit("bye")


@pytest.mark.parametrize("fn", [raise_it, exits, unpicklable, wrong_arguments])
@pytest.mark.parametrize("layout", [{}, {"kinds": (CONSTANT,), "keywords": ("i",)}])
def test_a_traceback_has_no_frame_of_the_worker(worker, fn, layout):
    if fn is wrong_arguments and layout:
        layout = {"shared": {"i": 1}}
    failure = failing(worker, fn, **layout)
    assert failure.traceback.splitlines()[-1]
    assert worker_module.__file__ not in failure.traceback


@pytest.mark.parametrize("code", [None, 0, 3, True, 0.5, "bye"])
def test_a_task_that_exits_fails_with_the_code(worker, code):
    def leave(i):
        sys.exit(code)

    error = pickle.loads(failing(worker, leave).pickled)
    assert type(error) is TaskExited
    assert f"sys.exit({code!r})" in str(error)
    assert error.code == code


@pytest.mark.parametrize("kind", [KeyboardInterrupt, GeneratorExit, BaseException])
def test_no_task_raises_past_the_worker(worker, kind):
    def leave(i):
        raise kind("now")

    error = pickle.loads(failing(worker, leave).pickled)
    assert type(error) is TaskExited
    assert f"{kind.__name__}(now)" in str(error)
    assert error.code == "now"


def test_an_interruptible_worker_lets_interrupts_out(arena, board):
    def leave(i):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(Worker(0, arena, board, interruptible=True).run(batch_of(leave)))


def test_a_result_that_cannot_be_pickled_is_told_by_its_type(worker, arena):
    (reply,) = run(worker, batch_of(lambda i: threading.Lock() if i == 2 else i))
    assert reply.values == [0, 1, None]
    error = pickle.loads(reply.failure.pickled)
    assert type(error) is UnpicklableResult
    assert "returned a _thread.lock that cannot be pickled" in str(error)
    assert "Return plain data" in str(error)


def test_a_large_result_that_cannot_be_pickled_leaves_no_segment(worker, arena):
    failing(worker, lambda i: [bytes(10 * BLOB_LIMIT), threading.Lock()])
    assert arena.names() == []


class OneWay(Exception):
    """Pickles, but does not unpickle."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


class Holding(Exception):
    """Does not pickle."""

    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class Mute(Exception):
    """Has no text."""

    def __str__(self):
        raise RuntimeError("mute")


class Changed(Exception):
    """Unpickles as something else."""

    def __reduce__(self):
        return ValueError, ("changed",)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (lambda: OneWay(1, 2), "1 and 2"),
        (lambda: Holding("held"), "held"),
        (lambda: Mute(), "(no text: its __str__ raises)"),
        (lambda: Changed("was"), "was"),
    ],
)
def test_an_exception_that_plain_pickling_cannot_restore_travels(worker, error, text):
    kind = type(error())

    def fail(i):
        raise error()

    failure = failing(worker, fail)
    loaded = pickle.loads(failure.pickled)
    assert type(loaded) is kind
    assert text_of(loaded) == text
    assert failure.type_name == f"{kind.__module__}.{kind.__qualname__}"
    assert failure.text == text
    assert kind.__name__ in failure.traceback


def test_notes_travel_with_an_exception(worker):
    def fail(i):
        error = ValueError("x")
        error.add_note("look here")
        raise error

    failure = failing(worker, fail)
    assert pickle.loads(failure.pickled).__notes__ == ["look here"]
    assert "look here" in failure.traceback


def test_what_caused_an_exception_is_in_its_traceback(worker):
    def fail(i):
        try:
            raise_it(i)
        except LookupError as error:
            raise ValueError("x") from error

    failure = failing(worker, fail)
    assert "direct cause" in failure.traceback
    assert "LookupError" in failure.traceback


def broken() -> bytes:
    """A callable whose module a worker does not have."""
    return pickle.dumps(os.getcwd).replace(b"posix", b"nosix")


def test_a_callable_that_cannot_be_unpickled_fails_every_task_for_the_same_reason(worker):
    """It is sent once, so the worker has to remember why it has none."""
    failure = failing(worker, abs, callables=[(0, broken())])
    assert failure.type_name == "builtins.ModuleNotFoundError"
    again = failing(worker, abs, id=2, callables=[], templates=[])
    assert (again.type_name, again.text) == (failure.type_name, failure.text)


def test_values_that_came_with_a_broken_callable_are_kept(worker):
    """The parent counts them as sent."""
    come = (pickle.dumps("sent"), 99)
    failing(worker, abs, n_tasks=1, callables=[(0, broken())], kinds=(REFERENCE,), constants=[], values=[come])
    batch = batch_of(len, id=2, n_tasks=1, template=1, kinds=(REFERENCE,), constants=[], values=[(99,)])
    batch = batch._replace(callables=[(1, pickle.dumps(len))], templates=[Template(1, 1, ((REFERENCE,), ()), {})])
    assert outcomes(run(worker, batch)) == [4]


def test_an_argument_that_cannot_be_unpickled_fails_its_task_alone(worker):
    bad = (broken(),)
    (reply,) = run(worker, batch_of(lambda i: i, constants=[0, 1, bad, 3]))
    assert reply.values == [0, 1, None]
    assert reply.failure.type_name == "builtins.ModuleNotFoundError"


def test_a_worker_goes_on_after_a_failure(worker):
    failing(worker, raise_it)
    assert outcomes(run(worker, batch_of(abs, id=2))) == list(range(N_TASKS))


def test_a_failures_traceback_is_as_python_prints_it(worker):
    try:
        raise_it(0)
    except LookupError as error:
        printed = traceback.format_exception(error.with_traceback(error.__traceback__.tb_next))
    assert failing(worker, raise_it).traceback == "".join(printed)


def test_nothing_is_said_to_run_on_while_the_last_reply_is_under_way(worker, board):
    """Its receiver may be far away, and goes by the board in judging whether the last task takes too long."""
    (reply,) = worker.run(batch_of(abs))
    assert reply.ended
    assert board.floats(worker.slot)[STARTED] > time.perf_counter()
