"""Dask graphs (delayed, bag, array, dataframe) on local workers: ``dask.compute(..., scheduler=dask_get)``.

graph, keys ──> nodes: converted, culled, chains fused ──> Workflow ──> WorkflowExecutor ──> values of the keys
                                                                             └── events ──> Dask's callbacks
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from graphlib import CycleError, TopologicalSorter
from typing import Any, Literal, Self

from forgepar._validate import as_list, check_choice, check_flag, check_workers, checked_by, has, refusal, shown
from forgepar.engine.cancellation import CancellationToken
from forgepar.engine.executor import WorkflowExecutor
from forgepar.errors import WorkflowFailed, add_note, is_system_error
from forgepar.integrations.dask_step import GraphNode, GraphStep, KeptValue, packed
from forgepar.machine import available_cpus
from forgepar.records.events import Event, WorkflowTaskCompleted, WorkflowTaskFailed, WorkflowTaskStarted
from forgepar.records.result import RunResult
from forgepar.system.forking import fork_safe
from forgepar.values.pickling import Dependencies
from forgepar.version import public
from forgepar.workflow.arguments import ATOMS
from forgepar.workflow.handles import TaskHandle
from forgepar.workflow.workflow import Workflow

_N_CALLS = 5  # functions in one Dask callback
_HASH_SEED = "6640"  # any number, the same for all workers, under start methods with a random hash seed per process


@public
def dask_get(
    dsk: Any,
    keys: Any,
    *,
    num_workers: int | None = None,
    pool: WorkflowExecutor | None = None,
    optimize_graph: bool = True,
    schedule: Literal["eager", "layers"] = "eager",
    callbacks: Any = None,
    **others: Any,
) -> Any:
    """Compute keys of a Dask graph on local workers; a scheduler function for Dask.

    The workers stay for the next call, until a call asks for another number of them, the program ends, or
    `forgepar.integrations.dask_graphs.close_workers` is called. Large values go from worker to worker through shared
    memory. Inputs of a node are read-only; a node that writes to them is called again with copies.

    Args:
        dsk: the graph.
        keys: a key, or nested lists of keys.
        num_workers: number of workers; None: that of Dask's configuration, else one per CPU.
        pool: an executor to run on instead, which stays open.
        optimize_graph: whether to fuse chains of nodes.
        schedule: "eager", which suits these irregular graphs, or "layers".
        callbacks: Dask's callbacks; None: the active ones. They get the start and the end of a node when its worker
            reports them, often together, and the values of keys at the end.
        **others: ignored; arguments of other Dask schedulers.

    Returns:
        The value of the key; for a list, a tuple of values.

    Raises:
        KeyError: the graph does not have one of the keys.
        ValueError: a node needs a key that the graph does not have, or nodes form a cycle.
        Exception: what a node raised, with its key and the worker's traceback as notes.

    Example:
        >>> from operator import add
        >>> dask_get({"x": 1, "y": (add, "x", 10)}, ["x", "y"])  # doctest: +SKIP
        (1, 11)
    """
    del others
    try:
        from dask.callbacks import local_callbacks
    except ImportError as error:
        raise ImportError("dask_get needs Dask: pip install 'forgepar[dask]'") from error
    _check_arguments(dsk, num_workers, optimize_graph, schedule, callbacks)
    wanted = checked_by("keys", lambda: set(_flat(keys)), "a key of the graph, or lists of keys", keys)
    with local_callbacks(callbacks) as active:
        nodes = _nodes(dsk, wanted, fuses=optimize_graph)
        with _CallbackRunner(active, nodes) as runner:
            values = _values(nodes, wanted, runner, num_workers, pool, schedule)
            runner.finish(values)
    return _nested(keys, values)


def _check_arguments(dsk: Any, num_workers: Any, optimize_graph: Any, schedule: Any, callbacks: Any) -> None:
    if callbacks is not None:
        _check_callbacks(callbacks)
    check_choice("schedule", schedule, ("eager", "layers"))
    check_flag("optimize_graph", optimize_graph)
    check_workers("num_workers", num_workers)
    if not isinstance(dsk, Mapping) and not has(dsk, "__dask_graph__"):
        raise refusal("dsk", "a Dask graph", dsk)


def _check_callbacks(callbacks: Any) -> None:
    """Check that callbacks are as Dask passes them to schedulers: tuples of five functions or None."""
    must_be = "a list of Dask callbacks, each a tuple of 5 functions, or None"
    is_several = (
        isinstance(callbacks, Collection) and not isinstance(callbacks, (str, bytes)) and not has(callbacks, "dtype")
    )
    for callback in as_list("callbacks", callbacks, must_be) if is_several else [None]:
        is_one = isinstance(callback, tuple) and len(callback) == _N_CALLS
        if not is_one or not all(part is None or callable(part) for part in callback or ()):
            raise refusal("callbacks", must_be, callbacks)


# The graph


def _nodes(dsk: Any, wanted: set[Hashable], *, fuses: bool) -> dict[Hashable, Any]:
    """Return the nodes that have to be computed, converted to Dask's task specifications."""
    from dask._task_spec import convert_legacy_graph, cull, fuse_linear_task_spec

    graph = dsk if isinstance(dsk, Mapping) and not has(dsk, "__dask_graph__") else dsk.__dask_graph__()
    graph = dict(graph)
    for key in wanted:
        if key not in graph:
            raise KeyError(key)
    nodes = convert_legacy_graph(graph)
    for key in wanted - nodes.keys():  # the key is an alias of itself
        raise KeyError(key)
    nodes = cull({key: _with_key(key, node) for key, node in nodes.items()}, wanted)
    return dict(fuse_linear_task_spec(nodes, wanted)) if fuses and len(nodes) > 1 else dict(nodes)


