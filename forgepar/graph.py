"""Directed graphs as numpy columns: layers, cycles, heaviest paths. Integers only; it knows no tasks.

Wide stretches of a graph are worked on a layer at a time by numpy, narrow ones a node at a time in plain Python: a
numpy call costs 1 to 5 us however little it does, a step in Python 0.1 us a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

IndexArray: TypeAlias = NDArray[np.signedinteger[Any]]

_NARROW = 48  # nodes in a layer, below which Python is quicker than numpy
_WIDE = 2 * _NARROW  # above which numpy takes over again; the gap keeps a graph near the border from going to and fro
_CHAIN_SHARE = (
    64  # single-node layers seen, as a share of all nodes, after which chains are worth an index of their own
)


class CycleFound(ValueError):
    """The graph has a cycle.

    Attributes:
        cycle: its nodes in order; the last one leads back to the first, which is not repeated.
    """

    def __init__(self, message: str, cycle: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.cycle = list(cycle)


@dataclass(frozen=True, slots=True, eq=False)
class Adjacency:
    """A sparse adjacency matrix in compressed rows (CSR): for each node, the nodes that it leads to.

    Attributes:
        n_nodes: how many nodes; they are numbered from 0.
        indptr: (n_nodes + 1,), where each node's successors begin in ``indices``.
        indices: (n_edges,), successors, node by node. Both are int32 where the graph is small enough, else int64.

    Example:
        >>> graph = Adjacency.from_edges(4, [0, 0, 1, 2], [1, 2, 3, 3])
        >>> longest_path_layers(graph).tolist()
        [0, 1, 1, 2]
    """

    n_nodes: int
    indptr: IndexArray
    indices: IndexArray

    @classmethod
    def from_edges(cls, n_nodes: int, sources: ArrayLike, targets: ArrayLike) -> Adjacency:
        """Build the rows from edges; duplicates are kept.

        Edges that are not sorted by their source are sorted as packed 64-bit keys, which numpy does at about 20 ns an
        edge. Cost: O(m log m), or O(m) where they are sorted.

        Args:
            n_nodes: how many nodes.
            sources: (m,) integers, where each edge begins.
            targets: (m,) integers, where each ends.

        Raises:
            ValueError: arrays of unequal length, or a node that is not there.
        """
        tails, heads = _integers(sources, "sources"), _integers(targets, "targets")
        _check_edges(n_nodes, tails, heads)
        dtype: type[np.signedinteger[Any]] = np.int32 if max(n_nodes, len(tails)) < 2**31 - 1 else np.int64
        indptr: IndexArray = np.zeros(n_nodes + 1, dtype)
        np.cumsum(np.bincount(tails, minlength=n_nodes), out=indptr[1:])
        if bool((tails[1:] >= tails[:-1]).all()):
            return cls(n_nodes, indptr, heads.astype(dtype, copy=False))
        keys = tails.astype(np.int64) << 32
        keys |= heads
        keys.sort()
        keys &= 0xFFFFFFFF
        return cls(n_nodes, indptr, keys.astype(dtype))

    @property
    def n_edges(self) -> int:
        """How many edges, duplicates included."""
        return len(self.indices)

    def successors(self, node: int) -> IndexArray:
        """Return a view of the nodes that ``node`` leads to, ascending unless the edges came sorted by source."""
        return self.indices[self.indptr[node] : self.indptr[node + 1]]

    def successors_of(self, nodes: IndexArray) -> IndexArray:
        """Return the successors of several nodes, one node's after the other's."""
        starts = self.indptr[nodes]
        lengths = self.indptr[nodes + 1] - starts
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        places = np.arange(total, dtype=self.indptr.dtype)
        places += np.repeat(starts - (ends - lengths).astype(self.indptr.dtype), lengths)
        return self.indices[places]

    def in_degrees(self) -> IndexArray:
        """Count the edges into each node: (n_nodes,) of ``indptr``'s dtype."""
        return np.bincount(self.indices, minlength=self.n_nodes).astype(self.indptr.dtype)

    def out_degrees(self) -> IndexArray:
        """Count the edges out of each node: (n_nodes,)."""
        return np.diff(self.indptr)

    def sources(self) -> IndexArray:
        """Return where each edge begins: (n_edges,), beside ``indices``."""
        return np.repeat(np.arange(self.n_nodes, dtype=self.indptr.dtype), self.out_degrees())

    def reversed(self) -> Adjacency:
        """Return the graph with every edge turned round: its rows are the predecessors."""
        return Adjacency.from_edges(self.n_nodes, self.indices, self.sources())

    def to_dense(self) -> NDArray[np.bool_]:
        """Return the matrix: (n_nodes, n_nodes) bool, a row a source. It takes n_nodes squared bytes."""
        dense = np.zeros((self.n_nodes, self.n_nodes), np.bool_)
        dense[self.sources(), self.indices] = True
        return dense

    def descendants(self, nodes: ArrayLike) -> NDArray[np.bool_]:
        """Mark every node that can be reached from ``nodes`` by at least one edge: (n_nodes,) bool. Cost: O(n + m)."""
        reached = np.zeros(self.n_nodes, np.bool_)
        front = np.atleast_1d(_integers(nodes, "nodes"))
        while len(front):
            after = self.successors_of(front)
            after = after[~reached[after]]
            reached[after] = True
            front = np.unique(after)
        return reached


