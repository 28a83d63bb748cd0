"""Arguments are told to be wrong where a task is declared; what is doubtful is left to the call itself."""

from __future__ import annotations

import functools
import operator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import forgepar as fp
from forgepar.workflow.binding import call_error


def one(x):
    return x


def some(x, y=2, *, z=3):
    return x


def any_of(*args, **kwargs):
    return args


def positional(x, y=1, /, z=2):
    return x


def needs_keyword(x, *, key):
    return x


@functools.wraps(one)
def wrapper(*args):
    return one(args[0])


@functools.wraps(some)
def narrow(x):  # what it wraps takes more
    return some(x)


class Thing:
    def __init__(self, size):
        self.size = size

    def __call__(self, x, y):
        return x, y

    def method(self, x, key=None):
        return x, key

    @classmethod
    def made(cls, size):
        return cls(size)

    @staticmethod
    def plain(x):
        return x


class Meta(type):
    def __call__(cls, *args):
        return args


class Free(metaclass=Meta):
    def __init__(self):
        pass


CALLABLES = [
    one, some, any_of, positional, needs_keyword, wrapper, narrow, Thing, Thing(1), Thing(1).method, Thing.made,
    Thing.plain, Free, abs, int, dict, pow, max, np.add, operator.itemgetter(0), functools.partial(some, 1),
    functools.partial(some, y=1), functools.partial(some, 1, z=2), functools.partial(any_of, 1, k=1),
    functools.partial(positional, 1), functools.partial(functools.partial(some, x=1), z=3), lambda: None,
    lambda a, b=1, *c, d, e=2, **f: None,
]  # fmt: skip


@given(st.sampled_from(CALLABLES), st.integers(0, 5), st.sets(st.sampled_from("xyzabdek")))
def test_nothing_is_refused_that_python_would_call(fn, n_positional, keywords):
    """Each callable is replaced, as far as that goes, by its signature alone: Python itself binds the arguments."""
    refused = call_error(fn, n_positional, keywords)
    if refused is None:
        return
    with pytest.raises(TypeError):
        fn(*[1] * n_positional, **dict.fromkeys(keywords, 1))


@pytest.mark.parametrize(
    ("fn", "n", "keywords", "fault"),
    [
        (one, 0, (), "missing a required argument: 'x'"),
        (one, 2, (), "too many positional arguments"),
        (one, 1, ("x",), "multiple values for argument 'x'"),
        (some, 1, ("retries",), "got an unexpected keyword argument 'retries'"),
        (needs_keyword, 1, (), "missing a required.*argument: 'key'"),
        (narrow, 1, ("y",), "got an unexpected keyword argument 'y'"),
        (Thing, 0, (), "missing a required argument: 'size'"),
        (Thing(1), 1, (), "missing a required argument: 'y'"),
        (Thing(1).method, 1, ("size",), "got an unexpected keyword argument 'size'"),
        (functools.partial(some, 1, 2), 1, (), "too many positional arguments"),
        (abs, 2, (), "too many positional arguments"),
    ],
)
def test_what_python_would_refuse_is_refused_at_once(fn, n, keywords, fault):
    wf = fp.Workflow()
    for fn_or_task in (fn, fp.task(fn)):
        with pytest.raises(fp.WorkflowError, match=rf"cannot be called with these arguments: .*{fault}"):
            wf.add(fn_or_task, *[1] * n, **dict.fromkeys(keywords, 1))
        if n:
            with pytest.raises(fp.WorkflowError, match=fault):
                wf.map(fn_or_task, *[[1, 2]] * n, **dict.fromkeys(keywords, 1))
    assert len(wf) == 0


def test_an_option_of_tasks_among_the_arguments_is_told_as_that():
    wf = fp.Workflow()
    with pytest.raises(fp.WorkflowError, match=r"To set a task option, use fp\.task\(one\)\.options\(retries=\.\.\.\)"):
        wf.add(one, 1, retries=2)
    with pytest.raises(fp.WorkflowError, match=r"options\(timeout=\.\.\.\)"):
        wf.map(one, [1], timeout=2)
    with pytest.raises(fp.WorkflowError, match="too many positional"):
        wf.map(one, wf.add(list, "ab"), wf.add(list, "ab"))


# Handles in the place of values


@pytest.fixture
def handle():
    return fp.Workflow().add(list, "abc")


def test_a_handle_is_neither_true_nor_false(handle):
    with pytest.raises(fp.WorkflowError, match="neither true nor false"):
        bool(handle)


def test_a_handle_is_no_part_of_a_text(handle):
    with pytest.raises(fp.WorkflowError, match="cannot be formatted"):
        f"{handle}"
    assert str(handle) == repr(handle) == f"{handle!r}" == "<TaskHandle 'list'>"


def test_a_handle_has_no_attributes_of_its_value(handle):
    with pytest.raises(AttributeError, match=r"wf\.add\(operator\.attrgetter\('size'\), handle\)"):
        handle.size  # noqa: B018
    assert not hasattr(handle, "shape")


def test_a_handle_is_not_gone_through(handle):
    for go in (iter, list, tuple, lambda h: [*h], lambda h: 1 in h, len, reversed):
        with pytest.raises(TypeError):
            go(handle)
    assert len(handle.workflow) == 1


@pytest.mark.parametrize(("index", "item"), [(1, "b"), (-1, "c"), (slice(1, None), ["b", "c"])])
def test_an_item_of_a_handle_is_a_task(handle, index, item, either_backend):
    wf = handle.workflow
    taken = handle[index]
    assert wf.run(**either_backend)[taken] == item


def test_the_index_may_be_a_handle(handle):
    wf = handle.workflow
    taken = handle[wf.add(abs, -2)]
    assert wf.run(backend="inline")[taken] == "c"


def test_a_constant_in_the_place_of_items_is_told_to_go_by_keyword():
    wf = fp.Workflow()
    with pytest.raises(fp.WorkflowError, match=r"iterables\[1\] of map\(\) must be iterable.* by keyword, got 10"):
        wf.map(some, [1, 2], 10)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def test_what_is_nested_too_deeply_is_told_with_its_task():
    wf = fp.Workflow()
    for declare in (lambda: wf.add(one, nested(10_000)), lambda: wf.map(one, [1, nested(10_000)])):
        with pytest.raises(fp.WorkflowError, match="An argument of task 'one' is nested too deeply"):
            declare()
    with fp.ForgeExecutor(1, start_method="fork") as executor:
        error = executor.submit(one, nested(10_000)).exception()
        assert isinstance(error, RecursionError)
        assert "args[0] is a list that cannot be pickled" in str(error.__notes__)
        assert executor.submit(one, 2).result() == 2
