"""Declaring: names, templates, handles, options, and what is refused."""

from __future__ import annotations

import asyncio
import functools
import pickle
import threading
from dataclasses import dataclass, replace
from typing import Any

import cloudpickle
import pytest

import forgepar as fp
from forgepar.workflow.tasks import base_name


def load(x: Any = None) -> Any:
    """Load it."""
    return x


def join(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


@fp.task
def marked(x: Any = None) -> Any:
    """Marked."""
    return x


@fp.task(retries=2)
def retried(x: Any = None) -> Any:
    return x


async def wait(x: Any = None) -> None:
    await asyncio.sleep(0)


async def wait_often(x: Any = None) -> Any:
    yield x


class Loader:
    """A callable instance with methods, and attributes of its own."""

    def __init__(self) -> None:
        self.options = {"mine": 1}

    def __call__(self, x: Any = None) -> Any:
        return x

    def read(self, x: Any = None) -> Any:
        return x


@dataclass
class Box:
    content: Any


def names(workflow: fp.Workflow) -> list[str]:
    return [workflow.task_name(i) for i in range(len(workflow))]


def state_of(workflow: fp.Workflow) -> tuple[int, list[str], Any]:
    """What a user sees of a workflow."""
    return len(workflow), names(workflow), workflow.execution_layers()


def foreign() -> fp.TaskHandle:
    return fp.Workflow("other").add(load, 1)


def foreign_many() -> fp.TaskHandles:
    return fp.Workflow("other").map(load, range(2))


# Names


@pytest.mark.parametrize(
    ("fn", "base"),
    [
        (load, "load"),
        (lambda x: x, "lambda"),
        (functools.partial(load), "load"),
        (functools.partial(functools.partial(lambda x, y, z: x, 1), 2), "lambda"),
        (functools.partial(marked), "marked"),
        (Loader(), "Loader"),
        (Loader().read, "read"),
        (Box, "Box"),
        (marked, "marked"),
        (fp.task(Loader()), "Loader"),
        (len, "len"),
        ([].append, "append"),
    ],
)
def test_names_derive_from_the_callable(fn, base):
    wf = fp.Workflow()
    wf.add(fn, 1)
    wf.map(fn, range(2))
    wf.add(fn, 1)
    assert names(wf) == [base, f"{base}-1", f"{base}-2", f"{base}-3"]
    assert base_name(fn) == base


def test_a_map_is_numbered_from_zero_even_with_one_item():
    wf = fp.Workflow()
    assert [handle.name for handle in wf.map(load, [1])] == ["load-0"]
    assert [handle.name for handle in wf.map(load, [1, 2])] == ["load-1", "load-2"]
    assert wf.add(load, 1).name == "load-3"


def test_callables_of_one_name_share_its_numbers():
    wf = fp.Workflow()
    wf.add(lambda: 1)
    wf.add(lambda: 2)
    assert names(wf) == ["lambda", "lambda-1"]


def test_a_given_name_is_the_task_of_add_and_the_stem_of_map():
    wf = fp.Workflow()
    wf.add(fp.task(load, name="first"))
    wf.map(fp.task(load, name="each"), range(2))
    wf.add(load)
    assert names(wf) == ["first", "each-0", "each-1", "load"]


def test_names_lead_back_to_handles():
    wf = fp.Workflow()
    handles = [wf.add(load), wf.add(load), wf.add(fp.task(load, name="own")), *wf.map(join, range(3))]
    assert [wf.handle(handle.name) for handle in handles] == handles


@pytest.mark.parametrize("name", ["nothing", "load-0", "load-7", "load-01", "load--1", "load-", "", "own-0"])
def test_an_unknown_name_is_told(name):
    wf = fp.Workflow("mine")
    wf.add(load)
    wf.add(load)
    wf.add(fp.task(load, name="own"))
    with pytest.raises(fp.UnknownTask, match="Workflow 'mine' has no task named"):
        wf.handle(name)


def test_a_number_too_long_for_an_integer_is_an_unknown_name():
    wf = fp.Workflow()
    wf.add(load)
    with pytest.raises(fp.UnknownTask):
        wf.handle("load-" + "9" * 5000)


def test_a_name_can_be_given_once():
    wf = fp.Workflow()
    named = fp.task(load, name="own")
    wf.add(named)
    before = state_of(wf)
    with pytest.raises(fp.DuplicateTaskName, match="'own'") as caught:
        wf.add(named)
    assert caught.value.name == "own"
    with pytest.raises(fp.DuplicateTaskName):
        wf.add(fp.task(join, name="own"))
    assert state_of(wf) == before


@pytest.mark.parametrize("name", ["load", "load-1"])
def test_a_given_name_that_another_task_derives_is_refused_before_the_run(name):
    wf = fp.Workflow()
    wf.add(load)
    wf.add(load)
    wf.add(fp.task(join, name=name))
    for look in (wf.check_runnable, wf.execution_layers, lambda: wf.run(backend="inline")):
        with pytest.raises(fp.DuplicateTaskName, match=f"'{name}'") as caught:
            look()
        assert caught.value.name == name


def test_a_derived_name_after_the_given_one_is_numbered():
    wf = fp.Workflow()
    wf.add(fp.task(join, name="load"))
    wf.add(load)
    assert wf.execution_layers() == [["load", "load-1"]]


def test_reprs_name_what_they_show():
    wf = fp.Workflow("nightly")
    handles = wf.map(load, range(3))
    assert repr(wf) == "<Workflow 'nightly' of 3 tasks>"
    assert repr(handles) == "<TaskHandles of 3 tasks>"
    assert repr(handles[1]) == "<TaskHandle 'load-1'>"
    assert repr(marked) == "task(marked)"


# Templates


def test_tasks_declared_alike_share_a_template():
    wf = fp.Workflow()
    first = wf.add(load, 1)
    for i in range(5):
        wf.add(load, i)
        wf.add(load, first)
        wf.add(load, x=i)
    assert len(wf.specs) == 1
    assert len(wf.templates) == 3


def test_methods_are_told_apart_by_their_object():
    wf = fp.Workflow()
    one, other = Loader(), Loader()
    for loader in (one, other, one, other):
        wf.add(loader.read, 1)
    assert [spec.fn.__self__ for spec in wf.specs] == [one, other]


def test_methods_of_objects_that_are_gone_are_not_taken_for_others():
    wf = fp.Workflow()
    handles = [wf.add(Loader().read, i) for i in range(50)]
    assert len({id(spec.fn.__self__) for spec in wf.specs}) == len(handles)


def test_a_map_over_mixed_items_has_a_template_for_each_mix():
    wf = fp.Workflow()
    one = wf.add(load, 1)
    wf.map(join, [1, one, 2, [one], one], range(5))
    assert len({wf.templates[template].layout for template in wf.template_of[1:]}) == 3


# Handles


def test_handles_of_a_map_are_a_sequence():
    wf = fp.Workflow()
    handles = wf.map(load, range(5))
    as_list = [wf.handle(f"load-{i}") for i in range(5)]
    assert list(handles) == as_list
    assert len(handles) == 5
    assert (handles[0], handles[-1]) == (as_list[0], as_list[-1])
    assert list(reversed(handles)) == as_list[::-1]
    assert handles.index(as_list[2]) == 2
    assert as_list[3] in handles
    with pytest.raises(IndexError):
        handles[5]


@pytest.mark.parametrize("part", [slice(1, 3), slice(None, None, 2), slice(None, None, -1), slice(9, 12)])
def test_slices_of_handles_are_handles(part):
    handles = fp.Workflow().map(load, range(5))
    assert type(handles[part]) is fp.TaskHandles
    assert list(handles[part]) == list(handles)[part]


def test_a_million_handles_are_not_made_before_they_are_looked_at():
    handles = fp.TaskHandles(fp.Workflow(), range(10**12))
    assert len(handles[5:]) == 10**12 - 5
    assert handles[-1].index == 10**12 - 1


def test_handles_add_up_to_lists():
    wf = fp.Workflow()
    one, some, more = wf.add(load), wf.map(load, range(2)), wf.map(load, range(2))
    assert some + more == [*some, *more]
    assert some + [one] == [*some, one]  # noqa: RUF005
    assert [one] + some == [one, *some]  # noqa: RUF005


def test_handles_are_equal_where_they_mean_the_same_tasks():
    wf, other = fp.Workflow(), fp.Workflow()
    some, others = wf.map(load, range(3)), other.map(load, range(3))
    assert some[1:] == some[1:]
    assert hash(some[1:]) == hash(some[1:])
    assert some == list(some)
    assert some != others
    assert some != some[1:]
    assert some[0] == some[0]
    assert hash(some[0]) == hash(some[0])
    assert some[0] != others[0]
    assert some[0] != 0
    assert some != "abc"
    assert len({*some, *some, *others}) == 6


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_handles_refuse_pickling_and_say_where_they_are_found(pickler):
    handles = fp.Workflow().map(load, range(2))
    for value in (handles, handles[0], [handles[1]]):
        with pytest.raises(TypeError, match=r"lists, tuples, dict values and dataclass fields"):
            pickler.dumps(value)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (lambda one, some: one, 0),
        (lambda one, some: some, [1, 2]),
        (lambda one, some: some[1:], [2]),
        (lambda one, some: [one, some], [0, [1, 2]]),
        (lambda one, some: (some[0], "x", [one]), (1, "x", [0])),
        (lambda one, some: {"a": one, "b": {"c": some}}, {"a": 0, "b": {"c": [1, 2]}}),
        (lambda one, some: Box([one]), Box([0])),
        (lambda one, some: [], []),
        (lambda one, some: some[:0], []),
        (lambda one, some: [some[:0], one], [[], 0]),
        (lambda one, some: [some[:0]], [[]]),
        (lambda one, some: {"none": some[:0]}, {"none": []}),
    ],
)
@pytest.mark.parametrize("declare", ["positional", "keyword", "map"])
def test_values_stand_where_handles_stood(place, expected, declare):
    wf = fp.Workflow()
    one, some = wf.add(load, 0), wf.map(load, [1, 2])
    argument = place(one, some)
    if declare == "positional":
        last = wf.add(load, argument)
    elif declare == "keyword":
        last = wf.add(load, x=argument)
    else:
        last = wf.map(load, [argument])[0]
    assert wf.run(backend="inline")[last] == expected


