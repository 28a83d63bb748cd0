"""Arguments at random: whatever is called with them gives a value, or an error that names what is wrong with what.

`test_refusals.py` tries a fixed grid, one wrong value at a time. Here several arguments of a call are wrong at once,
the values are odder (`odd_values.py`, and what hypothesis makes), and what is accepted is run.
"""

from __future__ import annotations

import contextlib
import importlib
import linecache
import pickle
import pkgutil
import re
import signal
import subprocess
import sys
from collections import Counter, UserList
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import odd_values
import pytest
from conftest import PATIENCE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from odd_values import ODD
from test_refusals import ALLOWED, CASES, HOME, made, opened, ran  # noqa: F401

import forgepar as fp
from forgepar._validate import shown
from forgepar.cli import main as cli
from forgepar.workflow.tasks import base_name

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")
TRIED: Counter[str] = Counter()  # inputs, by what they were given to


@pytest.fixture(autouse=True, scope="module")
def _all_modules():
    """Load every module, as hypothesis draws constants of loaded modules too: a seed alone does not fix the inputs."""
    for module in pkgutil.walk_packages(fp.__path__, "forgepar."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


# What is wrong with an error


def fault_of(error, case, replaced):
    """Return what is wrong with an error that some arguments led to; empty if nothing is.

    Args:
        error: what was raised.
        case: what was called.
        replaced: by name, the arguments that were odd.
    """
    if any(isinstance(error, ALLOWED.get((case, name), ())) for name in replaced):
        return ""
    try:
        told = " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
    except Exception as second:
        return f"its text cannot be had: {type(error).__name__}, {type(second).__name__}"
    if isinstance(error, fp.WorkflowFailed):
        return "" if isinstance(error.result, fp.RunResult) else f"without .result: {told}"
    if isinstance(error, MemoryError):
        return "" if any(map(is_huge, replaced.values())) else told
    if "is nested too deeply" in told:
        return ""  # it names the task, whose argument that is
    is_named = any(
        re.search(rf"\b{name}\b", told, re.IGNORECASE) or is_shown(value, told) for name, value in replaced.items()
    )
    if isinstance(error, pickle.PicklingError) and is_named:
        return ""
    if is_of_user(error):  # what an odd object's own code raises is passed on
        return (
            "" if is_named or case == "ForgeExecutor.map" else f"a user's error, and nothing says of what: {told[:300]}"
        )
    if isinstance(error, OSError) and error.errno and error.filename:
        return ""  # a file that cannot be read or written, as the system tells it
    if not isinstance(error, (fp.ForgeparError, TypeError, ValueError, OSError)):
        return f"of no kind that is documented: {told[:300]}"
    if not is_on_purpose(error) and not (is_named and getattr(error, "__notes__", ())):
        return f"raised by accident: {told[:300]}"
    return "" if is_named else f"names none of {', '.join(replaced)}: {told[:300]}"


def frames_of(error):
    at = error.__traceback__
    while at is not None:
        yield at
        at = at.tb_next


def is_on_purpose(error):
    """Tell whether a raise statement of forgepar's own raised it."""
    *_, at = frames_of(error)
    line = linecache.getline(at.tb_frame.f_code.co_filename, at.tb_lineno).strip()
    return at.tb_frame.f_code.co_filename.startswith(HOME) and line.startswith("raise")


def is_of_user(error):
    *_, at = frames_of(error)
    return at.tb_frame.f_code.co_filename == odd_values.__file__


def is_shown(value, told):
    return any(text and text in told for text in texts_of(value))


def texts_of(value):
    """Yield how an error may show a value: itself, its name, or an item of it."""
    yield shown(value)
    if isinstance(value, (str, Path)):
        yield str(value)[:50]
    if isinstance(value, fp.Command):
        yield value.program.line.text
    elif callable(value) and not isinstance(value, odd_values.FailingAttributes):
        yield repr(base_name(value))
    if isinstance(value, fp.Task):
        yield repr(value.task_options.name)
    if isinstance(value, Mapping):
        value = list(value)
    if type(value) in (list, tuple, set, frozenset, UserList):
        yield from map(shown, list(value)[:5])


def is_huge(value):
    return isinstance(value, int) and abs(value) > 10**6


# What is tried


class Odd(NamedTuple):
    """A value that hypothesis has drawn: how to make it, and how to show it in a falsifying example."""

    label: str
    make: Any

    def __repr__(self):
        return f"<{self.label}>"


def drawn(value):
    return Odd(shown(value), lambda: value)


# Paths of texts stay in the folder of the test.
TEXT = st.text(max_size=12).map(lambda text: text.replace("/", "-"))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.binary(max_size=8), st.decimals(), st.fractions(),
    st.complex_numbers(), st.datetimes(), st.timedeltas(),
)  # fmt: skip
NESTED = st.recursive(
    SCALARS, lambda parts: st.lists(parts, max_size=3) | st.dictionaries(TEXT, parts, max_size=3) | st.tuples(parts)
)
FIXED = st.sampled_from([Odd(label, make) for label, make in ODD.items()])
VALUES = FIXED | NESTED.map(drawn)