def _with_key(key: Hashable, node: Any) -> Any:
    """Return a node under its key in the graph. Some graphs have nodes with another key, and Dask uses both."""
    from dask._task_spec import Alias

    if node.key == key:
        return node
    return Alias(key, node.target) if isinstance(node, Alias) else node.substitute({}, key=key)


def _in_order(nodes: Mapping[Hashable, Any]) -> Iterator[Hashable]:
    """Yield the keys in topological order."""
    for key, node in nodes.items():
        for other in node.dependencies:
            if other not in nodes:
                raise ValueError(f"Node {shown(key)} needs {shown(other)}, which the graph does not have.")
    try:
        yield from TopologicalSorter({key: node.dependencies for key, node in nodes.items()}).static_order()
    except CycleError as error:
        raise ValueError(f"The graph has a dependency cycle: {' -> '.join(map(repr, error.args[1]))}.") from None


class _GraphWorkflow:
    """A Dask graph as a workflow.

    Args:
        nodes: the graph.

    Attributes:
        workflow: the nodes that have to be called.
        handles: their handles, by key; an alias has that of its target.
        data: values in the graph itself, by key.
        keys: keys of the tasks, by number.
        found: functions and classes in the nodes.
    """

    def __init__(self, nodes: Mapping[Hashable, Any]) -> None:
        from dask._task_spec import Alias, DataNode
        from dask.utils import key_split

        self.workflow = Workflow("dask graph")
        self.handles: dict[Hashable, TaskHandle] = {}
        self.data: dict[Hashable, Any] = {}
        self.keys: list[Hashable] = []
        self.found = self.workflow.refers_to = Dependencies()
        self._kept: dict[Hashable, KeptValue] = {}
        self._steps: dict[str, GraphStep] = {}
        for key in _in_order(nodes):
            node = nodes[key]
            if isinstance(node, DataNode):
                self.data[key] = node.value
            elif isinstance(node, Alias):
                self._alias(key, node.target)
            else:
                self._add(key, node, key_split(key))

    def _alias(self, key: Hashable, target: Hashable) -> None:
        if target in self.data:
            self.data[key] = self.data[target]
        else:
            self.handles[key] = self.handles[target]

    def _add(self, key: Hashable, node: Any, kind: str) -> None:
        needed = list(node.dependencies)
        known = {name: self.data[name] for name in needed if type(self.data.get(name, self)) in ATOMS}
        names = [name for name in needed if name not in known]
        step = self._steps.setdefault(kind, GraphStep(kind))
        try:
            node = packed(GraphNode(node, names, known), self.found)
        except Exception as error:
            why = "could not be read when it was pickled" if is_system_error(error) else "cannot be pickled"
            add_note(error, f"The node {shown(key)} of the Dask graph {why}.")
            raise
        self.handles[key] = self.workflow.add(step, node, *map(self._argument, names))
        self.keys.append(key)

    def _argument(self, name: Hashable) -> Any:
        """Return the argument for a key: always the same object, so that a large value is written once."""
        if name in self.handles:
            return self.handles[name]
        return self._kept.setdefault(name, KeptValue(self.data[name]))