def test_a_map_over_handles_takes_them_row_by_row():
    wf = fp.Workflow()
    some = wf.map(load, range(3))
    rows = wf.map(join, some, "abc", some[::-1], [some[0], 7, (some[1],)], shared="s")
    assert wf.run(backend="inline")[rows] == [
        ((0, "a", 2, 0), {"shared": "s"}),
        ((1, "b", 1, 7), {"shared": "s"}),
        ((2, "c", 0, (1,)), {"shared": "s"}),
    ]


def test_a_map_over_no_items_has_no_tasks():
    wf = fp.Workflow()
    wf.add(load)
    assert len(wf.map(load, [])) == 0
    assert names(wf) == ["load"]


def test_a_map_takes_any_iterable_once():
    wf = fp.Workflow()
    handles = wf.map(load, (i * i for i in range(3)))
    assert wf.run(backend="inline")[handles] == [0, 1, 4]


# Layers and order without data


def diamond() -> tuple[fp.Workflow, list[fp.TaskHandle]]:
    wf = fp.Workflow()
    top = wf.add(fp.task(load, name="top"), 1)
    left, right = wf.add(fp.task(load, name="left"), top), wf.add(fp.task(load, name="right"), top)
    return wf, [top, left, right, wf.add(fp.task(join, name="bottom"), left, [right])]