UNBOUNDED = {  # what would be right, but takes all memory or time
    ("Adjacency.from_edges", "n_nodes"), ("empty", "shape"), ("empty_like", "shape"), ("AuditLog.load", "path"),
}  # fmt: skip
RELATED = {  # where one argument does not fit the others, an error may name one of those
    ("critical_path", "graph"): "weights",
    ("parallel", "workflow"): "task",
    ("Adjacency.from_edges", "n_nodes"): "sources",
}


@contextlib.contextmanager
def bounded():
    """Have what hangs fail, with a traceback that tells where."""

    def end(_number, frame):
        raise AssertionError(f"it hangs in {frame}")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judged(case, call, arguments, replaced):
    """Call something; return its value and "", or None and what is wrong with its error."""
    TRIED[case.split()[0]] += 1
    try:
        with bounded():
            return call(**arguments), ""
    except Exception as error:
        return None, fault_of(error, case, replaced)


def in_process(case):
    """Tell whether a case of `test_refusals` starts no process."""
    return not case.startswith(("ForgeExecutor.", "Workflow.run on processes"))


def own_cases():
    """Return what `CASES` lacks, likewise."""
    return {
        "Adjacency": (fp.Adjacency, {"n_nodes": 1, "indptr": np.array([0, 1]), "indices": np.array([0])}),
        "Workflow.add arguments": (
            lambda args, kwargs: made().add(odd_values.identity, args, key=kwargs),
            {"args": 1, "kwargs": 2},
        ),
        "Workflow.map constants": (
            lambda constants: made().map(odd_values.identity, [1], key=constants),
            {"constants": 1},
        ),
        "sequence value": (lambda value: fp.sequence(made(), value, abs), {"value": 1}),
        "Task.options names": (lambda names: fp.task(abs).options(**{text_of(names): 1}), {"names": "retries"}),
        "Workflow.run names": (lambda names: made().run(**{text_of(names): "inline"}), {"names": "backend"}),
        "TaskHandle.__getitem__": (lambda index: made().handle("abs")[index], {"index": 0}),
        "RunResult.__getitem__ of several": (lambda key: ran()[[key]], {"key": "abs"}),
        "Workflow.add_dependency handles": (lambda task: _depends(task), {"task": 0}),
        "CancellationToken.child": (lambda kill: fp.CancellationToken().child().cancel(kill=kill), {"kill": True}),
    }  # fmt: skip


def text_of(name):
    return name if isinstance(name, str) and name else "names"  # Python itself refuses other keywords


def _depends(task):
    wf = made()
    wf.add_dependency(task, "abs")


ALL = {**{name: case for name, case in CASES.items() if in_process(name)}, **own_cases()}


@st.composite
def calls(draw):
    """Draw a case, and by name the arguments of it that are odd: one, mostly, or several."""
    case = draw(st.sampled_from(sorted(ALL)))
    names = sorted(ALL[case][1])
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    return case, {name: draw(VALUES) for name in chosen}


def fault_of_call(case, odd):
    call, right = ALL[case]
    replaced = {name: value.make() for name, value in odd.items()}
    for name, value in replaced.items():
        if (case, name) in UNBOUNDED and (is_huge(value) or not isinstance(value, (int, float))):
            return ""
    arguments = {name: value for name, value in right.items() if value is not None} | replaced
    if case == "attempt":
        first = arguments.pop("fn")
        return judged(case, lambda **rest: call(first, **rest), arguments, replaced)[1]
    related = {RELATED[case, name]: None for name in odd if (case, name) in RELATED}
    return judged(case, call, arguments, related | replaced)[1]


