"""Workflows from `Adjacency` and from graphs of networkx and rustworkx, without importing either."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from forgepar._validate import as_list, check_callable, check_instance, has, refusal, shown
from forgepar.errors import DuplicateTaskName, WorkflowError
from forgepar.graph import Adjacency
from forgepar.workflow.handles import TaskHandle
from forgepar.workflow.workflow import Workflow

_NAMES = "strings, the names of node attributes"


class _Node(NamedTuple):
    """A node that becomes a task.

    Attributes:
        key: the node as the function gets it.
        name: the task's name; None to derive it from the callable.
        attributes: the node's attributes in the graph.
        before: numbers of its predecessors, one per edge, in the order of the edges.
    """

    key: Any
    name: str | None
    attributes: Mapping[str, Any]
    before: Sequence[int]


def declare_graph(workflow: Workflow, graph: Any, fn: Callable[..., Any] | str, attributes: Sequence[str]) -> Workflow:
    """Add one task per node of a graph, in the graph's order."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    if not isinstance(fn, str):
        check_callable("fn", fn, WorkflowError)
    attributes = as_list("attributes", attributes, _NAMES, WorkflowError)
    for name in attributes:
        check_instance("attributes", name, str, _NAMES, WorkflowError)
    for index, node in enumerate(_nodes(graph)):
        # Handles may be of tasks that are not declared yet: the plan sorts tasks, and finds cycles.
        values = [TaskHandle(workflow, before) for before in node.before]
        if isinstance(fn, str):
            workflow.add(_callable_of(node, fn), *values, **_chosen(node, attributes))
        else:
            workflow.add(fn, node.key, *values, **_chosen(node, attributes))
        if node.name is not None:
            if node.name in taken:
                raise DuplicateTaskName(
                    f"Two nodes of the graph have the name {node.name!r}, which names their tasks. Rename one of them.",
                    name=node.name,
                )
            taken.add(node.name)
            names[index] = node.name
    workflow.adopt_names(names, workflow.counters)
    return workflow


def _nodes(graph: Any) -> Iterator[_Node]:
    if isinstance(graph, Adjacency):
        return _of_adjacency(graph)
    if has(graph, "nodes") and callable(getattr(graph, "is_directed", None)):
        return _of_networkx(graph)
    if has(graph, "node_indices", "edge_list"):
        return _of_rustworkx(graph)
    raise refusal("graph", "a networkx.DiGraph, a rustworkx.PyDiGraph or an Adjacency", graph, WorkflowError)


def _of_adjacency(graph: Adjacency) -> Iterator[_Node]:
    before = graph.reversed()
    for node in range(graph.n_nodes):
        yield _Node(node, None, {}, before.successors(node).tolist())


def _of_networkx(graph: Any) -> Iterator[_Node]:
    _refuse_undirected(graph, is_directed=graph.is_directed())
    number = {key: index for index, key in enumerate(graph.nodes)}
    for key, attributes in graph.nodes(data=True):
        yield _Node(key, str(key), attributes, [number[before] for before, _ in graph.in_edges(key)])


def _of_rustworkx(graph: Any) -> Iterator[_Node]:
    _refuse_undirected(graph, is_directed=hasattr(graph, "predecessor_indices"))
    indices = list(graph.node_indices())  # not consecutive if nodes were removed
    number = {index: place for place, index in enumerate(indices)}
    before: list[list[int]] = [[] for _ in indices]
    for source, target in graph.edge_list():
        before[number[target]].append(number[source])
    for place, index in enumerate(indices):
        payload = graph[index]
        attributes = payload if isinstance(payload, Mapping) else {}
        yield _Node(payload, payload if isinstance(payload, str) else str(index), attributes, before[place])


def _refuse_undirected(graph: Any, *, is_directed: bool) -> None:
    if not is_directed:
        raise refusal("graph", "a directed graph", graph, WorkflowError)


def _callable_of(node: _Node, attribute: str) -> Callable[..., Any]:
    """Return the node's function."""
    found = node.key if callable(node.key) else node.attributes.get(attribute)
    if found is None or not callable(found):
        raise WorkflowError(
            f"Node {node.name or node.key!r} must have a function in its attribute {attribute!r} (fn={attribute!r}), "
            f"got {shown(found)}. Set the attribute on each node, or pass from_graph() one function for all."
        )
    called: Callable[..., Any] = found
    return called


def _chosen(node: _Node, attributes: Iterable[str]) -> dict[str, Any]:
    return {name: node.attributes[name] for name in attributes if name in node.attributes}