def _values(
    nodes: Mapping[Hashable, Any],
    wanted: set[Hashable],
    runner: _CallbackRunner,
    num_workers: int | None,
    pool: WorkflowExecutor | None,
    schedule: Literal["eager", "layers"],
) -> dict[Hashable, Any]:
    """Compute a graph, and return the values of the wanted keys."""
    graph = _GraphWorkflow(nodes)
    outputs = [graph.handles[key] for key in wanted if key in graph.handles]
    values = {key: graph.data[key] for key in wanted if key in graph.data}
    if not outputs:
        return values
    runner.begin(graph)
    failure = None
    with _executor(num_workers, pool) as executor:
        try:
            result = executor.run(
                graph.workflow,
                outputs=outputs,
                schedule=schedule,
                cancel=runner.token,
                audit=runner.take if runner.has_callbacks else None,
            )
        except WorkflowFailed as error:
            failure, result = error, error.result
    runner.raise_own()
    if failure is not None:
        raise _own_error(graph, failure, result)
    result.detach()  # callers of Dask may write to the values
    return values | {key: result[graph.handles[key]] for key in wanted if key in graph.handles}


def _own_error(graph: _GraphWorkflow, failure: WorkflowFailed, result: RunResult) -> Exception:
    """Return the exception of the first node that failed."""
    error = failure.exceptions[0]
    for name, other in result.errors.items():
        if other is error:
            add_note(error, f"key of the Dask graph: {shown(graph.keys[graph.workflow.index_of(name)])}")
    return error


def _flat(keys: Any) -> Iterator[Hashable]:
    if isinstance(keys, list):
        for part in keys:
            yield from _flat(part)
    else:
        yield keys


def _nested(keys: Any, values: Mapping[Hashable, Any]) -> Any:
    return tuple(_nested(part, values) for part in keys) if isinstance(keys, list) else values[keys]


# Callbacks