OF_FUZZ = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def fuzzed(n_examples, **arguments):
    """Return a decorator: tried with so many examples, the same ones each time."""
    chosen = settings(max_examples=n_examples, derandomize=True, database=None, suppress_health_check=OF_FUZZ)
    return lambda test: chosen(given(**arguments)(test))


PARTS = 5  # of a long test, so that none of them takes as long as one that hangs


def fuzzed_for_long(n_examples, **arguments):
    """Return a decorator: tried with so many examples, others each time."""
    chosen = settings(max_examples=n_examples // PARTS, database=None, suppress_health_check=OF_FUZZ, print_blob=True)
    in_parts = pytest.mark.parametrize("part", range(PARTS))
    return lambda test: pytest.mark.slow(in_parts(chosen(given(**arguments)(test))))


def check_call(drawn_call):
    fault = fault_of_call(*drawn_call)
    assert not fault, fault


@fuzzed(300, drawn_call=calls())
def test_wrong_arguments_are_named(drawn_call):
    check_call(drawn_call)


@fuzzed_for_long(5_000, drawn_call=calls())
def test_wrong_arguments_are_named_for_long(drawn_call, part):
    check_call(drawn_call)


@pytest.mark.slow
@pytest.mark.parametrize("label", ODD)
def test_each_odd_value_in_the_place_of_each_argument(label):
    faults = {}
    for case in sorted(ALL):
        for name in ALL[case][1]:
            if fault := fault_of_call(case, {name: Odd(label, ODD[label])}):
                faults[f"{case}({name})"] = fault
    assert not faults, "\n".join(f"{place}: {fault}" for place, fault in faults.items())


# What is accepted is run


class Made(NamedTuple):
    """What is to be made of a class, once the example is tried."""

    kind: Any
    fields: Any


EXTREMES = [1e308, 5e-324, 1e-9, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, 1, 2, 0.001]
NUMBERS = st.integers(1, 4) | st.floats(1e-9, 0.01) | st.sampled_from(EXTREMES)
ANY_NUMBER = st.integers() | st.floats() | st.sampled_from([-0.0, -1, 0, np.float32(0.001), np.int64(2), True])
BACKOFFS = st.builds(lambda *fields: Made(fp.Backoff, fields), NUMBERS, NUMBERS, st.floats(0, 1), NUMBERS)
FALLBACKS = st.one_of(
    st.builds(lambda *fields: Made(fp.RetryFallback, fields), st.integers(1, 2**31), NUMBERS),
    st.just(Made(fp.SkipFallback, ())),
    st.builds(lambda value: Made(fp.ValueFallback, (value,)), NUMBERS),
    st.sampled_from([odd_values.raises, odd_values.identity, 7]),
)
NAMES = st.sampled_from(["fuzzed", "", "a\nb", "n\udcff", "/", "x" * 5_000, "%s", "\0"])
FIELDS = {
    "name": NAMES.filter(bool),
    "retries": st.integers(0, 4) | st.sampled_from([2**31, 2**63, 2**64, 10**400, np.int64(2)]),
    "backoff": NUMBERS | BACKOFFS,
    "retry_on": st.sampled_from([LookupError, (), (OSError, LookupError)]),
    "timeout": NUMBERS,
    "memory": st.sampled_from([10**9, 2**63, 2**64, 10**400, "1GiB", "1e3 MB", "1e300", 1]),
    "effects": st.sampled_from([True, False, np.True_]),
    "compensate": st.sampled_from([odd_values.identity, odd_values.raises, repr]),
    "fallback": FALLBACKS,
    "cache": st.booleans(),
    "version": ANY_NUMBER.filter(lambda value: isinstance(value, int)) | TEXT,
    "writable": st.booleans(),
}
FUNCTIONS = st.sampled_from([odd_values.identity, odd_values.raises, repr, odd_values.generator])
RULE_FIELDS = {
    "outputs": st.sampled_from(["leaves", "all", []]),
    "schedule": st.sampled_from(["layers", "eager"]),
    "fail_fast": st.sampled_from([True, False, np.False_]),
    "rollback": st.sampled_from(["all", "upstream", "none", odd_values.raises, odd_values.identity]),
    "layer_timeout": NUMBERS,
    "rollback_timeout": NUMBERS,
    "seed": st.integers(0) | st.sampled_from([10**400, np.uint64(3)]),
    "show": st.sampled_from(["plain", "tagged", odd_values.raises]),
    "audit": st.sampled_from([odd_values.raises, "audit.jsonl", [print, odd_values.raises]]),
    "store": st.just("runs.db"),
    "resume": st.booleans(),
    "progress": st.booleans(),
}


def some_of(fields):
    """Draw some of the fields, mostly with values that they may have."""
    right = st.fixed_dictionaries({}, optional=fields)
    odd = st.fixed_dictionaries({}, optional=dict.fromkeys(fields, FIXED | ANY_NUMBER))
    one_odd = st.builds(lambda given, others: {**given, **dict(list(others.items())[:1])}, right, odd)
    return right | right | one_odd


def as_given(value):
    """Return a value of an example as it is to be given; of odd ones, a new one."""
    if isinstance(value, Made):
        return value.kind(*value.fields)
    return value.make() if isinstance(value, Odd) else value


class Example(NamedTuple):
    """A workflow of three tasks, of which the second takes the first's value, and how to run it."""

    functions: Any
    arguments: Any
    options: Any
    rules: Any
    workers: bool
    name: str = "fuzzed"


def examples(workers):
    several = st.tuples(FUNCTIONS, FUNCTIONS, FUNCTIONS)
    arguments = st.integers(-1, 3).map(drawn) | (FIXED if workers else VALUES)
    return st.builds(
        Example,
        several,
        st.tuples(arguments, arguments),
        st.tuples(*[some_of(FIELDS)] * 3),
        some_of(RULE_FIELDS),
        st.just(workers),
    )


# What an error may name beside an argument: the fields of a Backoff and a RetryFallback; the task that an argument was
# given to, which cannot be pickled; the memory that a task declares and the machine does not have.
ALSO = dict.fromkeys(["seconds", "factor", "most_seconds", "times", "wait", "task", "memory"])
SECONDS = 0.1  # that a run may take, as some wait for ever by their options


def fault_of_run(example, executor=None):
    """Return what is wrong with how a run ended; empty: by values, by a `WorkflowFailed`, or it was refused."""
    handles = []
    wf = fp.Workflow(example.name)

    def declare(fn, given, argument):
        options = {name: as_given(value) for name, value in given.items()}
        handles.append(wf.add(fp.task(fn).options(**options), argument))

    def run(**rules):
        token = fp.CancellationToken.with_timeout(SECONDS)
        return executor.run(wf, cancel=token, timeout=2 * SECONDS, **rules)

    for number, fn in enumerate(example.functions):
        given = example.options[number]
        argument = handles[0] if number == 1 and handles else example.arguments[number // 2].make()
        named = {**ALSO, **dict.fromkeys(given), "fn": fn, "argument": argument}
        _, fault = judged("Workflow.add", declare, {"fn": fn, "given": given, "argument": argument}, named)
        if fault:
            return fault
    if not handles:
        return ""
    rules = {name: as_given(value) for name, value in example.rules.items()}
    # A value that cannot be pickled, or a task that declares more memory than there is, is named by its task.
    result, fault = judged("Workflow.run", run, rules, ALSO | rules)
    return fault or check_result(result, handles)


def check_result(result, handles):
    if result is None:
        return ""
    for call in (result.summary, result.table, result.standing, lambda: result.records[0], lambda: list(result.events)):
        _, fault = judged("RunResult", lambda: call(), {}, {})  # noqa: B023
        if fault:
            return fault
    return judged("RunResult.__getitem__", lambda key: result[key], {"key": handles[0]}, {"key": "task"})[1]


@pytest.fixture(scope="module")
def warm():
    with fp.WorkflowExecutor(2) as executor:
        executor.run(made())  # its workers are there before the test counts what it leaves behind
        yield executor


def check_run(example, executor):
    fault = fault_of_run(example, executor)
    assert not fault, fault


@fuzzed(60, example=examples(workers=False))
def test_what_is_accepted_runs_to_an_end(example):
    with fp.WorkflowExecutor(backend="inline") as executor:
        check_run(example, executor)


@fuzzed_for_long(3_000, example=examples(workers=False))
def test_what_is_accepted_runs_to_an_end_for_long(example, part):
    with fp.WorkflowExecutor(backend="inline") as executor:
        check_run(example, executor)


@fuzzed(10, example=examples(workers=True))
def test_what_is_accepted_runs_to_an_end_on_workers(warm, example):
    check_run(example, warm)


@fuzzed_for_long(500, example=examples(workers=True))
def test_what_is_accepted_runs_to_an_end_on_workers_for_long(warm, example, part):
    check_run(example, warm)


# What was found, each alone


class Untold(Exception):
    __str__ = odd_values.FailingRepr.__str__


def fail_untold(_event):
    raise Untold


def draw_number():
    return float(fp.context().rng().random())


def test_a_name_that_is_no_utf8_can_be_retried_and_draws_numbers():
    wf = fp.Workflow()
    bad = wf.add(fp.task(odd_values.raises).options(name="bad \udcff", retries=1, backoff=fp.Backoff(0.001, jitter=1)))
    number = wf.add(fp.task(draw_number).options(name="number \udcff"))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(backend="inline", fail_fast=False)
    assert caught.value.result.record(bad).attempt == 2
    assert 0 <= caught.value.result[number] < 1


def test_a_token_is_not_cancelled_by_a_wrong_kill():
    token = fp.CancellationToken()
    with pytest.raises(ValueError, match="kill must be True or False, got 1j"):
        token.cancel(kill=1j)
    assert not token.is_cancelled


def test_numpys_flags_and_counts_are_kept_in_a_store(tmp_path):
    wf = made()
    wf.add(fp.task(abs).options(effects=np.True_, retries=np.int64(1)), -1)
    token = fp.CancellationToken()
    token.cancel(kill=np.True_)
    rules = {"fail_fast": np.True_, "seed": np.int64(1), "store": tmp_path / "runs.db"}
    assert wf.run(backend="inline", audit=tmp_path / "audit.jsonl", **rules).ok
    assert wf.run(backend="inline", audit=tmp_path / "audit.jsonl", cancel=token, **rules).status == "cancelled"


def test_attributes_by_a_generator_reach_every_node():
    def attributed(_node, *_values, colour=None):
        return colour

    class Graph:
        nodes = None

        def is_directed(self):
            return True

        def in_edges(self, _key):
            return []

    class Nodes(dict):
        def __call__(self, data):  # noqa: ARG002  (networkx calls it so)
            return self.items()

    graph = Graph()
    graph.nodes = Nodes({"a": {"colour": "red"}, "b": {"colour": "blue"}})
    wf = fp.Workflow.from_graph(graph, attributed, attributes=(name for name in ["colour"]))
    assert wf.run(backend="inline", outputs="all")[["a", "b"]] == ["red", "blue"]


@pytest.mark.parametrize("option", ["compensate", "fallback"])
def test_async_functions_are_refused_where_nothing_awaits_them(option):
    with pytest.raises(fp.WorkflowError, match=f"{option}.*async"):
        fp.task(abs).options(**{option: odd_values.coroutine})


def test_a_sink_whose_error_has_no_text_does_not_end_the_run():
    with pytest.warns(RuntimeWarning, match="no text: its __str__ raises"):
        assert made().run(backend="inline", audit=fail_untold).ok


# Calls one after the other


class Sequences(RuleBasedStateMachine):
    """One workflow, one executor in this process and a warm one; calls in any order, with arguments right and odd."""

    warm: Any = None

    def __init__(self):
        super().__init__()
        self.workflow = fp.Workflow("grown")
        self.handles = [self.workflow.add(abs, -1)]
        self.inline = fp.WorkflowExecutor(backend="inline")
        self.results = []
        self.token = fp.CancellationToken()

    def teardown(self):
        self.inline.close()

    def call(self, case, call, **odd):
        replaced = {name: value.make() if isinstance(value, Odd) else value for name, value in odd.items()}
        value, fault = judged(case, call, replaced, ALSO | replaced)
        assert not fault, fault
        return value

    def some_handle(self, number):
        return self.handles[number % len(self.handles)]

    @rule(number=st.integers(0, 99), value=VALUES, odd_fn=FIXED | st.none(), option=some_of(FIELDS))
    def add(self, number, value, odd_fn, option):
        fn = odd_values.identity if odd_fn is None else odd_fn

        def declare(fn, argument, **names):
            given = {name: as_given(value) for name, value in names.items()}
            return self.workflow.add(fp.task(fn).options(**given), self.some_handle(number), argument)

        option.pop("name", None)
        self.keep(self.call("Workflow.add", declare, fn=fn, argument=value, **option))

    def keep(self, handle):
        if isinstance(handle, fp.TaskHandle):
            self.handles.append(handle)

    @rule(column=VALUES | st.just([1, 2]), constant=VALUES)
    def map(self, column, constant):
        def declare(iterables, constant):
            return self.workflow.map(odd_values.identity, iterables, other=constant)

        handles = self.call("Workflow.map", declare, iterables=column, constant=constant)
        self.keep(handles[0] if isinstance(handles, fp.TaskHandles) and handles else handles)

    @rule(number=st.integers(0, 99), after=VALUES | st.integers(0, 99))
    def add_dependency(self, number, after):
        after = self.some_handle(after) if isinstance(after, int) else after
        if isinstance(after, fp.TaskHandle) and after.index >= self.some_handle(number).index:
            return  # a cycle, which every later run would tell
        self.call(
            "Workflow.add_dependency",
            lambda after: self.workflow.add_dependency(self.some_handle(number), after),
            after=after,
        )

    @rule(number=st.integers(0, 99), index=FIXED | st.integers(-3, 3))
    def take_item(self, number, index):
        self.keep(self.call("TaskHandle.__getitem__", lambda index: self.some_handle(number)[index], index=index))

    @rule(prefix=FIXED | st.none() | TEXT, name=FIXED | TEXT)
    def include(self, prefix, name):
        def included(prefix, name, bindings):
            if isinstance(name, str):
                return self.workflow.include(made(), {name: 1}, prefix=prefix)
            return self.workflow.include(made(), bindings, prefix=prefix)

        self.call("Workflow.include", included, prefix=prefix, name=name, bindings={})

    @rule(rules=some_of(RULE_FIELDS), on_workers=st.booleans(), is_cancelled=st.booleans())
    def run(self, rules, on_workers, is_cancelled):
        executor = self.warm if on_workers and self.warm is not None else self.inline
        token = self.token if is_cancelled else fp.CancellationToken.with_timeout(SECONDS)
        given = {name: as_given(value) for name, value in rules.items()}
        result = self.call(
            "WorkflowExecutor.run",
            lambda **rules: executor.run(self.workflow, timeout=SECONDS, cancel=token, **rules),
            **given,
        )
        if result is not None:
            self.results = [*self.results[-2:], result]

    @rule(key=VALUES | st.integers(0, 99), kind=st.sampled_from(["value", "record", "several"]))
    def ask(self, key, kind):
        for result in self.results:
            key = self.some_handle(key) if isinstance(key, int) else key
            asks = {"value": result.__getitem__, "record": result.record, "several": lambda key: [result[[key]]]}  # noqa: B023
            self.call("RunResult.__getitem__", asks[kind], key=key)

    @rule(kill=st.booleans() | FIXED, renews=st.booleans())
    def cancel(self, kill, renews):
        self.call("CancellationToken.cancel", self.token.cancel, kill=kill)
        if renews:
            self.token = fp.CancellationToken(None)

    @rule()
    def close_twice(self):
        self.inline.close()
        self.inline.close()

    @rule(form=st.sampled_from(["svg", "dot", "mermaid"]), workers=FIXED, direction=FIXED | st.none())
    def look(self, form, workers, direction):
        self.call(
            "Workflow.diagram", lambda direction: self.workflow.diagram(form, direction=direction), direction=direction
        )
        self.call("Workflow.check", lambda workers: self.workflow.check(workers=workers), workers=workers)


def check_sequences(n_examples, n_steps, *, is_derandomized):
    run_state_machine_as_test(
        Sequences,
        settings=settings(
            max_examples=n_examples,
            stateful_step_count=n_steps,
            derandomize=is_derandomized,
            database=None,
            suppress_health_check=OF_FUZZ,
        ),
    )


def test_calls_in_any_order():
    check_sequences(10, 8, is_derandomized=True)


@pytest.mark.slow
def test_calls_in_any_order_for_long(warm, monkeypatch):
    monkeypatch.setattr(Sequences, "warm", warm)
    check_sequences(300, 20, is_derandomized=False)


# Pools


@pytest.fixture(scope="module")
def pool():
    with fp.ForgeExecutor(1) as executor:
        executor.submit(abs, 1).result(PATIENCE)
        yield executor


def ended(pool_call):
    """Wait for what a pool has taken; whatever that raises is the function's own."""
    with contextlib.suppress(Exception):
        for future in pool_call:
            future.result(PATIENCE) if isinstance(future, Future) else future


POOL = {
    "ForgeExecutor.submit": (lambda pool, fn, args: ended([pool.submit(fn, args)]), {"fn": abs, "args": -1}),
    "ForgeExecutor.put": (lambda pool, value: ended([pool.put(value)]), {"value": 1}),
    "ForgeExecutor.map": (
        lambda pool, fn, iterables, **more: ended(pool.map(fn, iterables, **more)),
        {"fn": abs, "iterables": (1, 2), "timeout": 5.0, "chunksize": 1},
    ),
}


@st.composite
def pool_calls(draw):
    case = draw(st.sampled_from(sorted(POOL)))
    name = draw(st.sampled_from(sorted(POOL[case][1])))
    return case, name, draw(FIXED)


def fault_of_pool(pool, case, name, odd):
    """Return what is wrong with what a pool did."""
    call, right = POOL[case]
    value = odd.make()
    arguments = {**right, name: value}
    return judged(case, lambda **given: call(pool, **given), arguments, ALSO | {name: value})[1]


def check_pool(pool, drawn_call):
    fault = fault_of_pool(pool, *drawn_call)
    assert not fault, fault


@fuzzed_for_long(1_000, drawn_call=pool_calls())
def test_a_pool_refuses_or_goes_on_for_long(pool, drawn_call, part):
    check_pool(pool, drawn_call)
    assert pool.submit(abs, -1).result(PATIENCE) == 1


# The command line

PIPELINE = """
import forgepar as fp

def double(x):
    return 2 * x

def flow(n: int = 3):
    wf = fp.Workflow("flow")
    wf.add(sum, wf.map(double, range(n)))
    return wf

workflow = flow()
not_a_workflow = 7

def raising():
    raise LookupError("while it was loaded")

def failing():
    wf = fp.Workflow()
    wf.add(len, 5)
    return wf
"""
WORDS = [
    "", " ", "-", "--", "-1", "0", "1", "3", "1e400", "nan", "inf", "-inf", "1e-300", "99999999999999999999", "9" *
    400, "9" * 5000, "x", "None", "True", "a=b", "=", "n=2", "n=x", "n=-1", "m=1", "no/such/file", ".",
    "/dev/null/x", "/dev/full", "out.json", "graph.svg", "graph.png", "n" * 300, "a\udcffb", "a\nb", "a\x1b[2J",
    "1..4", "4..1", "1,2", "1..", "..", "1..99999999999", "1GiB", "1e999GiB", "-1MiB", "last", "sum", "*", "[",
    "double-0", "runs.db", "pipe.py", "pipe.py:flow", "pipe.py:not_a_workflow", "pipe.py:raising",
    "pipe.py:failing", "pipe.py:", ":", "::", ":x", "a:b:c", "os:path", "..x", "pipe.py:flow.x", "json", "chrome",
    "wfformat", "jsonl", "svg", "down", "bash", "zsh", "fish", "{}", "é",
]  # fmt: skip
LEFT_OUT = {"--dask", "--watch", "--help", "-h"}  # a cluster, a terminal, and what only prints


def commands():
    """Return by command its options, with whether they take a word, and how many words it takes beside them."""
    (parsers,) = [action for action in cli._parser()._actions if hasattr(action, "choices") and action.choices]
    found = {}
    for name, parser in parsers.choices.items():
        options = [
            (action.option_strings[-1], action.nargs != 0) for action in parser._actions if action.option_strings
        ]
        positional = [action for action in parser._actions if not action.option_strings]
        found[name] = [option for option in options if option[0] not in LEFT_OUT], len(positional)
    return found


COMMANDS = commands()
WORD = st.sampled_from(WORDS) | TEXT.filter(lambda text: not text.startswith("-"))


@st.composite
def lines(draw):
    """Draw the words of a command line: mostly a command that is there, with its subject and odd options."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    options, n_words = COMMANDS[name]
    subject = draw(st.sampled_from(["pipe.py:flow", "pipe.py:failing"] if name in OF_TARGETS else ["runs.db"]) | WORD)
    words = [subject, *draw(st.lists(WORD, max_size=n_words))]
    for option, takes_word in draw(st.lists(st.sampled_from(options), max_size=3)):
        words += [option, draw(WORD)] if takes_word else [option]
    if name == "run" and "--backend" not in words:
        words += ["--backend", "inline"]
    return [name if draw(st.integers(0, 30)) else draw(WORD), *words]


OF_TARGETS = ("run", "check", "layers", "graph")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a pipeline and a store, to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("pipe.py").write_text(PIPELINE)
    made().run(backend="inline", store="runs.db")
    yield tmp_path
    sys.modules.pop("pipe", None)


def fault_of_line(words, code, out, err):
    """Return what is wrong with how a command ended; empty if nothing is."""
    told = [line for line in err.splitlines() if line.startswith("forgepar")]
    if code not in (0, 1, 2):
        return f"exit code {code}: {err[-500:]}"
    if "Traceback (most recent call last)" in err and "cannot be loaded; it raised:" not in err:
        return f"a traceback: {err[-800:]}"
    if code and not told:
        return f"exit code {code}, and nothing is told: {err[-300:]}"
    if not code and any("error:" in line or "cannot" in line for line in told):
        return f"exit code 0 and a complaint: {told}"
    if code == 2 and not out and not is_named_on_line(words, err):
        return f"names none of its words: {err[-500:]}"
    return ""


def is_named_on_line(words, err):
    """Tell whether an error names an option, a word, or what the command does not have."""
    words = [part for word in words for part in (word, *word.split(":"))]
    known = [word for word in words if word] + [
        word.lstrip("-").replace("-", "_") for word in words if word[:2] == "--"
    ]
    known += ["required", "TARGET", "STORE", "COMMAND", "Give", "must be", "expected one argument"]
    return any(word in err or repr(word)[1:-1] in err or shown(word) in err for word in known)


def check_line(words, capsys):
    TRIED["forgepar"] += 1
    capsys.readouterr()
    try:
        with bounded():
            code = cli.main(words)
    except SystemExit as left:
        code = left.code
    fault = fault_of_line(words, code, *capsys.readouterr())
    assert not fault, fault


@fuzzed(80, words=lines())
def test_command_lines(place, capsys, words):
    check_line(words, capsys)


@fuzzed_for_long(2_500, words=lines())
def test_command_lines_for_long(place, capsys, words, part):
    check_line(words, capsys)


@pytest.mark.parametrize(
    "words",
    [
        ["run", "pipe.py:flow", "-w", "9" * 400],
        pytest.param(["run", "pipe.py:flow", "--timeout", "nan"], marks=pytest.mark.slow),
        pytest.param(["run", "a\udcffb", "--memory-budget", "x"], marks=pytest.mark.slow),
        pytest.param(["run", "pipe.py:flow", "--store", "/dev/null/x"], marks=pytest.mark.slow),
        pytest.param(["run", "pipe.py:flow", "--report", "."], marks=pytest.mark.slow),
        pytest.param(["plan", "runs.db", "-w", "1..99999999999"], marks=pytest.mark.slow),
        pytest.param(["values", "runs.db", "1", "n" * 70_000], marks=pytest.mark.slow),
        pytest.param(["gc", "runs.db", "--keep", "9" * 5000], marks=pytest.mark.slow),
        pytest.param(["export", "runs.db", "9" * 5000], marks=pytest.mark.slow),
        pytest.param(["graph", "pipe.py:flow", "-o", "n" * 300 + ".svg"], marks=pytest.mark.slow),
    ],
)
def test_a_process_refuses_in_words(place, words):
    TRIED["forgepar as a process"] += 1
    done = subprocess.run(
        [sys.executable, "-m", "forgepar", *words], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 2
    assert not fault_of_line(words, done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module", autouse=True)
def counted(request):
    """Print how many inputs were tried, if many were."""
    yield
    if TRIED.total() < 10_000:
        return
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        most = ", ".join(f"{name} {n}" for name, n in TRIED.most_common(8))
        sys.stderr.write(f"\n{TRIED.total()} inputs tried: {most}, ...\n")
