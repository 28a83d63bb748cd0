"""Arguments that cannot be: whatever is called with them says which one it is, before anything is started or made.

Every function, class and method that `forgepar` exports is called once for each of its arguments and each of `WRONG`,
with the other arguments right. It may take the value. If it does not, the error must be raised on purpose, by forgepar,
and name the argument.
"""

from __future__ import annotations

import inspect
import linecache
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import forgepar as fp
from forgepar.backends.dask import backend as dask
from forgepar.backends.inline import InlineBackend
from forgepar.backends.process import ProcessBackend
from forgepar.cli.main import main
from forgepar.integrations import dask_graphs as daskgraphs
from forgepar.records.audit_log import AuditLog
from forgepar.store.gc import collect
from forgepar.workflow.context import RunContext as TaskFacts
from forgepar.workflow.context import TaskContext

HOME = str(Path(fp.__file__).parent)


class Anything:
    """An object that is nothing of what is wanted."""

    def __repr__(self):
        return "<anything>"


WRONG = {
    "None": None,
    "5": 5,
    "-1": -1,
    "1.5": 1.5,
    "nan": math.nan,
    "inf": math.inf,
    "text": "x",
    "empty text": "",
    "NUL": "x\0y",
    "bytes": b"x",
    "list": [],
    "list of ints": [3],
    "dict": {},
    "tuple": (),
    "object": Anything(),
    "class": int,
    "lambda": lambda *_, **__: None,
    "missing path": Path("no") / "such" / "file",
    "huge int": 10**30,
    "True": True,
    "array": np.arange(3),
}


def raised_on_purpose(error):
    """Tell whether an error comes from a raise statement of forgepar's own, or from one of its checks."""
    at = error.__traceback__
    while at.tb_next is not None:
        at = at.tb_next
    name = at.tb_frame.f_code.co_filename
    line = linecache.getline(name, at.tb_lineno).strip()
    return name.startswith(HOME) and line.startswith("raise")


def fault_of(error, case, argument, value):
    """Return what is wrong with an error that an argument led to; empty if nothing is."""
    told = f"{type(error).__name__}: {error}"
    if isinstance(error, fp.WorkflowFailed):
        return f"a run was begun: {told}"
    if isinstance(error, OSError) and error.errno and (error.filename or str(value) in told):
        return ""  # a file that cannot be read or written, as the system tells it
    if isinstance(error, ALLOWED.get((case, argument), ())):
        return ""
    if not isinstance(error, (fp.ForgeparError, TypeError, ValueError, OSError)):
        return f"of no kind that is documented: {told}"
    if not raised_on_purpose(error):
        return f"raised by accident: {told}"
    # Errors that say what is not there (a task, a run, a file) name the value.
    is_shown = isinstance(error, (fp.ForgeparError, OSError)) and (repr(value) in told or str(value) in told)
    if not re.search(rf"\b{argument}\b", told) and not is_shown:
        return f"does not name {argument}: {told}"
    return ""


# What protocols of others ask for.
ALLOWED = {
    ("dask_get", "dsk"): (KeyError,),
    ("dask_get", "keys"): (KeyError,),
    ("ForgeExecutor.map", "timeout"): (TimeoutError,),
    ("TaskHandles.__getitem__", "index"): (IndexError,),
}


def made():
    """Return a workflow with a task each of what may be asked for."""
    wf = fp.Workflow("fuzzed")
    first = wf.add(abs, -1)
    wf.map(str, [first, 2])
    return wf


def ran():
    return made().run(backend="inline", outputs="all")


def audit_loaded(**arguments):
    made().run(backend="inline", audit="no.jsonl")
    return AuditLog.load(**arguments)


def in_context(method):
    def call(**arguments):
        facts = TaskFacts("id", "workflow", 0, math.inf)
        own = TaskContext(
            facts,
            "task",
            0,
            1,
            0,
            ends_at=math.inf,
            is_cancelled=bool,
            say=lambda *_: None,
            look=lambda: None,
            folder=None,
        )
        return getattr(own, method)(**arguments)

    return call


def on_result(name):
    return lambda **arguments: getattr(ran(), name)(**arguments)


def of_executor(name, make):
    def call(**arguments):
        with make() as executor:
            return getattr(executor, name)(**arguments)

    return call


def in_store(call):
    def prepared(**arguments):
        made().run(backend="inline", store="runs.db")
        with fp.Store.open("runs.db") as store:
            return call(store, **arguments)

    return prepared


def from_graph(**arguments):
    graph = fp.Adjacency.from_edges(2, [0], [1])
    return fp.Workflow.from_graph(**{"graph": graph, **arguments})