def test_layers_of_the_diamond():
    wf, _ = diamond()
    assert wf.execution_layers() == [["top"], ["left", "right"], ["bottom"]]


def test_layers_follow_what_is_added_later():
    wf, handles = diamond()
    wf.execution_layers()
    wf.add(load, handles[-1])
    assert wf.execution_layers()[-1] == ["load"]
    wf.add_dependency("right", after="left")
    assert wf.execution_layers() == [["top"], ["left"], ["right"], ["bottom"], ["load"]]


def test_an_empty_workflow_is_refused():
    wf = fp.Workflow("mine")
    for look in (wf.execution_layers, wf.check_runnable, lambda: wf.run(backend="inline")):
        with pytest.raises(fp.EmptyWorkflow, match="Workflow 'mine' has no tasks"):
            look()


def test_after_orders_without_passing_a_value():
    wf = fp.Workflow()
    some, one = wf.map(load, range(2)), wf.add(load)
    wf.add(fp.task(join, after=some))
    wf.add(fp.task(join, after=[one, some[1:]]))
    wf.map(fp.task(join, after=one), range(2))
    later = [wf.handle(name) for name in ("join", "join-1", "join-2", "join-3")]
    assert wf.execution_layers()[1] == [handle.name for handle in later]
    assert wf.run(backend="inline")[later] == [((), {}), ((), {}), ((0,), {}), ((1,), {})]


