"""Every task sees its constants as they were given, whatever earlier tasks on its worker did to theirs."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import functools
import pathlib
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest

import forgepar as fp
from forgepar.workflow.fresh_values import Original, fresh_rows, is_frozen, renewing

METHODS = ["forkserver", "spawn", "fork"]
N = 12  # tasks on one worker


class Bag:
    def __init__(self, *items):
        self.items = list(items)


class Slotted:
    __slots__ = ("items",)

    def __init__(self):
        self.items = []


class Colour(enum.Enum):
    RED = 1


def grown(acc, i):
    """Change a constant of whatever kind, and tell how it looks then."""
    if isinstance(acc, list):
        acc.append(i)
        return len(acc)
    if isinstance(acc, (dict, set)):
        acc.update({i: i} if isinstance(acc, dict) else {i})
        return len(acc)
    if isinstance(acc, bytearray):
        acc += b"x"
        return len(acc)
    if isinstance(acc, np.ndarray):
        acc += 1
        return float(acc[0])
    if isinstance(acc, tuple):
        return grown(acc[0], i)
    return grown(acc.items, i)


def grown_by_name(i, acc):
    return grown(acc, i)


def grown_deep(i, acc):
    acc["rows"][0].append(i)
    return len(acc["rows"][0])


CHANGEABLE = {
    "list": list,
    "dict": dict,
    "set": set,
    "bytearray": bytearray,
    "small array": lambda: np.zeros(4),
    "instance": Bag,
    "instance with slots": Slotted,
    "tuple of a list": lambda: ([],),
    "large list": lambda: ["x" * 50] * 5000,
    "list with a large array": lambda: Bag(np.zeros(100_000)),
}


@pytest.fixture(scope="module", params=["inline", *METHODS, "threads"])
def executor(request):
    """Return one worker of each kind, warm before the first test."""
    with ExitStack() as stack:
        if request.param == "threads":
            rules = {"backend": fp.FuturesBackend(stack.enter_context(ThreadPoolExecutor(1)))}
        elif request.param == "inline":
            rules = {"backend": "inline"}
        else:
            rules = {"workers": 1, "start_method": request.param}
        made = stack.enter_context(fp.WorkflowExecutor(**rules))
        wf = fp.Workflow()
        wf.add(abs, -1)
        made.run(wf)
        yield made


def first_seen(make):
    return grown(make(), 0)


@pytest.mark.parametrize("kind", CHANGEABLE)
def test_constants_of_a_map(executor, kind):
    make = CHANGEABLE[kind]
    wf = fp.Workflow()
    handles = wf.map(grown_by_name, range(N), acc=make())
    partial = wf.map(functools.partial(grown, make()), range(N))
    by_name = wf.map(functools.partial(grown_by_name, acc=make()), range(N))
    result = executor.run(wf)
    for key in (handles, partial, by_name):
        assert result[key] == [first_seen(make)] * N


def test_what_is_deep_in_a_constant(executor):
    wf = fp.Workflow()
    handles = wf.map(grown_deep, range(N), acc={"rows": [[], []], "large": np.zeros(100_000)})
    assert executor.run(wf)[handles] == [1] * N


@pytest.mark.parametrize("kind", CHANGEABLE)
def test_arguments_of_single_tasks_and_of_a_map(executor, kind):
    make = CHANGEABLE[kind]
    wf, one = fp.Workflow(), make()
    singly = [wf.add(grown, one, i) for i in range(N)]
    mapped = wf.map(grown, [one] * N, range(N))
    result = executor.run(wf)
    assert result[singly] == result[mapped] == [first_seen(make)] * N


@pytest.mark.parametrize("kind", ["list", "dict", "instance", "small array", "large list"])
def test_values_of_other_tasks(executor, kind):
    make = CHANGEABLE[kind]
    wf = fp.Workflow()
    made = wf.add(make)
    singly = [wf.add(grown, made, i) for i in range(N)]
    mapped = wf.map(grown, [made] * N, range(N))
    nested = [wf.add(lambda pair, i: grown(pair[0], i), [made, 1], i) for i in range(N)]
    result = executor.run(wf, outputs="all")
    assert result[singly] == result[mapped] == result[nested] == [first_seen(make)] * N
    assert grown(result[made], 0) == first_seen(make)


def test_values_that_stand_in_for_failed_tasks(executor):
    wf = fp.Workflow()
    failed = wf.add(fp.task(int).options(fallback=[]), "seven")
    handles = [wf.add(grown, failed, i) for i in range(N)]
    result = executor.run(wf, outputs="all")
    assert result[handles] == [1] * N
    assert result[failed] == []


def fails_first(i, acc, path):
    acc.append(i)
    if not pathlib.Path(path, f"tried-{i}").exists():
        pathlib.Path(path, f"tried-{i}").touch()
        raise ValueError("once")
    return len(acc)


def test_a_task_that_is_tried_again_sees_none_of_its_first_attempt(executor, tmp_path):
    wf = fp.Workflow()
    handles = wf.map(fp.task(fails_first).options(retries=1), range(4), acc=[], path=str(tmp_path))
    assert executor.run(wf)[handles] == [1] * 4


def undo(acc, path, value):
    acc.append(value)
    pathlib.Path(path, f"undone-{value}-{len(acc)}").touch()


def caught(acc, error, value):
    acc.append(error)
    return len(acc)


def test_what_undoes_tasks_and_what_handles_their_errors(executor, tmp_path):
    wf = fp.Workflow()
    numbers = wf.map(fp.task(abs).options(compensate=functools.partial(undo, [], str(tmp_path))), range(3))
    handled = wf.map(fp.task(int).options(fallback=functools.partial(caught, [])), ["x", "y", "z"])
    wf.add(divmod, 1, wf.add(min, numbers))
    with pytest.raises(fp.WorkflowFailed) as failed:
        executor.run(wf, outputs="all")
    assert failed.value.result[handled] == [1] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"undone-{i}-1" for i in range(3)]


def who(i, **constants):
    return {name: id(value) for name, value in constants.items()}


FROZEN = {
    "number": 10**30,
    "text": "x" * 5000,
    "tuple": (1, "a", (b"b", frozenset([2.5]))),
    "range": range(5),
    "function": grown,
    "class": Bag,
    "large_array": np.zeros(100_000),
    "decimal": decimal.Decimal("1.5"),
}


def test_what_cannot_be_changed_is_one_object_to_all_tasks_of_a_worker(executor):
    wf = fp.Workflow()
    handles = wf.map(who, range(N), **FROZEN)
    rows = executor.run(wf)[handles]
    assert rows == [rows[0]] * N


def test_large_arrays_are_read_only_and_not_copied(executor):
    wf = fp.Workflow()
    array = np.zeros(100_000)
    alone = wf.map(lambda i, array: array.flags.writeable, range(3), array=array)
    within = wf.map(lambda i, acc: acc["array"].flags.writeable, range(3), acc={"array": array})
    held = wf.map(functools.partial(lambda acc, i: acc["array"].flags.writeable, {"array": array}), range(3))
    result = executor.run(wf)
    assert result[alone] == result[within] == result[held] == [False] * 3
    wf.map(grown_by_name, range(2), acc=array)
    with pytest.raises(fp.WorkflowFailed) as failed:
        executor.run(wf)
    error = failed.value.exceptions[0]
    assert "read-only" in str(error)
    assert "writable=True" in "".join(error.__notes__)


def test_a_partial_calls_as_it_would_here(executor):
    def told(*args, **keywords):
        return args, keywords

    wf = fp.Workflow()
    partial = functools.partial(told, [1], 2, a=[3], b=4)
    handle, plain = wf.add(partial, 5, b=6, c=7), wf.add(functools.partial(told, 1, a=2), 3)
    result = executor.run(wf)
    assert result[handle] == partial(5, b=6, c=7)
    assert result[plain] == ((1, 3), {"a": 2})
    assert wf.execution_layers() == [["told", "told-1"]]


class Counter:
    def __init__(self):
        self.n = 0

    def __call__(self, i):
        self.n += 1
        return (i, self.n)

    def step(self, i):
        return self(i)


def test_a_callable_with_state_keeps_it_for_a_run_and_worker(executor):
    wf = fp.Workflow()
    called, method = wf.map(Counter(), range(5)), wf.map(Counter().step, range(5))
    result = executor.run(wf)
    assert result[called] == result[method] == [(i, i + 1) for i in range(5)]
    assert executor.run(wf)[called] == [(i, i + 1) for i in range(5)]


def test_constants_of_tasks_that_are_known_only_when_the_run_goes(executor):
    wf = fp.Workflow()
    handle = wf.map(grown_by_name, wf.add(list, range(N)), acc=[])
    assert executor.run(wf)[handle] == [1] * N


def test_the_traceback_of_a_partials_function_has_no_lines_of_ours(executor):
    def fail(acc, i):
        raise ValueError("no")

    wf = fp.Workflow()
    wf.add(functools.partial(fail, []), 1)
    with pytest.raises(fp.WorkflowFailed) as failed:
        executor.run(wf)
    assert "fresh.py" not in "".join(failed.value.exceptions[0].__notes__)


# Private copies


def writes(i, array):
    array[0] += 1
    return float(array[0])


def writes_deep(acc, i):
    return writes(i, acc["deep"][0])


def test_writable_gives_a_task_copies_of_its_own(executor):
    wf, large = fp.Workflow(), np.zeros(100_000)
    own = fp.task(writes).options(writable=True)
    deep = fp.task(writes_deep).options(writable=True)
    made = wf.add(np.zeros, 100_000)
    keys = [
        wf.map(own, range(3), array=large),
        wf.map(own, range(3), [large] * 3),
        wf.map(own, range(3), [made] * 3),
        [wf.add(own, i, array=made) for i in range(3)],
        wf.map(deep, [{"deep": [large]}] * 3, range(3)),
        [wf.add(deep, {"deep": [made]}, i) for i in range(3)],
        wf.map(fp.task(functools.partial(writes, array=large)).options(writable=True), range(3)),
    ]
    result = executor.run(wf, outputs="all")
    for key in keys:
        assert result[key] == [1.0] * 3
    assert result[made][0] == large[0] == 0.0
    assert not result[made].flags.writeable


def test_writable_goes_for_small_parts_of_large_arrays(executor):
    wf = fp.Workflow()
    part = wf.add(lambda array: array[:4], wf.add(np.zeros, 100_000))
    handle = wf.add(fp.task(writes).options(writable=True), 1, part)
    assert executor.run(wf)[handle] == 1.0


def test_writable_is_yes_or_no():
    with pytest.raises(fp.WorkflowError, match="writable must be True or False, got 'r'"):
        fp.task(writable="r")(abs)


# Executors


@pytest.mark.parametrize("start_method", METHODS)
def test_jobs_of_an_executor(start_method):
    with fp.ForgeExecutor(1, start_method=start_method) as executor:
        acc, bag, array = [], Bag(), np.zeros(3)
        assert [executor.submit(grown, acc, i).result() for i in range(3)] == [1] * 3
        held = functools.partial(grown, acc)
        assert [executor.submit(held, i).result() for i in range(3)] == [1] * 3
        put = executor.put(acc)
        assert [executor.submit(grown, put, i).result() for i in range(3)] == [1] * 3
        made = executor.submit(list)
        assert [executor.submit(grown, made, i).result() for i in range(3)] == [1] * 3
        for chunksize in (1, 2, 6):
            assert list(executor.map(held, range(6), chunksize=chunksize)) == [1] * 6
            for shared in (acc, bag, array, ([],)):
                found = list(executor.map(grown, [shared] * 6, range(6), chunksize=chunksize))
                assert found == [1] * 6, (shared, chunksize)
        with executor.sharing() as sharing:
            assert [sharing.submit(grown, acc, i).result() for i in range(3)] == [1] * 3
        large = np.zeros(1_000_000)
        own = fp.task(writes).options(writable=True)
        assert executor.submit(own, 1, large).result() == 1.0
        assert executor.submit(own, 1, array=large).result() == 1.0
        assert list(executor.map(own, range(4), [large] * 4, chunksize=2)) == [1.0] * 4
        with pytest.raises(ValueError, match="read-only"):
            executor.submit(writes, 1, large).result()


def test_nodes_of_a_dask_graph():
    pytest.importorskip("dask", reason="dask is not installed: pip install 'forgepar[dask]'")
    with fp.WorkflowExecutor(workers=1) as executor:
        graph = {"data": [1, 2], "bag": Bag(), **{f"a{i}": (grown, "data", i) for i in range(4)}}
        graph |= {f"b{i}": (grown, "bag", i) for i in range(4)} | {f"c{i}": (grown, "made", i) for i in range(4)}
        graph["made"] = (list, "data")
        keys = [f"{kind}{i}" for kind in "abc" for i in range(4)]
        assert fp.dask_get(graph, keys, pool=executor) == (3,) * 4 + (1,) * 4 + (3,) * 4


# What is told before


def finding_of(wf):
    found = [finding for finding in wf.check(workers=1) if finding.kind == "copied constant"]
    return found[0] if found else None


def test_check_names_tasks_that_copy_a_constant():
    wf = fp.Workflow()
    wf.map(grown_by_name, range(1000), acc=[])
    finding = finding_of(wf)
    assert len(finding.tasks) == 1000
    assert not finding.is_fatal
    assert re.search(r"each get a copy of the constant 'acc', .* B and \d+ us per task, \S+ s in all", finding.message)


@pytest.mark.parametrize(
    ("n_tasks", "fn", "constants", "is_told"),
    [
        (2, who, {"a": {i: str(i) for i in range(10_000)}}, True),
        (1000, functools.partial(grown, []), {}, True),
        (1000, functools.partial(grown, ()), {}, False),
        (999, who, {"a": []}, False),
        (1, who, {"a": ["x"] * 100_000}, False),
        (2000, who, FROZEN, False),
        (2000, who, {"a": np.zeros(10)}, True),
        (2, who, {"a": {"large": np.zeros(1_000_000)}}, False),
    ],
)
def test_check_tells_only_of_what_costs_something(n_tasks, fn, constants, is_told):
    wf = fp.Workflow()
    wf.map(fn, range(n_tasks), **constants)
    assert (finding_of(wf) is not None) == is_told


# The parts


@pytest.mark.parametrize(
    "value",
    [
        *FROZEN.values(),
        None,
        ...,
        1j,
        dt.datetime(2024, 1, 1, tzinfo=dt.UTC),
        pathlib.Path("a"),
        re.compile("a"),
        uuid.UUID(int=1),
        Colour.RED,
        np.float64(1),
        np.dtype("f8"),
        np.frombuffer(b"12345678"),
        len,
        functools.partial(grown, (1, 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_changed(value):
    if isinstance(value, np.ndarray) and value.flags.writeable:
        pytest.skip("it is read-only only where it has travelled")
    assert is_frozen(value)


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "value",
    [
        *(make() for make in CHANGEABLE.values()),
        (1, ([],)),
        frozenset([Bag()]),
        read_only(np.zeros(3)),
        read_only(np.zeros(3)[:]),
        np.frombuffer(bytearray(8)),
        read_only(np.array([[]], object)),
        [].append,
        Counter().step,
        functools.partial(grown, []),
        np.zeros(1, [("a", "i4")])[0],
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_can_be_changed(value):
    assert not is_frozen(value)


def test_copies_share_what_is_meant_by_its_name_and_what_cannot_be_written():
    class Local:
        seen = 0

    value = Local()
    value.fn, value.array, value.small = lambda: 1, np.frombuffer(bytes(100_000)), np.zeros(3)
    original = Original(value)
    value.small += 1
    first, second = original.copy(), original.copy()
    assert type(first) is type(second) is Local
    assert first.fn is second.fn is value.fn
    assert np.shares_memory(first.array, second.array)
    assert not np.shares_memory(first.small, second.small)
    assert first.small.flags.writeable
    assert first.small.sum() == 0


def test_rows_that_share_nothing_are_not_copied():
    rows = [([1], Bag(), np.zeros(3), 5) for _ in range(3)]
    assert fresh_rows(rows) is rows
    assert list(fresh_rows(rows[:1] * 1)) == rows[:1]
    shared = Bag(1)
    for within in (shared, [shared], {"a": (shared,)}, Bag(shared)):
        assert fresh_rows([(within, 1), ([shared], 2)]) is not rows
        first, second = fresh_rows([(within, 1), (within, 2)])
        assert first[0] is not second[0]


def test_a_partial_of_what_cannot_be_changed_is_called_itself():
    partial = functools.partial(grown, (1, "a", grown))
    assert renewing(partial) is partial
    assert renewing(grown) is grown