def submit(fn, **arguments):
    with fp.ForgeExecutor(1, start_method="fork") as executor:
        return executor.submit(fn, **arguments)


def pool_map(fn=abs, column=(1,), **arguments):
    with fp.ForgeExecutor(1, start_method="fork") as executor:
        return list(executor.map(fn, column, **arguments))


def pool_made(**arguments):
    fp.ForgeExecutor(**arguments).shutdown()


def joblib_backend(**arguments):
    from forgepar.joblib import ForgeparBackend

    return ForgeparBackend(**arguments)


def joblib_call(**arguments):
    from forgepar.joblib import ForgeparBackend

    return ForgeparBackend(nesting_level=0).configure(1, **arguments)


def dask_got(**arguments):
    with fp.WorkflowExecutor(backend="inline") as pool:
        return fp.dask_get(**{"dsk": {"a": (abs, -1)}, "keys": "a", "pool": pool, **arguments})


def futures_backend(**arguments):
    with ThreadPoolExecutor(1) as threads:
        return fp.FuturesBackend(**{"executor": threads, **arguments})


def tool_added(**arguments):
    return fp.ToolRegistry().add(**arguments)


def tool_found(name):
    tools = fp.ToolRegistry()
    tools.add("sort")
    return tools.find(name)


_NO_CLIENT = Anything()


def graph():
    return fp.Adjacency.from_edges(3, [0, 1], [1, 2])


def options():
    wf = made()
    return {
        "name": "n",
        "after": wf.handle("abs"),
        "retries": 1,
        "backoff": 0.5,
        "retry_on": ValueError,
        "timeout": 1.0,
        "memory": "1MiB",
        "effects": True,
        "compensate": abs,
        "fallback": None,
        "cache": True,
        "version": 1,
        "writable": False,
    }


RULES = {
    "outputs": "leaves",
    "schedule": "layers",
    "fail_fast": True,
    "rollback": "all",
    "timeout": None,
    "layer_timeout": None,
    "seed": 0,
    "cancel": None,
    "show": "plain",
    "audit": None,
    "store": None,
    "resume": False,
    "progress": None,
}
OF_EXECUTOR = {
    "workers": 1,
    "backend": "inline",
    "start_method": None,
    "memory_budget": None,
    "max_tasks_per_worker": None,
    "max_worker_memory": None,
}

