"""Which tasks of a plan are the same as last time: a change goes on to all that follows, and to nothing else."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forgepar as fp
from forgepar.store.fingerprint.tasks import Fingerprints, followers


def double(x):
    return 2 * x


def add(*numbers, how=None, why=None):
    return sum(numbers)


def draw():
    return fp.context().rng().random()


def call(fn):
    return fn()


def fingerprints(wf: fp.Workflow, seed: int = 0) -> dict[str, bytes | None]:
    """The fingerprints of a workflow's tasks by their names."""
    plan = wf.plan()
    return {plan.name(task): found for task, found in enumerate(Fingerprints(plan, seed).of_task)}


def found(wf: fp.Workflow) -> Fingerprints:
    return Fingerprints(wf.plan(), 0)


def made(source: str, **scope: object) -> Callable[..., object]:
    scope["__name__"] = "made"
    exec(source, scope)  # noqa: S102
    return scope["f"]


# Two hundred tasks


def two_hundred(helper: int = 1, changed: int | None = None, comment: str = "", start: int = 0) -> fp.Workflow:
    """Twenty layers of ten tasks, each of two of the layer before; each column has a function of its own."""
    sources = [f"def f(x, y):\n    {comment}\n    return x + y + {column}\n" for column in range(10)]
    if changed is not None:
        sources[changed] = sources[changed].replace("x + y", "x - y")
    sources[3] += f"def g():\n    return {helper}\n"
    sources[3] = sources[3].replace("x + y", "x + y + g()")
    functions = [fp.task(made(source)).options(name=f"f{i}") for i, source in enumerate(sources)]
    wf = fp.Workflow()
    row = [wf.add(fp.task(functions[i]).options(name=f"0-{i}"), start + i, 1) for i in range(10)]
    for layer in range(1, 20):
        row = [wf.add(fp.task(functions[i]).options(name=f"{layer}-{i}"), row[i], row[(i + 1) % 10]) for i in range(10)]
    return wf


def changes(one: fp.Workflow, other: fp.Workflow) -> set[str]:
    before, after = fingerprints(one), fingerprints(other)
    assert list(before) == list(after)
    assert None not in before.values()
    return {name for name in before if before[name] != after[name]}


def follow(wf: fp.Workflow, names: set[str]) -> set[str]:
    plan = wf.plan()
    return {plan.name(task) for task in np.flatnonzero(followers(plan, [plan.find(name) for name in names]))}


def test_nothing_changes_by_itself_nor_by_a_comment():
    wf = two_hundred()
    assert changes(wf, two_hundred()) == changes(wf, two_hundred(comment="# said")) == set()
    assert len(set(fingerprints(wf).values())) == 200


@pytest.mark.parametrize("column", range(10))
def test_an_edited_function_changes_its_tasks_and_what_follows(column):
    wf = two_hundred()
    expected = follow(wf, {f"{layer}-{column}" for layer in range(20)})
    assert changes(wf, two_hundred(changed=column)) == expected
    assert len(expected) < 200


def test_an_edited_helper_changes_those_that_call_it_and_what_follows():
    wf = two_hundred()
    assert changes(wf, two_hundred(helper=2)) == follow(wf, {f"{layer}-3" for layer in range(20)})


def test_an_edited_argument_changes_its_task_and_what_follows():
    wf, other = fp.Workflow(), fp.Workflow()
    for target, second in ((wf, 2), (other, 3)):
        parts = target.map(double, [1, second, 4])
        pairs = target.map(add, [parts[0], parts[1]], [parts[2], parts[2]])
        target.add(add, *pairs)
    assert changes(wf, other) == {"double-1", "add-1", "add-2"}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_change_goes_to_all_that_follows_and_no_further(data):
    n = data.draw(st.integers(1, 12))
    edges = [data.draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else [] for i in range(n)]
    order = [data.draw(st.lists(st.integers(0, i - 1), max_size=2, unique=True)) if i else [] for i in range(n)]
    at = data.draw(st.integers(0, n - 1))

    def workflow(changed):
        wf, handles = fp.Workflow(), []
        for i in range(n):
            value = [i, "changed"] if changed and i == at else i
            options = fp.task(add).options(after=[handles[j] for j in order[i]], name=f"t{i}")
            handles.append(wf.add(options, value, *[handles[j] for j in edges[i]]))
        return wf

    assert changes(workflow(False), workflow(True)) == follow(workflow(False), {f"t{at}"})


