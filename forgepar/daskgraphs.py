"""Graphs of Dask's, delayed, bag, array and dataframe, on local workers: ``dask.compute(..., scheduler=dask_get)``.

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

from forgepar.arguments import ATOMS
from forgepar.cancellation import CancellationToken
from forgepar.daskstep import Kept, Node, Step, packed
from forgepar.errors import WorkflowFailed, add_note, is_system_error
from forgepar.events import Event, WorkflowTaskCompleted, WorkflowTaskFailed, WorkflowTaskStarted
from forgepar.executor import WorkflowExecutor
from forgepar.forking import fork_safe
from forgepar.handles import TaskHandle
from forgepar.machine import available_cpus
from forgepar.pickling import Found
from forgepar.result import RunResult
from forgepar.validation import check_choice, check_flag, check_workers, checked_by, refusal
from forgepar.workflow import Workflow

_N_CALLS = 5  # functions of one of Dask's callbacks
_HASH_SEED = "6640"  # any fixed number, for start methods that give each worker a hash of its own


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
    """Compute keys of a Dask graph on local workers; a scheduler function, as Dask calls one.

    The workers stay for the next call, until the program ends or another number of them is wanted, or
    `forgepar.daskgraphs.close_workers` is called. Large values go from
    worker to worker through shared memory. Arguments of a node are read-only at first; one that writes to them gets
    copies at a second try.

    Args:
        dsk: the graph.
        keys: a key, or lists of keys, however deep.
        num_workers: how many workers; None: what Dask's configuration says, else one for each CPU.
        pool: an executor to run on instead; it stays open.
        optimize_graph: whether to fuse chains of nodes into one.
        schedule: "eager", as these graphs are ragged; or "layers".
        callbacks: Dask's callbacks; None: those that are active. They hear of a node when its worker tells of it, so of
            its begin not long before its end, and of the values of keys alone, once all is done.
        **others: what other schedulers of Dask's take; not looked at.

    Returns:
        The value of a key; for a list a tuple of them.

    Raises:
        KeyError: the graph has no such key.
        ValueError: a node needs one that is not in the graph, or nodes need each other.
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
    if callbacks is not None:
        _check_callbacks(callbacks)
    check_choice("schedule", schedule, ("eager", "layers"))
    check_flag("optimize_graph", optimize_graph)
    check_workers("num_workers", num_workers)
    if not isinstance(dsk, Mapping) and not hasattr(dsk, "__dask_graph__"):
        raise refusal("dsk", "a Dask graph", dsk)
    wanted = checked_by("keys", lambda: set(_flat(keys)), "a key of the graph, or lists of keys", keys)
    with local_callbacks(callbacks) as active:
        nodes = _nodes(dsk, wanted, fuses=optimize_graph)
        with _Listening(active, nodes) as listening:
            values = _values(nodes, wanted, listening, num_workers, pool, schedule)
            listening.values(values)
    return _nested(keys, values)


def _check_callbacks(callbacks: Any) -> None:
    """Refuse what are no callbacks as Dask hands them on: tuples of five functions, each of which may be None."""
    is_several = isinstance(callbacks, Collection) and not isinstance(callbacks, (str, bytes))
    for callback in callbacks if is_several else [None]:
        is_one = isinstance(callback, tuple) and len(callback) == _N_CALLS
        if not is_one or not all(part is None or callable(part) for part in callback or ()):
            raise refusal("callbacks", "a list of Dask's callbacks, each a tuple of 5 functions, or None", callbacks)


# The graph


def _nodes(dsk: Any, wanted: set[Hashable], *, fuses: bool) -> dict[Hashable, Any]:
    """Return what of a graph has to be computed, in the newest of Dask's forms."""
    from dask._task_spec import convert_legacy_graph, cull, fuse_linear_task_spec

    graph = dsk if isinstance(dsk, Mapping) and not hasattr(dsk, "__dask_graph__") else dsk.__dask_graph__()
    graph = dict(graph)
    for key in wanted:
        if key not in graph:
            raise KeyError(key)
    nodes = convert_legacy_graph(graph)
    for key in wanted - nodes.keys():  # an alias of itself
        raise KeyError(key)
    nodes = cull({key: _under_its_key(key, node) for key, node in nodes.items()}, wanted)
    return dict(fuse_linear_task_spec(nodes, wanted)) if fuses and len(nodes) > 1 else dict(nodes)


def _under_its_key(key: Hashable, node: Any) -> Any:
    """Return a node that has the key by which the graph has it: Dask goes by both, and some graphs say two."""
    from dask._task_spec import Alias

    if node.key == key:
        return node
    return Alias(key, node.target) if isinstance(node, Alias) else node.substitute({}, key=key)


def _in_order(nodes: Mapping[Hashable, Any]) -> Iterator[Hashable]:
    """Yield the keys, each behind those that it needs."""
    for key, node in nodes.items():
        for other in node.dependencies:
            if other not in nodes:
                raise ValueError(f"{key!r} needs {other!r}, which the graph does not have.")
    try:
        yield from TopologicalSorter({key: node.dependencies for key, node in nodes.items()}).static_order()
    except CycleError as error:
        raise ValueError(f"nodes of the graph need each other: {' -> '.join(map(repr, error.args[1]))}") from None