# By name: what is called, and its arguments, of which one at a time is replaced. A tuple of these is a method's.
CASES = {
    "Adjacency.from_edges": (fp.Adjacency.from_edges, {"n_nodes": 3, "sources": [0], "targets": [1]}),
    "Adjacency.from_scipy": (fp.Adjacency.from_scipy, {"matrix": None}),
    "Adjacency.successors": (lambda node: graph().successors(node), {"node": 0}),
    "Adjacency.successors_of": (lambda nodes: graph().successors_of(nodes), {"nodes": np.array([0])}),
    "Adjacency.descendants": (lambda nodes: graph().descendants(nodes), {"nodes": [0]}),
    "AuditLog": (AuditLog, {"events": []}),
    "AuditLog.load": (audit_loaded, {"path": "no.jsonl", "run_id": None}),
    "Backoff": (fp.Backoff, {"seconds": 1.0, "factor": 2.0, "jitter": 0.0, "most_seconds": 5.0}),
    "Backoff.wait_seconds": (lambda **a: fp.Backoff(1.0).wait_seconds(**a), {"attempt": 1, "chance": 0.5}),
    "CancellationToken": (fp.CancellationToken, {"parent": None}),
    "CancellationToken.with_timeout": (fp.CancellationToken.with_timeout, {"seconds": 1.0, "parent": None}),
    "CancellationToken.cancel": (lambda **a: fp.CancellationToken().cancel(**a), {"kill": False}),
    "CancellationToken.on_cancel": (lambda **a: fp.CancellationToken().on_cancel(**a), {"callback": list}),
    "ChainFallback": (lambda fallback: fp.ChainFallback(fallback), {"fallback": 1}),
    "File": (fp.File, {"path": "x"}),
    "ForgeExecutor": (
        pool_made,
        {
            "workers": None,
            "mp_context": None,
            "initializer": None,
            "initargs": (),
            "max_workers": None,
            "max_tasks_per_child": None,
            "start_method": None,
            "memory_budget": None,
        },
    ),
    "ForgeExecutor.submit": (submit, {"fn": abs}),
    "ForgeExecutor.map": (
        lambda fn=repr, iterables=(1,), **a: pool_map(fn, iterables, **a),
        {"fn": repr, "iterables": (1,), "timeout": None, "chunksize": 1},
    ),
    "ForgeExecutor.shutdown": (
        of_executor("shutdown", lambda: fp.ForgeExecutor(1)),
        {"wait": True, "cancel_futures": False},
    ),
    "FuturesBackend": (futures_backend, {"executor": None, "workers": 1}),
    "DaskBackend": (
        lambda **a: fp.DaskBackend(**{"client": _NO_CLIENT, **a}),
        {"n_slots": 1, "on_kill": "forget", "patience": 1.0, "client": None},
    ),
    "Included.__getitem__": (lambda key: fp.Workflow().include(made())[key], {"key": "abs"}),
    "Options": (fp.Options, {}),
    "ParallelTasks": (fp.ParallelTasks, {"calls": [abs]}),
    "ParallelTasks.add_to": (
        lambda workflow=None, after=(): fp.ParallelTasks([(abs, 1)]).add_to(workflow or made(), after),
        {"after": ()},
    ),
    "ParallelTasks.add_to a workflow": (fp.ParallelTasks([(abs, 1)]).add_to, {"workflow": None}),
    "Resume": (fp.Resume, {"rerun": (), "start_from": (), "wait": False}),
    "RetryFallback": (fp.RetryFallback, {"times": 1, "wait": 0.0}),
    "RunResult.__getitem__": (lambda key: ran()[key], {"key": "abs"}),
    "RunResult.record": (on_result("record"), {"key": "abs"}),
    "RunResult.story": (on_result("story"), {"key": "abs"}),
    "RunResult.trace": (on_result("trace"), {"path": "trace.json"}),
    "RunResult.report": (on_result("report"), {"path": "run.html"}),
    "RunTable.slowest": (lambda most: ran().table().slowest(most), {"most": 3}),
    "Store.open": (fp.Store.open, {"path": "no.db"}),
    "Store.run": (in_store(lambda store, which: store.run(which)), {"which": 1}),
    "StoredRun.value": (in_store(lambda store, name: store.run().value(name)), {"name": "abs"}),
    "Subflow": (lambda **a: fp.Subflow(**{"workflow": made(), **a}), {"workflow": None, "output": None}),
    "Task": (fp.Task, {"fn": abs, "options": fp.Options()}),
    "Task.options": (fp.task(abs).options, {}),
    "TaskContext.progress": (in_context("progress"), {"fraction": 0.5, "text": "half"}),
    "TaskHandles.__getitem__": (lambda index: made().map(abs, [1, 2])[index], {"index": 0}),
    "ToolRegistry.add": (tool_added, {"name": "sort", "path": None, "arguments": (), "env": None}),
    "ToolRegistry.find": (tool_found, {"name": "sort"}),
    "ToolRegistry.shell": (lambda line: fp.ToolRegistry().shell(line), {"line": "sort"}),
    "ValueFallback": (fp.ValueFallback, {"value": 1}),
    "Workflow": (lambda name: repr(_with_task(fp.Workflow(name)).run(backend="inline").standing()), {"name": "w"}),
    "Workflow.add": (lambda fn: made().add(fn), {"fn": abs}),
    "Workflow.add_dependency": (
        lambda task="str-0", after="abs": made().add_dependency(task, after),
        {"task": "str-0", "after": "abs"},
    ),
    "Workflow.check": (
        lambda **a: made().check(**a),
        {"workers": None, "layer_timeout": None, "rollback": "all", "available_memory": None},
    ),
    "Workflow.diagram": (
        lambda **a: made().diagram(**a),
        {"form": "svg", "collapse": None, "direction": None, "table": None},
    ),
    "Workflow.from_graph": (from_graph, {"graph": None, "fn": max, "attributes": (), "name": "w"}),
    "Workflow.handle": (lambda name: made().handle(name), {"name": "abs"}),
    "Workflow.include": (
        lambda **a: fp.Workflow().include(**{"other": made(), **a}),
        {"other": None, "bindings": None, "prefix": None},
    ),
    "Workflow.index_of": (lambda task: made().index_of(task), {"task": "abs"}),
    "Workflow.map": (lambda fn=abs, iterables=(1,): made().map(fn, iterables), {"fn": abs, "iterables": (1,)}),
    "Workflow.run": (lambda **a: made().run(**{"backend": "inline", **a}), {**OF_EXECUTOR, **RULES}),
    "Workflow.run on processes": (lambda **a: made().run(**{"workers": 1, "start_method": "fork", **a}), RULES),
    "WorkflowExecutor": (lambda **a: fp.WorkflowExecutor(**a).close(), OF_EXECUTOR),
    "WorkflowExecutor.run": (
        lambda **a: of_executor("run", lambda: fp.WorkflowExecutor(backend="inline"))(**{"workflow": made(), **a}),
        {"workflow": None, **RULES},
    ),
    "attempt": (fp.attempt, {"fn": abs, "catch": abs}),
    "collect": (
        in_store(lambda store, **a: collect(**{"path": store.path, **a})),
        {"path": None, "keep": None, "max_bytes": None},
    ),
    "critical_path": (lambda **a: fp.critical_path(**{"graph": graph(), **a}), {"graph": None, "weights": [1, 1, 1]}),
    "dask_get": (
        dask_got,
        {
            "dsk": {"a": 1},
            "keys": "a",
            "pool": None,
            "optimize_graph": True,
            "schedule": "eager",
            "callbacks": None,
        },
    ),
    "dask_get num_workers": (lambda num_workers: _dask_workers(num_workers), {"num_workers": 1}),
    "empty": (fp.empty, {"shape": 3, "dtype": float}),
    "empty_like": (fp.empty_like, {"prototype": np.ones(3), "dtype": None, "shape": None}),
    "find_cycle": (fp.find_cycle, {"graph": None}),
    "longest_path_layers": (fp.longest_path_layers, {"graph": None}),
    "map_reduce": (
        lambda **a: fp.map_reduce(**{"workflow": made(), **a}),
        {"workflow": None, "fn": abs, "items": [1], "combine": sum, "fan_in": 2},
    ),
    "parallel": (lambda workflow=None, call=abs: fp.parallel(workflow, call), {"workflow": None}),
    "parallel calls": (lambda calls: fp.parallel(made(), calls), {"calls": abs}),
    "sequence": (lambda workflow, step=abs: fp.sequence(workflow, 1, step), {"workflow": None}),
    "sequence steps": (lambda steps: fp.sequence(made(), 1, steps), {"steps": abs}),
    "shell": (
        lambda line="echo {a}", **a: fp.shell(line, **a),
        {
            "line": "echo {a}",
            "cwd": None,
            "env": None,
            "stdin": None,
            "timeout": None,
            "check": True,
            "through_shell": False,
            "text": True,
            "a": "x",
        },
    ),
    "shell as a task": (
        lambda **a: fp.Workflow().add(fp.shell("true"), **a),
        {"cwd": None, "env": {"a": "b"}, "stdin": "x"},
    ),
    "task": (lambda fn: fp.task(fn), {"fn": abs}),
    "when": (
        lambda **a: _when(**a),
        {"workflow": None, "condition": None, "then": None, "otherwise": None},
    ),
    "joblib ForgeparBackend": (
        joblib_backend,
        {
            "executor": None,
            "initializer": None,
            "initargs": (),
            "idle_worker_timeout": None,
            "maxtasksperchild": None,
            "max_nbytes": "1M",
            "mmap_mode": "r",
        },
    ),
}
for _name, _right in options().items():
    for _case in ("Options", "Task.options"):
        CASES[_case][1][_name] = _right


