"""Graphs of other libraries as workflows: networkx, rustworkx, and `Adjacency`; none of them is imported here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from forgepar.errors import DuplicateTaskName, WorkflowError
from forgepar.graph import Adjacency
from forgepar.handles import TaskHandle
from forgepar.validation import as_list, check_callable, check_instance, shown
from forgepar.workflow import Engine, Workflow


class _Node(NamedTuple):
    """A node as it becomes a task.

    Attributes:
        key: what stands for it, as the function gets it.
        name: its task's name; None: as tasks are named by themselves.
        attributes: what the graph knows of it.
        before: numbers of the nodes that lead to it, one an edge, in the order of the edges.
    """

    key: Any
    name: str | None
    attributes: Mapping[str, Any]
    before: Sequence[int]


def _from_graph(workflow: Workflow, graph: Any, fn: Callable[..., Any] | str, attributes: Sequence[str]) -> Workflow:
    """Add a task for each node of a graph, in the graph's order."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    if not isinstance(fn, str):
        check_callable("fn", fn, WorkflowError)
    for name in as_list("attributes", attributes, "names of attributes", WorkflowError):
        check_instance("attributes", name, str, "names of attributes, each a text", WorkflowError)
    for index, node in enumerate(_nodes(graph)):
        # Handles of tasks that are yet to come are as good: the plan sorts them, and finds cycles.
        values = [TaskHandle(workflow, before) for before in node.before]
        if isinstance(fn, str):
            workflow.add(_callable_of(node, fn), *values, **_chosen(node, attributes))
        else:
            workflow.add(fn, node.key, *values, **_chosen(node, attributes))
        if node.name is not None:
            if node.name in taken:
                raise DuplicateTaskName(
                    f"two nodes of the graph are called {node.name!r}, and tasks are named after them. Rename one.",
                    name=node.name,
                )
            taken.add(node.name)
            names[index] = node.name
    workflow.adopt_names(names, workflow.counters)
    return workflow


def _nodes(graph: Any) -> Iterator[_Node]:
    if isinstance(graph, Adjacency):
        return _of_adjacency(graph)
    if hasattr(graph, "nodes") and callable(getattr(graph, "is_directed", None)):
        return _of_networkx(graph)
    if hasattr(graph, "node_indices") and hasattr(graph, "edge_list"):
        return _of_rustworkx(graph)
    raise WorkflowError(
        f"graph={shown(graph)} is no graph that is known here. Give a networkx.DiGraph, a rustworkx.PyDiGraph or an "
        "Adjacency."
    )


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
    indices = list(graph.node_indices())  # with holes where nodes were removed
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
        raise WorkflowError(f"{graph!r} has no directions, so nothing comes before anything. Give a directed graph.")


def _callable_of(node: _Node, attribute: str) -> Callable[..., Any]:
    """Return what a node says is to be called."""
    found = node.key if callable(node.key) else node.attributes.get(attribute)
    if found is None or not callable(found):
        raise WorkflowError(
            f"node {node.name or node.key!r} has no function (fn={attribute!r}): its attribute {attribute!r} is "
            f"{found!r}. "
            "Give each node one, or give from_graph() a function for all."
        )
    called: Callable[..., Any] = found
    return called


def _chosen(node: _Node, attributes: Iterable[str]) -> dict[str, Any]:
    return {name: node.attributes[name] for name in attributes if name in node.attributes}


Engine.from_graph = _from_graph