def test_add_dependency_takes_handles_and_names():
    wf = fp.Workflow()
    one, two, three = wf.map(load, range(3))
    wf.add_dependency(two, one)
    wf.add_dependency("load-2", after=two.name)
    assert wf.execution_layers() == [["load-0"], ["load-1"], ["load-2"]]
    assert wf.run(backend="inline")[three] == 2


def test_a_task_cannot_wait_for_itself():
    wf, handles = diamond()
    before = state_of(wf)
    with pytest.raises(fp.CyclicWorkflow, match="Task 'left' cannot wait for itself") as caught:
        wf.add_dependency("left", handles[1])
    assert caught.value.cycle == ["left"]
    assert state_of(wf) == before


def test_a_cycle_is_told_with_its_path():
    wf, handles = diamond()
    wf.add_dependency(handles[0], after=handles[3])
    for look in (wf.execution_layers, lambda: wf.run(backend="inline")):
        with pytest.raises(fp.CyclicWorkflow) as caught:
            look()
        cycle = caught.value.cycle
        assert cycle in rotations("top", "left", "bottom") + rotations("top", "right", "bottom")
        assert " -> ".join([*cycle, cycle[0]]) in str(caught.value)


def rotations(*names: str) -> list[list[str]]:
    return [[*names[i:], *names[:i]] for i in range(len(names))]


def test_a_cycle_is_found_by_the_check_for_running():
    wf, handles = diamond()
    wf.add_dependency(handles[0], after=handles[3])
    with pytest.raises(fp.CyclicWorkflow):
        wf.check_runnable()


def test_add_dependency_needs_tasks_that_are_there():
    wf, _ = diamond()
    before = state_of(wf)
    with pytest.raises(fp.UnknownTask, match="'nothing'"):
        wf.add_dependency("top", "nothing")
    with pytest.raises(fp.UnknownTask, match="'nothing'"):
        wf.add_dependency("nothing", "top")
    assert state_of(wf) == before


# What is refused, and leaves nothing behind