# What counts


def one(fn: object, *args: object, **kwargs: object) -> bytes | None:
    wf = fp.Workflow()
    wf.add(fn, *args, **kwargs)
    return found(wf).of_task[0]


def test_what_counts_of_a_task():
    everything = [
        one(double, 1),
        one(double, 2),
        one(double, True),
        one(double, 1.0),
        one(double, "1"),
        one(double, None),
        one(double, x=1),
        one(double, [1]),
        one(double, (1,)),
        one(double, [[1]]),
        one(add, 1),
        one(add, 1, 2),
        one(add, 2, 1),
        one(add, [1], 2),
        one(add, 1, [2]),
        one(add, [1, 2]),
        one(add, b"\xff"),
        one(add),
        one(fp.task(double).options(version=1), 1),
        one(fp.task(double).options(version="1"), 1),
        one(fp.task(double).options(version=2), 1),
        one(functools.partial(double), 1),
        one(sum, [1]),
        one(max, [1]),
        one(double, np.arange(3)),
        one(double, np.arange(4)),
        one(double, double),
        one(double, add),
        one(fp.shell("a {x}"), 1),
        one(fp.shell("a {x}"), 2),
        one(fp.shell("b {x}"), 1),
    ]
    assert None not in everything
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "another"},
        {"retries": 3},
        {"backoff": 1.0},
        {"timeout": 5},
        {"memory": "1GiB"},
        {"effects": True},
        {"compensate": print},
        {"fallback": 7},
        {"version": None},
    ],
    ids=str,
)
def test_other_options_do_not_count(changes):
    assert one(fp.task(double).options(**changes), 1) == one(double, 1) == one(fp.task(double), 1)


def test_handles_at_any_depth_count():
    def wf(*argument):
        found = fp.Workflow()
        a, b = found.add(double, 1), found.add(double, 2)
        return found, found.add(call, argument[0](a, b)).index

    shapes = [
        lambda a, b: a,
        lambda a, b: b,
        lambda a, b: [a, b],
        lambda a, b: [b, a],
        lambda a, b: (a, b),
        lambda a, b: {"x": a, "y": b},
        lambda a, b: {"y": a, "x": b},
        lambda a, b: [a, [b]],
        lambda a, b: [[a], b],
        lambda a, b: [a, b, 1],
        lambda a, b: [a, b, 2],
        lambda a, b: [a, a],
        lambda a, b: 1,
    ]
    digests = []
    for shape in shapes:
        workflow, index = wf(shape)
        digests.append(found(workflow).of_task[index])
        again, index = wf(shape)
        assert found(again).of_task[index] == digests[-1]
    assert len(set(digests)) == len(shapes)


def test_constants_of_all_tasks_and_of_each():
    def wf(items, **constants):
        found = fp.Workflow()
        found.map(functools.partial(add), items, **constants)
        return found

    base = fingerprints(wf([1, [2], 3]))
    assert {n for n in base if base[n] != fingerprints(wf([1, [9], 3]))[n]} == {"add-1"}
    shared = fingerprints(wf([1, [2], 3], how=[1]))
    assert not set(shared.values()) & set(base.values())
    assert shared == fingerprints(wf([1, [2], 3], how=[1]))
    assert not set(shared.values()) & set(fingerprints(wf([1, [2], 3], how=[2])).values())
    assert not set(shared.values()) & set(fingerprints(wf([1, [2], 3], why=[1])).values())


class Counted:
    n = 0

    def __forgepar_fingerprint__(self):
        Counted.n += 1
        return 1