class _Declared:
    """A graph as a workflow.

    Args:
        nodes: the graph.

    Attributes:
        workflow: its nodes that have to be called.
        handles: their handles, by key; the same one for an alias.
        data: values that the graph has, by key.
        keys: of the tasks, by their number.
        found: the functions and classes in nodes.
    """

    def __init__(self, nodes: Mapping[Hashable, Any]) -> None:
        from dask._task_spec import Alias, DataNode
        from dask.utils import key_split

        self.workflow = Workflow("dask graph")
        self.handles: dict[Hashable, TaskHandle] = {}
        self.data: dict[Hashable, Any] = {}
        self.keys: list[Hashable] = []
        self.found = self.workflow.refers_to = Found()
        self._kept: dict[Hashable, Kept] = {}
        self._steps: dict[str, Step] = {}
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
        step = self._steps.setdefault(kind, Step(kind))
        try:
            node = packed(Node(node, names, known), self.found)
        except Exception as error:
            told = "could not be read when it was" if is_system_error(error) else "cannot be"
            add_note(error, f"the node {key!r} of the Dask graph {told} pickled, so it cannot go to a worker.")
            raise
        self.handles[key] = self.workflow.add(step, node, *map(self._argument, names))
        self.keys.append(key)

    def _argument(self, name: Hashable) -> Any:
        """Return what stands for a value: the same object each time, so that a large one is written once."""
        if name in self.handles:
            return self.handles[name]
        return self._kept.setdefault(name, Kept(self.data[name]))


def _values(
    nodes: Mapping[Hashable, Any],
    wanted: set[Hashable],
    listening: _Listening,
    num_workers: int | None,
    pool: WorkflowExecutor | None,
    schedule: Literal["eager", "layers"],
) -> dict[Hashable, Any]:
    """Compute a graph; return the values of the keys that are wanted."""
    declared = _Declared(nodes)
    outputs = [declared.handles[key] for key in wanted if key in declared.handles]
    values = {key: declared.data[key] for key in wanted if key in declared.data}
    if not outputs:
        return values
    listening.begin(declared)
    failure = None
    with _executor(num_workers, pool) as executor:
        try:
            result = executor.run(
                declared.workflow,
                outputs=outputs,
                schedule=schedule,
                cancel=listening.token,
                audit=listening.hear if listening.is_wanted else None,
            )
        except WorkflowFailed as error:
            failure, result = error, error.result
    listening.raise_own()
    if failure is not None:
        raise _own_error(declared, failure, result)
    result.detach()  # values that Dask returns can be written
    return values | {key: result[declared.handles[key]] for key in wanted if key in declared.handles}


def _own_error(declared: _Declared, failure: WorkflowFailed, result: RunResult) -> Exception:
    """Return what the first node that failed raised."""
    error = failure.exceptions[0]
    for name, other in result.errors.items():
        if other is error:
            add_note(error, f"key of the Dask graph: {declared.keys[declared.workflow.index_of(name)]!r}")
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


class _Listening:
    """Tells Dask's callbacks what happens, while it does.

    Args:
        callbacks: theirs, five functions each, any of which may be None.
        nodes: the graph.

    Attributes:
        token: calls the run off where a callback raises.
        is_wanted: whether anybody listens.
    """

    def __init__(self, callbacks: Iterable[tuple[Any, ...]], nodes: Mapping[Hashable, Any]) -> None:
        self._callbacks = list(callbacks)
        self._begun: list[tuple[Any, ...]] = []
        self._nodes = nodes
        self._declared: _Declared | None = None
        self._error: BaseException | None = None
        self.is_wanted = bool(self._callbacks)
        self.token = CancellationToken() if self.is_wanted else None
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
            self._finish(is_bad=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._finish(is_bad=kind is not None)

    def begin(self, declared: _Declared) -> None:
        """Tell that nodes are about to run."""
        self._declared = declared
        if self.is_wanted:
            self._state["waiting"].update(declared.keys)
            self._state["cache"].update(declared.data)
            self._state["dependencies"] = {key: set(node.dependencies) for key, node in self._nodes.items()}
            self._call(1, self._nodes, self._state)

    def hear(self, event: Event) -> None:
        """Tell of a node that began or ended; what a callback raises ends the run."""
        if not isinstance(event, (WorkflowTaskStarted, WorkflowTaskCompleted, WorkflowTaskFailed)) or self._error:
            return
        assert self._declared is not None
        assert self.token is not None
        key, state = self._declared.keys[self._declared.workflow.index_of(event.task)], self._state
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

    def values(self, values: Mapping[Hashable, Any]) -> None:
        """Have the values of keys in the state, for whoever looks at the end."""
        self._state["cache"].update(values)

    def raise_own(self) -> None:
        """Raise what a callback raised."""
        if self._error is not None:
            raise self._error

    def _call(self, which: int, *arguments: Any) -> None:
        for callback in self._begun:
            if callback[which]:
                callback[which](*arguments)

    def _finish(self, *, is_bad: bool) -> None:
        for callback in self._begun:
            if callback[4]:
                callback[4](self._nodes, self._state, is_bad)


# Workers


_idle: list[tuple[int, int, WorkflowExecutor]] = []  # process, workers, executor
_idle_lock = fork_safe(threading.RLock())


@contextmanager
def _executor(num_workers: int | None, pool: WorkflowExecutor | None) -> Iterator[WorkflowExecutor]:
    """Give an executor: that of an earlier call, where it has as many workers and nobody else uses it."""
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
    """End the workers that earlier calls of `dask_get` left for the next one."""
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
        # Workers that are forked share the hash of text, by which Dask sorts items into groups; others must be told.
        os.environ.setdefault("PYTHONHASHSEED", _HASH_SEED)
    return WorkflowExecutor(n_workers)


def _put_back(n_workers: int, executor: WorkflowExecutor) -> None:
    """Keep an executor for the next call, in the place of the one before; the backend closes it at exit."""
    _keep([(os.getpid(), n_workers, executor)])


def _keep(entries: list[tuple[int, int, WorkflowExecutor]]) -> None:
    with _idle_lock:
        before, _idle[:] = _idle[:], entries
    for process, _, executor in before:
        if process == os.getpid():  # those of a parent are not ours to end
            executor.close()