@pytest.mark.parametrize(
    "declare",
    [
        lambda wf, own: wf.add(join, own, foreign()),
        lambda wf, own: wf.add(join, own, foreign_many()),
        lambda wf, own: wf.add(join, own, [{"a": (foreign(),)}]),
        lambda wf, own: wf.add(join, own, Box(foreign())),
        lambda wf, own: wf.add(join, key=foreign()),
        lambda wf, own: wf.add(fp.task(join, after=[own, foreign()], name="new")),
        lambda wf, own: wf.add(fp.task(join, after=foreign_many(), name="new")),
        lambda wf, own: wf.map(join, foreign_many()),
        lambda wf, own: wf.map(join, range(2), foreign_many()),
        lambda wf, own: wf.map(join, [own, foreign()]),
        lambda wf, own: wf.map(join, [own, [foreign_many()]], [1, 2]),
        lambda wf, own: wf.map(join, [1, 2], key=foreign()),
        lambda wf, own: wf.map(join, [1, 2], key=[foreign_many()]),
        lambda wf, own: wf.map(fp.task(join, after=foreign()), [1, 2]),
        lambda wf, own: wf.add_dependency(own, foreign()),
        lambda wf, own: wf.add_dependency(foreign(), own),
        lambda wf, own: wf.run(backend="inline", outputs=foreign()),
        lambda wf, own: wf.run(backend="inline", outputs=[own, foreign()]),
        lambda wf, own: wf.run(backend="inline", outputs=foreign_many()),
    ],
)
def test_a_handle_of_another_workflow_is_refused(declare):
    wf, handles = diamond()
    before = state_of(wf)
    with pytest.raises(fp.ForeignHandle, match="belongs to workflow 'other', not to 'workflow'"):
        declare(wf, handles[0])
    assert state_of(wf) == before
    assert wf.add(fp.task(join, name="new")).name == "new"


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda wf, own: wf.add(wait), "async function.*asyncio.run"),
        (lambda wf, own: wf.map(wait_often, [1]), "async function"),
        (lambda wf, own: wf.add(functools.partial(wait, 1)), "async function"),
        (lambda wf, own: wf.add(fp.task(wait)), "async function"),
        (lambda wf, own: wf.add(3), "fn must be callable, got 3"),
        (lambda wf, own: wf.map("abc", [1]), "fn must be callable, got 'abc'"),
        (lambda wf, own: wf.map(load), "got no iterables"),
        (lambda wf, own: wf.map(join, [1, 2], [own]), r"must have equal lengths, got lengths \[1, 2\]"),
        (lambda wf, own: wf.map(join, [1, 2], key=own), "constant 'key' of map.. must not contain handles"),
        (lambda wf, own: wf.map(join, [1, 2], key=[{"a": own}]), "constant 'key' of map.. must not contain handles"),
        (
            lambda wf, own: wf.map(join, [1, 2], key=wf.map(load, [])),
            "constant 'key' of map.. must not contain handles",
        ),
        (
            lambda wf, own: wf.map(join, [1, 2], key=[wf.map(load, [])]),
            "constant 'key' of map.. must not contain handles",
        ),
    ],
)
def test_what_cannot_be_a_task_is_refused_and_leaves_nothing(declare, message):
    wf, handles = diamond()
    before = state_of(wf)
    with pytest.raises(fp.WorkflowError, match=message):
        declare(wf, handles[0])
    assert state_of(wf) == before


def test_what_a_refused_declaration_brought_is_not_part_of_a_run():
    """A callable that cannot travel is no fault of a workflow that has no task of it."""
    lock = threading.Lock()
    wf, _ = diamond()
    with pytest.raises(fp.ForeignHandle):
        wf.add(lambda x: lock, foreign())
    assert len(wf.map(lambda x: lock, [])) == 0
    assert wf.run(backend="inline")["bottom"] == ((1, [1]), {})


# Tasks and their options


def test_a_task_is_called_as_its_function_was():
    assert marked(3) == 3
    assert retried(x=4) == 4
    assert marked.fn(3) == 3


def test_a_task_keeps_its_functions_metadata():
    assert (marked.__name__, marked.__doc__, marked.__module__, marked.__qualname__) == (
        "marked",
        "Marked.",
        __name__,
        "marked",
    )


def test_task_decorates_with_and_without_options():
    assert marked.task_options == fp.Options()
    assert retried.task_options == fp.Options(retries=2)
    assert fp.task(load, retries=1, name="n").task_options == fp.Options(retries=1, name="n")