def test_an_argument_of_many_tasks_is_read_once():
    value, Counted.n = Counted(), 0
    wf = fp.Workflow()
    wf.map(add, range(50), how=value)
    wf.map(double, [value] * 50)
    wf.add(double, value)
    assert None not in found(wf).of_task
    assert Counted.n == 1


def test_files(tmp_path):
    path = tmp_path / "in"
    path.write_text("a")
    before = one(double, fp.File(path)), one(double, path)
    path.write_text("b")
    assert one(double, fp.File(path)) != before[0]
    assert one(double, path) == before[1]
    path.unlink()
    wf = fp.Workflow()
    wf.add(double, fp.File(path))
    assert re.fullmatch(
        r"its arguments: the file '.*in' cannot be read \(No such file or directory\)", found(wf).reasons[0]
    )


# Order without data


def test_what_is_waited_for_counts_though_no_value_is_taken():
    def wf(first=1, second=2, swap=False, twice=False):
        found = fp.Workflow()
        a, b = (
            found.add(fp.task(double).options(name=name), value)
            for name, value in sorted([("a", first), ("b", second)], reverse=swap)
        )
        a, b = (b, a) if swap else (a, b)
        last = found.add(fp.task(add).options(name="last", after=[b, a] if swap else [a, b]), 1)
        if twice:
            found.add_dependency(last, after=a)
        return fingerprints(found)["last"]

    plain = fp.Workflow()
    plain.add(add, 1)
    assert wf() == wf(swap=True) == wf(twice=True)
    assert len({wf(), wf(first=3), wf(second=3), found(plain).of_task[0]}) == 4


def test_waiting_is_not_taking():
    taken, waited = fp.Workflow(), fp.Workflow()
    for wf in (taken, waited):
        a = wf.add(double, 1)
        _ = wf.add(add, a) if wf is taken else wf.add(fp.task(add).options(after=a))
    assert fingerprints(taken)["add"] != fingerprints(waited)["add"]


# Tasks alike


def test_tasks_alike_are_numbered_as_they_were_declared():
    wf = fp.Workflow()
    alike = wf.map(double, [5, 5, 5])
    wf.map(add, alike)
    of_task = found(wf).of_task
    assert len(set(of_task)) == 6
    longer = fp.Workflow()
    longer.add(double, [7])  # not alike, and of a type that takes another way
    longer.add(fp.task(double).options(retries=1), 6)
    alike = longer.map(double, [5, 5, 5, 5])
    longer.map(add, alike)
    longer.add(sum, [1])
    assert found(longer).of_task[2:5] == of_task[:3]
    assert found(longer).of_task[6:9] == of_task[3:]


def test_templates_declared_in_another_order_number_tasks_alike_the_same():
    def wf(before):
        found = fp.Workflow()
        if before:
            found.add(double, 3)
        one = found.add(fp.task(double).options(retries=1, name="one"), 5)
        two = found.add(double, 5)
        found.add(fp.task(add).options(name="follows"), one)
        found.add(fp.task(add).options(name="after"), two)
        return fingerprints(found)

    assert wf(False)["follows"] == wf(True)["follows"]
    assert wf(False)["after"] == wf(True)["after"] != wf(True)["follows"]


@given(st.lists(st.sampled_from([1, 2, "a", None]), max_size=8), st.lists(st.sampled_from([[1], 3, (4,)]), max_size=4))
@settings(max_examples=40, deadline=None)
def test_unrelated_tasks_change_nothing(items, others):
    wf, more = fp.Workflow(), fp.Workflow()
    more.map(double, others)
    for target in (wf, more):
        target.map(add, items)
        target.map(functools.partial(add, 1), items)
    n = len(items) * 2
    assert found(more).of_task[len(others) :] == found(wf).of_task == found(wf).of_task[:n]
    assert len(set(found(more).of_task)) == n + len(others)


# Names, seeds