def longest_path_layers(graph: Adjacency) -> NDArray[np.int32]:
    """Compute each node's layer: the number of edges on the longest path to it from a node without predecessors.

    Nodes whose predecessors all have a layer form the next one (A. B. Kahn, 1962, a whole layer at a time).
    Cost: O(n + m), about 30 ns an edge where layers are wide, 50 to 200 ns a node where they are narrow.

    Args:
        graph: the edges.

    Returns:
        (n_nodes,) int32.

    Raises:
        CycleFound: with the path of a cycle.

    Example:
        >>> longest_path_layers(Adjacency.from_edges(3, [0, 1, 0], [1, 2, 2])).tolist()
        [0, 1, 2]
    """
    layering = _Layering(graph)
    layering.run()
    if layering.n_done < graph.n_nodes:
        cycle = _cycle_among(graph, layering.waits > 0)
        shown = " -> ".join(map(str, [*cycle[:20], *(["..."] if len(cycle) > 20 else []), cycle[0]]))
        raise CycleFound(f"the graph has a cycle: {shown}. Take out one of its edges.", cycle)
    return layering.layer


def find_cycle(graph: Adjacency) -> list[int] | None:
    """Return the nodes of a cycle in order, the first not repeated at the end; None without one. Cost: O(n + m)."""
    layering = _Layering(graph)
    layering.run()
    return None if layering.n_done == graph.n_nodes else _cycle_among(graph, layering.waits > 0)


def critical_path(graph: Adjacency, weights: ArrayLike) -> tuple[list[int], float]:
    """Return the heaviest path and its weight, the sum of its nodes'. Cost: O(n + m).

    Args:
        graph: the edges.
        weights: (n_nodes,) float64, not negative.

    Raises:
        CycleFound: with the path of a cycle.
        ValueError: weights of another length, or negative ones.

    Example:
        >>> critical_path(Adjacency.from_edges(3, [0, 0], [1, 2]), [1.0, 5.0, 2.0])
        ([0, 1], 6.0)
    """
    remaining = longest_remaining(graph, weights)
    if not graph.n_nodes:
        return [], 0.0
    node = int(np.argmax(remaining))
    path, total = [node], float(remaining[node])
    while len(after := graph.successors(node)):
        node = int(after[np.argmax(remaining[after])])
        path.append(node)
    return path, total


def longest_remaining(graph: Adjacency, weights: ArrayLike) -> NDArray[np.float64]:
    """Compute for each node its weight plus the heaviest path behind it. Cost: O(n + m).

    Args:
        graph: the edges.
        weights: (n_nodes,) float64, not negative.

    Returns:
        (n_nodes,) float64.

    Raises:
        CycleFound: with the path of a cycle.
        ValueError: weights of another length, or negative ones.
    """
    remaining = np.array(weights, np.float64)
    if remaining.shape != (graph.n_nodes,) or bool((remaining < 0).any()):
        raise ValueError(f"weights must be {graph.n_nodes} numbers that are not negative, got {remaining.shape}.")
    layers = longest_path_layers(graph)
    order = np.argsort(layers, kind="stable")
    ends = np.cumsum(np.bincount(layers)).tolist() if graph.n_nodes else []
    end = len(order)
    for start in reversed([0, *ends[:-1]]):
        nodes = order[start:end]
        if len(nodes) > _NARROW:
            _add_heaviest_successor(graph, nodes, remaining)
        else:
            _add_heaviest_successor_plainly(graph, nodes.tolist(), remaining)
        end = start
    return remaining