def test_options_derive_a_task_and_leave_the_first():
    derived = retried.options(name="other")
    assert derived.task_options == fp.Options(retries=2, name="other")
    assert derived.fn is retried.fn
    assert retried.task_options == fp.Options(retries=2)
    assert fp.task(derived, retries=0).task_options == fp.Options(name="other")


def test_a_callables_own_attributes_do_not_hide_a_tasks_methods():
    derived = fp.task(Loader()).options(retries=3)
    assert derived.task_options.retries == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: fp.task(nothing=1)(load),
        lambda: fp.task(load, nothing=1),
        lambda: fp.task(marked, nothing=1),
        lambda: marked.options(nothing=1),
    ],
)
def test_an_option_that_is_none_is_refused_with_those_there_are(make):
    with pytest.raises(fp.WorkflowError, match=r"Tasks have no option nothing=\. The options are name, after, retries"):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retries": -1}, "retries must be an integer of at least 0, got -1"),
        ({"retries": 1.5}, "retries must be an integer of at least 0, got 1.5"),
        ({"retries": "2"}, "retries must be an integer of at least 0, got '2'"),
        ({"retries": None}, "retries must be an integer of at least 0, got None"),
        ({"name": ""}, "name must be a non-empty string, got ''"),
        ({"name": 3}, "name must be a non-empty string, got 3"),
        ({"after": ["load"]}, "after must be a handle or several, .*, got 'load'"),
        ({"after": "load"}, "after must be a handle or several, .*, got 'l'"),
        ({"after": 3}, "after must be a handle or several, .*, got 3"),
        ({"after": None}, "after must be a handle or several, .*, got None"),
    ],
)
def test_an_option_of_a_wrong_value_is_refused(options, message):
    with pytest.raises(fp.WorkflowError, match=message):
        fp.task(load, **options)


def test_only_callables_become_tasks():
    with pytest.raises(fp.WorkflowError, match="fn must be callable, got 3"):
        fp.task(3)


def test_options_are_made_tuples_and_equal_by_value():
    handle = foreign()
    options = fp.Options(after=[handle])
    assert options == fp.Options(after=handle)
    assert hash(options) == hash(replace(options))
    assert options.after == (handle,)


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
@pytest.mark.parametrize("given", [marked, retried])
def test_a_task_of_a_module_is_pickled_by_name(given, pickler):
    assert pickle.loads(pickler.dumps(given)) is given
    assert pickle.loads(pickler.dumps([given]))[0] is given


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_a_task_derived_from_one_of_a_module_finds_its_function_by_name(pickler):
    loaded = pickle.loads(pickler.dumps(retried.options(name="other")))
    assert loaded.fn is retried.fn
    assert loaded.task_options == fp.Options(retries=2, name="other")


def test_a_task_made_elsewhere_travels_by_value():
    n = 3
    loaded = pickle.loads(cloudpickle.dumps(fp.task(lambda x: x + n, retries=1)))
    assert loaded(4) == 7
    assert loaded.task_options == fp.Options(retries=1)


def test_a_task_refers_to_itself_where_its_module_has_it():
    """What its module calls by this name is the task, so that is what must travel, not the function it holds."""
    assert marked.portable() is marked
    assert fp.task(load).portable() is load


def test_a_callables_name_that_ends_in_a_number_may_not_be_anothers_derived_one():
    def numbered(x):
        return x

    numbered.__name__ = "load-1"
    wf = fp.Workflow()
    wf.add(load)
    wf.add(load)
    wf.add(numbered, 1)
    with pytest.raises(fp.DuplicateTaskName, match="'load-1'"):
        wf.check_runnable()


def test_many_handles_do_not_name_one_task():
    wf = fp.Workflow()
    handles = wf.map(load, range(2))
    with pytest.raises(fp.WorkflowError, match=r"after must be a handle or the name of a task"):
        wf.add_dependency(handles[0], after=handles)