def test_a_new_name_or_seed_is_nothing_to_a_task_that_does_not_ask():
    one = fp.Workflow("one")
    one.add(add, one.add(fp.task(double).options(name="a"), 1))
    other = fp.Workflow("other")
    other.add(add, other.add(fp.task(double).options(name="b"), 1))
    assert Fingerprints(one.plan(), 1).of_task == Fingerprints(other.plan(), 2).of_task


def asking() -> list[fp.Workflow]:
    """Workflows of a task that asks for its context: itself, by its arguments, by what all tasks are given."""
    made = []
    for arguments in ([draw], [call, draw], [call, [draw]], [functools.partial(call, draw)]):
        wf = fp.Workflow()
        wf.add(fp.task(arguments[0]).options(name="a"), *arguments[1:])
        made.append(wf)
    wf = fp.Workflow()
    wf.map(fp.task(add).options(name="a"), [1], how=draw)
    return [*made, wf]


@pytest.mark.parametrize("number", range(5))
def test_the_name_and_the_seed_count_for_a_task_that_asks(number):
    wf = asking()[number]
    assert Fingerprints(wf.plan(), 0).of_task == Fingerprints(asking()[number].plan(), 0).of_task
    assert Fingerprints(wf.plan(), 0).of_task != Fingerprints(wf.plan(), 1).of_task
    longer = fp.Workflow()
    longer.include(wf, prefix="in")
    assert Fingerprints(longer.plan(), 0).of_task != Fingerprints(wf.plan(), 0).of_task


# Tasks without


def test_tasks_that_are_not_to_be_kept_and_what_follows():
    wf = fp.Workflow()
    a = wf.add(fp.task(double).options(cache=False, name="a"), 1)
    b = wf.add(fp.task(double).options(name="b"), a)
    wf.add(fp.task(double).options(name="c", after=b), 2)
    wf.add(fp.task(double).options(name="d"), 3)
    result = found(wf)
    assert [fingerprint is None for fingerprint in result.of_task] == [True, True, True, False]
    assert result.reasons == {0: "it is declared with cache=False", 1: "it follows 'a'", 2: "it follows 'b'"}
    assert result.declared == {0, 1, 2}


class Broken:
    def __reduce_ex__(self, protocol):
        raise RuntimeError("out of order")


def test_the_reasons_name_what_cannot_be_compared():
    lock = threading.Lock()
    locked = made("def f(x):\n    with LOCK: return x", LOCK=lock)
    wf = fp.Workflow()
    a = wf.add(locked, 1)
    b = wf.add(double, lock)
    wf.map(add, [1, [lock]], how=1)
    wf.map(add, [1], how=Broken())
    wf.add(add, a, b)
    wf.add(fp.task(locked).options(version=1), 1)
    wf.add(fp.task(add).options(cache=False), lock)
    result = found(wf)
    lock_text = "a _thread.lock cannot be compared (cannot pickle '_thread.lock' object)"
    assert result.reasons == {
        0: f"the code of 'f': its global 'LOCK': {lock_text}",
        1: f"its arguments: {lock_text}",
        3: f"its arguments: {lock_text}",
        4: "its arguments: a test_fingerprint_tasks.Broken cannot be compared (out of order)",
        5: "it follows 'f'",
        7: "it is declared with cache=False",
    }
    assert result.declared == {7}
    assert [task for task, fingerprint in enumerate(result.of_task) if fingerprint is None] == sorted(result.reasons)


def test_a_version_of_one_use_is_nothing_to_another():
    lock = threading.Lock()
    locked = made("def f(x):\n    with LOCK: return x", LOCK=lock)
    wf, other = fp.Workflow(), fp.Workflow()
    wf.add(fp.task(locked).options(version=1, name="a"), 1)
    wf.add(fp.task(locked).options(name="b"), 1)
    other.add(fp.task(locked).options(name="b"), 1)
    other.add(fp.task(locked).options(version=1, name="a"), 1)
    assert fingerprints(wf) == dict(sorted(fingerprints(other).items()))
    assert fingerprints(wf)["b"] is None