class _CallbackRunner:
    """Calls Dask's callbacks during a run.

    Args:
        callbacks: tuples of five functions, each of which may be None.
        nodes: the graph.

    Attributes:
        token: cancels the run if a callback raises.
        has_callbacks: whether there are any.
    """

    def __init__(self, callbacks: Iterable[tuple[Any, ...]], nodes: Mapping[Hashable, Any]) -> None:
        self._callbacks = list(callbacks)
        self._begun: list[tuple[Any, ...]] = []
        self._nodes = nodes
        self._graph: _GraphWorkflow | None = None
        self._error: BaseException | None = None
        self.has_callbacks = bool(self._callbacks)
        self.token = CancellationToken() if self.has_callbacks else None
        self._state: dict[str, Any] = {
            **{name: set() for name in ("waiting", "ready", "running", "finished", "released")},
            **{name: {} for name in ("cache", "dependencies", "dependents", "waiting_data")},
        }

    def __enter__(self) -> Self:
        try:
            for callback in self._callbacks:
                if callback[0]:
                    callback[0](self._nodes)
                self._begun.append(callback)
        except BaseException:
            self._call_finish(is_bad=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._call_finish(is_bad=kind is not None)

    def begin(self, graph: _GraphWorkflow) -> None:
        """Report the start of the run."""
        self._graph = graph
        if self.has_callbacks:
            self._state["waiting"].update(graph.keys)
            self._state["cache"].update(graph.data)
            self._state["dependencies"] = {key: set(node.dependencies) for key, node in self._nodes.items()}
            self._call(1, self._nodes, self._state)

    def take(self, event: Event) -> None:
        """Report a node that began or ended. If a callback raises, the run is cancelled."""
        if not isinstance(event, (WorkflowTaskStarted, WorkflowTaskCompleted, WorkflowTaskFailed)) or self._error:
            return
        assert self._graph is not None
        assert self.token is not None
        key, state = self._graph.keys[self._graph.workflow.index_of(event.task)], self._state
        try:
            if isinstance(event, WorkflowTaskStarted):
                state["waiting"].discard(key)
                state["running"].add(key)
                self._call(2, key, self._nodes, state)
            elif isinstance(event, WorkflowTaskCompleted):
                state["running"].discard(key)
                state["finished"].add(key)
                self._call(3, key, None, self._nodes, state, event.worker)
        except BaseException as error:
            self._error = error
            self.token.cancel(kill=True)

    def finish(self, values: Mapping[Hashable, Any]) -> None:
        """Put the values of the keys into the state, for the callbacks at the end."""
        self._state["cache"].update(values)

    def raise_own(self) -> None:
        """Raise the exception of a callback, if there was one."""
        if self._error is not None:
            raise self._error

    def _call(self, which: int, *arguments: Any) -> None:
        for callback in self._begun:
            if callback[which]:
                callback[which](*arguments)

    def _call_finish(self, *, is_bad: bool) -> None:
        for callback in self._begun:
            if callback[4]:
                callback[4](self._nodes, self._state, is_bad)


# Workers


_idle: list[tuple[int, int, WorkflowExecutor]] = []  # pid, number of workers, executor
_idle_lock = fork_safe(threading.RLock())


@contextmanager
def _executor(num_workers: int | None, pool: WorkflowExecutor | None) -> Iterator[WorkflowExecutor]:
    """Yield an executor: an idle one of an earlier call with as many workers, or a new one."""
    if isinstance(pool, WorkflowExecutor):
        yield pool
        return
    import dask

    n_workers = num_workers or dask.config.get("num_workers", None) or available_cpus()
    executor = _taken(n_workers) or _started(n_workers)
    try:
        yield executor
    finally:
        _put_back(n_workers, executor)


def close_workers() -> None:
    """End the workers that earlier calls of `dask_get` keep for later ones."""
    _keep([])


def _taken(n_workers: int) -> WorkflowExecutor | None:
    with _idle_lock:
        for entry in _idle:
            if entry[:2] == (os.getpid(), n_workers):
                _idle.remove(entry)
                return entry[2]
    return None


def _started(n_workers: int) -> WorkflowExecutor:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        # Dask groups items by the hash of text. Forked workers share the hash seed; others get it from this variable.
        os.environ.setdefault("PYTHONHASHSEED", _HASH_SEED)
    return WorkflowExecutor(n_workers)


def _put_back(n_workers: int, executor: WorkflowExecutor) -> None:
    """Keep an executor for the next call, and close the one kept before; the backend closes it at exit."""
    _keep([(os.getpid(), n_workers, executor)])


def _keep(entries: list[tuple[int, int, WorkflowExecutor]]) -> None:
    with _idle_lock:
        before, _idle[:] = _idle[:], entries
    for process, _, executor in before:
        if process == os.getpid():  # else the workers belong to the parent process
            executor.close()