def _with_task(wf):
    wf.add(abs, -1)
    return wf


def _when(**arguments):
    wf = made()
    right = {"workflow": wf, "condition": wf.handle("abs"), "then": lambda: 1, "otherwise": None}
    return fp.when(**{**right, **arguments})


def _dask_workers(num_workers):
    import dask

    with dask.config.set(scheduler="threads"):
        return fp.dask_get({"a": (abs, -1)}, "a", num_workers=num_workers)


# What no user calls or makes: records that forgepar makes, and what backends and the dispatcher say to each other.
MADE_BY_FORGEPAR = {
    "Adjacency", "BytesUsed", "Collected", "Command", "FailedAttempt", "Finding", "Included", "LayerRow", "OutputLine",
    "RollbackReport", "RunFacts", "RunProgress", "RunResult", "RunSnapshot", "RunTable", "RunningTask", "SkipFallback",
    "Store", "StoredRun", "StoredValue", "TaskContext", "TaskHandle", "TaskHandles", "TaskRecord", "Tool",
    "ToolRegistry", "ToolResult", "context",
}  # fmt: skip
OF_USERS = {"Display", "Event", "Sink", "Status"}  # protocols that users implement, and what their methods are given
OF_BACKENDS = {name for name in dir(InlineBackend) if not name.startswith("_")} | {"limit", "may_be_at", "withdraw"}
OWN = {
    "Resume.forced", "Workflow.adopt_names", "Workflow.changed", "Task.portable", "Command.__call__", "Task.__call__",
    "Store.leave_to_parent", "ForgeExecutor.put", "Workflow.has_prefix", "Workflow.new_prefix", "Workflow.task_name",
    "Workflow.refuse_foreign", "TaskHandles.__add__", "TaskHandle.__getitem__", "Workflow.take_item",
}  # fmt: skip