def test_two_versions_of_one_function_do_not_touch_each_other():
    wf, alone = fp.Workflow(), fp.Workflow()
    wf.add(fp.task(double).options(version=1), 1)
    wf.add(fp.task(double).options(version=2), 1)
    alone.add(fp.task(double).options(version=2), 1)
    assert found(wf).of_task[1] == found(alone).of_task[0] != found(wf).of_task[0]


# Tasks that turn out to be several


def spliced(inner: fp.Workflow) -> Fingerprints:
    """Fingerprints of a task, what waits for it, and another, once the first was several."""
    wf = fp.Workflow()
    a = wf.add(fp.task(double).options(name="a"), 1)
    wf.add(fp.task(add).options(name="b"), a)
    wf.add(fp.task(add).options(name="c"), 3)
    plan = wf.plan()
    result = Fingerprints(plan, 0)
    before = list(result.of_task)
    result.grow(plan.spliced(0, inner))
    assert all(new in (old, None) for new, old in zip(result.of_task, before, strict=False))
    return result


def test_growing_adds_fingerprints_and_changes_none():
    inner = fp.Workflow()
    inner.add(add, inner.map(double, [1, 1]))
    result = spliced(inner)
    assert len(set(result.of_task)) == 6
    assert result.reasons == {}
    again = spliced(inner)
    assert again.of_task == result.of_task
    changed = fp.Workflow()
    changed.add(add, changed.map(double, [1, 2]))
    assert [a == b for a, b in zip(spliced(changed).of_task, result.of_task, strict=True)] == [True] * 4 + [False] * 2


def test_tasks_alike_are_numbered_on_when_a_plan_grows():
    wf = fp.Workflow()
    wf.add(double, 1)
    plan = wf.plan()
    result = Fingerprints(plan, 0)
    for _ in range(3):
        inner = fp.Workflow()
        inner.map(double, [7, 7])
        plan = plan.spliced(plan.n_tasks - 1, inner)
        result.grow(plan)
    assert len(set(result.of_task)) == 7


@pytest.mark.parametrize("at", [0, 1])
def test_what_waits_for_tasks_without_has_none_either(at):
    inner = fp.Workflow()
    options: list[dict[str, bool]] = [{}, {}]
    options[at] = {"cache": False}
    inner.add(fp.task(add).options(**options[1]), inner.add(fp.task(double).options(**options[0]), 1))
    result = spliced(inner)
    assert [fingerprint is None for fingerprint in result.of_task] == [False, True, False, at == 0, True]
    assert result.reasons[1] == "it follows 'a/double'" if at == 0 else "it follows 'a/add'"
    assert result.declared == {1, 4} | ({3} if at == 0 else set())


def test_an_option_of_what_is_fanned_out_is_that_of_the_whole():
    wf = fp.Workflow()
    items = wf.add(list, "ab")
    kept, not_kept = wf.map(double, items), wf.map(fp.task(double).options(cache=False, name="n"), items)
    result = found(wf)
    assert result.of_task[kept.index] is not None
    assert result.reasons[not_kept.index] == "it is declared with cache=False"


def test_a_new_name_of_what_is_fanned_out_changes_nothing():
    one, other = fp.Workflow(), fp.Workflow()
    one.map(double, one.add(list, "ab"))
    other.map(fp.task(double).options(name="twice", retries=1), other.add(list, "ab"))
    assert found(one).of_task == found(other).of_task
    versions = []
    for version in (1, 2):
        wf = fp.Workflow()
        wf.map(fp.task(double).options(version=version), wf.add(list, "ab"))
        versions.append(found(wf).of_task[1])
    assert versions[0] != versions[1]


# Size


def test_a_large_plan():
    wf = fp.Workflow()
    wf.map(double, range(20_000))
    assert len(set(found(wf).of_task)) == 20_000


def test_followers():
    wf = fp.Workflow()
    a = wf.add(double, 1)
    b = wf.add(double, a)
    wf.add(double, 2)
    wf.add(double, b)
    assert followers(wf.plan(), [1]).tolist() == [False, True, False, True]
    assert followers(wf.plan(), []).tolist() == [False] * 4