class _Layering:
    """The state of `longest_path_layers`: how many predecessors each node still waits for."""

    def __init__(self, graph: Adjacency) -> None:
        self.graph = graph
        self.waits = graph.in_degrees()
        self.layer = np.zeros(graph.n_nodes, np.int32)
        self.n_done = 0
        self._depth = 0
        self._scratch = np.empty(graph.n_nodes, graph.indptr.dtype)
        self._n_single = 0
        self._next_in_chain: list[int] | None = None

    def run(self) -> None:
        front: IndexArray = np.flatnonzero(self.waits == 0).astype(self.graph.indptr.dtype)
        while len(front):
            front = self._wide(front) if len(front) > _NARROW else self._narrow(front.tolist())

    def _wide(self, front: IndexArray) -> IndexArray:
        """Settle one layer by numpy and return the next."""
        graph, waits = self.graph, self.waits
        self.layer[front] = self._depth
        self._depth += 1
        self.n_done += len(front)
        after = graph.successors_of(front)
        if len(after) > graph.n_nodes // 8:  # counting all nodes is then quicker than counting off one by one
            waits -= np.bincount(after, minlength=graph.n_nodes).astype(waits.dtype)
        else:
            np.subtract.at(waits, after, 1)
        free = after[waits[after] == 0]
        # Keep one of each: of all places of a node in `free`, the scratch remembers the last.
        places = np.arange(len(free), dtype=self._scratch.dtype)
        self._scratch[free] = places
        following: IndexArray = free[self._scratch[free] == places]
        return following

    def _narrow(self, front: list[int]) -> IndexArray:
        """Settle layers in Python until one is wide, and return that."""
        starts, ends = self.graph.indptr.data, self.graph.indptr[1:].data
        indices, waits, layer = self.graph.indices.data, self.waits.data, self.layer.data
        depth = self._depth
        while front and len(front) <= _WIDE:
            if len(front) == 1:
                self._n_single += 1
                if self._n_single * _CHAIN_SHARE > self.graph.n_nodes:
                    front, depth = self._follow_chain(front[0], depth)
            following = []
            for node in front:
                layer[node] = depth
                for place in range(starts[node], ends[node]):
                    after = indices[place]
                    left = waits[after] - 1
                    waits[after] = left
                    if not left:
                        following.append(after)
            self.n_done += len(front)
            front = following
            depth += 1
        self._depth = depth
        return np.array(front, self.graph.indptr.dtype)

    def _follow_chain(self, node: int, depth: int) -> tuple[list[int], int]:
        """Settle the nodes from ``node`` on that have one successor which has no other predecessor.

        Returns:
            The chain's last node, not settled yet, and its depth.
        """
        if self._next_in_chain is None:
            self._next_in_chain = _chain_links(self.graph)
        links, path = self._next_in_chain, []
        while (after := links[node]) >= 0:
            path.append(node)
            node = after
        if path:
            settled = np.array(path, np.int64)
            self.layer[settled] = np.arange(depth, depth + len(path))
            self.waits[settled] = 0
            self.waits[node] = 0
            self.n_done += len(path)
        return [node], depth + len(path)


def _chain_links(graph: Adjacency) -> list[int]:
    """Return each node's successor if that is its only one and has no other predecessor, else -1."""
    links = np.full(graph.n_nodes, -1, np.int64)
    single = np.flatnonzero(graph.out_degrees() == 1)
    after = graph.indices[graph.indptr[single]]
    alone = graph.in_degrees()[after] == 1
    links[single[alone]] = after[alone]
    return links.tolist()


def _cycle_among(graph: Adjacency, left: NDArray[np.bool_]) -> list[int]:
    """Find a cycle among the nodes that layering could not settle: each of them has a predecessor among them."""
    sources = graph.sources()
    inside = left[sources] & left[graph.indices]
    before = np.full(graph.n_nodes, -1, np.int64)
    before[graph.indices[inside]] = sources[inside]
    node = int(np.argmax(left))
    seen: dict[int, int] = {}
    path: list[int] = []
    while node not in seen:
        seen[node] = len(path)
        path.append(node)
        node = int(before[node])
    return path[seen[node] :][::-1]


def _add_heaviest_successor(graph: Adjacency, nodes: NDArray[np.intp], remaining: NDArray[np.float64]) -> None:
    nodes = nodes[graph.indptr[nodes + 1] > graph.indptr[nodes]]
    if not len(nodes):
        return
    lengths = graph.indptr[nodes + 1] - graph.indptr[nodes]
    starts = np.cumsum(lengths) - lengths
    remaining[nodes] += np.maximum.reduceat(remaining[graph.successors_of(nodes)], starts)


def _add_heaviest_successor_plainly(graph: Adjacency, nodes: list[int], remaining: NDArray[np.float64]) -> None:
    starts, indices, values = graph.indptr.data, graph.indices.data, remaining.data
    for node in nodes:
        after = indices[starts[node] : starts[node + 1]]
        if len(after):
            values[node] += max([values[i] for i in after])


def _integers(values: ArrayLike, name: str) -> IndexArray:
    array = np.asarray(values)
    if not array.size:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {array.dtype}. Convert them first.")
    return array


def _check_edges(n_nodes: int, sources: IndexArray, targets: IndexArray) -> None:
    if sources.shape != targets.shape or sources.ndim != 1:
        raise ValueError(
            f"an edge has a source and a target, got {sources.shape} and {targets.shape}. Give two lists of one length."
        )
    for name, array in (("sources", sources), ("targets", targets)):
        if len(array) and (int(array.min()) < 0 or int(array.max()) >= n_nodes):
            bad = int(array.min()) if int(array.min()) < 0 else int(array.max())
            raise ValueError(f"{name} holds {bad}, and the nodes are 0 to {n_nodes - 1}. Give more nodes, or mend it.")