def public_calls():
    """Yield the name of every function, class and method with arguments that forgepar exports."""
    for name in fp.__all__:
        found = getattr(fp, name)
        if not isinstance(found, type):
            yield name
            continue
        if issubclass(found, BaseException) or name in OF_USERS:
            continue
        if name not in MADE_BY_FORGEPAR:
            yield name
        for method, value in inspect.getmembers(found):
            if method.startswith("_") and method not in ("__getitem__", "__call__", "__add__"):
                continue
            if not callable(value) or not getattr(value, "__module__", "").startswith("forgepar"):
                continue
            if name in ("DaskBackend", "FuturesBackend") and method in OF_BACKENDS:
                continue
            if len(inspect.signature(value).parameters) > (not inspect.ismethod(value)):
                yield f"{name}.{method}"


def test_every_public_call_is_tried():
    tried = {name.split()[0] for name in CASES}
    assert set(public_calls()) - MADE_BY_FORGEPAR - OWN - tried == set()


@pytest.fixture(autouse=True)
def opened(monkeypatch, tmp_path):
    """Count backends that were opened; work in a folder of the test's own."""
    found = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(daskgraphs, "_started", lambda n: fp.WorkflowExecutor(n, backend="inline"))
    monkeypatch.setattr(dask, "n_threads", lambda client: {"worker": 2})
    connected = dask.connected  # a client would wait for its cluster
    monkeypatch.setattr(
        dask, "connected", lambda given: given if given is _NO_CLIENT or type(given) is str else connected(given)
    )
    for backend in (InlineBackend, ProcessBackend):

        def note(self, *rest, _open=backend.open):
            found.append(self)
            return _open(self, *rest)

        monkeypatch.setattr(backend, "open", note)
    yield found
    daskgraphs.close_workers()


def files_here():
    return sorted(str(path) for path in Path().rglob("*"))


@pytest.mark.parametrize(("case", "argument"), [(case, name) for case, (_, right) in CASES.items() for name in right])
def test_what_is_refused_is_named(case, argument, opened):
    call, right = CASES[case]
    if "joblib" in case:
        pytest.importorskip("joblib")
    if "ask" in case.split()[0] and case.split()[0] in ("dask_get", "DaskBackend"):
        pytest.importorskip("distributed")
    positional = argument if case.split()[0] in ("attempt",) else None
    faults = []
    for label, value in WRONG.items():
        # What is right for an argument that was left to the call is not given: None stands for "as the call has it".
        given = {name: part for name, part in right.items() if part is not None or name == argument}
        given[argument] = value
        n_opened, before = len(opened), files_here()
        try:
            if positional:
                call(given.pop("fn"), **given)
            else:
                call(**given)
        except Exception as error:
            fault = fault_of(error, case, argument, value)
            is_refusal = not isinstance(error, ALLOWED.get((case, argument), ()))
            if not fault and is_refusal and case.startswith(("Workflow", "ForgeExecutor")):
                fault = "workers were started" * (len(opened) > n_opened)
                fault = fault or "files were made" * (files_here() != before)
            if fault:
                faults.append(f"{label}: {fault}")
    assert not faults, f"{case}({argument}=...)\n  " + "\n  ".join(faults)


COMMANDS = [
    "runs no.db",
    "show no.db",
    "show runs.db 99",
    "values runs.db 1 nosuch",
    "values runs.db 1 abs -o no/such/file",
    "export runs.db -o no/such/file",
    "report runs.db -o no/such.html",
    "plan runs.db --workers abc",
    "gc runs.db --keep x",
    "gc runs.db --max-bytes x",
    "run no.py",
    "run nosuch.module",
    "run x:y:z",
    "check no.py",
    "graph no.py",
    "top no.db",
    "bogus",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_say_what_is_wrong_in_a_line(command, capsys):
    made().run(backend="inline", store="runs.db")
    try:
        code = main(command.split())
    except SystemExit as left:  # of the parser of arguments, which shows how the command is used as well
        code = left.code
    told = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert told[-1].startswith("forgepar")
    assert len(told) == 1 or told[0].startswith("usage: ")
