"""Directed graphs as numpy columns: layers, cycles, heaviest paths. Integers only; it knows no tasks.

Wide stretches of a graph are worked on a layer at a time by numpy, narrow ones a node at a time in plain Python: the
dozen numpy calls of a layer cost 10 to 20 us however little they do, a step in Python 0.1 to 0.3 us a node or edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forgepar.validation import check_count, check_instance, checked_by, refusal, shown

IndexArray: TypeAlias = NDArray[np.signedinteger[Any]]

_NARROW = 48  # nodes in a layer, up to which Python is quicker than numpy
_WIDE = 2 * _NARROW  # above which numpy takes over again; the gap keeps a graph near the border from going to and fro
_HUB = 256  # successors of one node, above which its layer goes to numpy even if it is narrow
_SHORT_CHAIN = 32  # nodes, up to which writing them one by one is quicker than as an array
_PACKABLE = 2**31  # node numbers below this fit into half of a 64-bit key
_MOST_NODES = 1 << 48  # more than any machine has memory for
_SHOWN = 20  # nodes of a cycle that a message names


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
        indices: (n_edges,), successors, node by node. Both are int32 where nodes and edges can be counted in it, else
            int64; `from_edges` makes both read-only.

    Example:
        >>> graph = Adjacency.from_edges(4, [0, 0, 1, 2], [1, 2, 3, 3])
        >>> graph.n_edges, graph.successors(0).tolist()
        (4, [1, 2])
        >>> longest_path_layers(graph).tolist()
        [0, 1, 1, 2]
    """

    n_nodes: int
    indptr: IndexArray
    indices: IndexArray

    @classmethod
    def from_edges(cls, n_nodes: int, sources: ArrayLike, targets: ArrayLike) -> Adjacency:
        """Build the rows from edges; duplicates are kept and the arrays copied.

        Edges whose sources ascend already stay in their order. Others are sorted as packed 64-bit keys, by source and
        then by target: numpy sorts keys several times quicker than it can tell the order that sorts them (`argsort`).
        Cost: O(m log m), or O(n + m) where sources ascend.

        Args:
            n_nodes: how many nodes.
            sources: (m,) integers of any kind, where each edge begins.
            targets: (m,) integers of any kind, where each ends.

        Returns:
            The graph.

        Raises:
            ValueError: arrays of unequal length or not of integers, or a node that is not there.

        Example:
            >>> Adjacency.from_edges(3, [2, 0, 0], [1, 2, 1]).indices.tolist()
            [1, 2, 1]
        """
        check_count("n_nodes", n_nodes, 0, _MOST_NODES)
        tails, heads = _checked_edges(n_nodes, sources, targets)
        dtype = _index_dtype(n_nodes, len(tails))
        indptr: IndexArray = np.zeros(n_nodes + 1, dtype)
        np.cumsum(np.bincount(tails, minlength=n_nodes), out=indptr[1:])
        indices = _sorted_beside(tails, heads).astype(dtype)
        indptr.setflags(write=False)
        indices.setflags(write=False)
        return cls(n_nodes, indptr, indices)

    @property
    def n_edges(self) -> int:
        """How many edges, duplicates included."""
        return len(self.indices)

    def successors(self, node: int) -> IndexArray:
        """Return a view of the nodes that ``node`` leads to, ascending unless the edges came sorted by source."""
        try:
            return self.indices[self.indptr[node] : self.indptr[node + 1]]
        except (TypeError, IndexError, ValueError, OverflowError):
            raise refusal("node", f"an integer from 0 to {self.n_nodes - 1}", node) from None

    def successors_of(self, nodes: IndexArray) -> IndexArray:
        """Return the successors of several nodes, one node's after the other's. Cost: O(nodes + successors).

        Args:
            nodes: (k,) integers.

        Example:
            >>> Adjacency.from_edges(3, [0, 0, 1], [1, 2, 2]).successors_of(np.array([1, 0])).tolist()
            [2, 1, 2]
        """
        try:
            starts = self.indptr.take(nodes)
            lengths = self.indptr.take(nodes + 1) - starts
            ends = np.cumsum(lengths, dtype=self.indptr.dtype)
            places = np.arange(int(ends[-1]) if len(ends) else 0, dtype=self.indptr.dtype)
            places += np.repeat(starts - (ends - lengths), lengths)
        except (TypeError, ValueError, IndexError, OverflowError):
            raise refusal("nodes", f"an array of integers from 0 to {self.n_nodes - 1}", nodes) from None
        return self.indices.take(places)

    def in_degrees(self) -> IndexArray:
        """Count the edges into each node: (n_nodes,) of ``indptr``'s dtype."""
        return np.bincount(self.indices, minlength=self.n_nodes).astype(self.indptr.dtype)

    def out_degrees(self) -> IndexArray:
        """Count the edges out of each node: (n_nodes,) of ``indptr``'s dtype."""
        return np.diff(self.indptr)

    def sources(self) -> IndexArray:
        """Return where each edge begins: (n_edges,), beside ``indices``."""
        return np.repeat(np.arange(self.n_nodes, dtype=self.indptr.dtype), self.out_degrees())

    def edges(self) -> tuple[IndexArray, IndexArray]:
        """Return all edges: where they begin, (n_edges,), and where they end, (n_edges,)."""
        return self.sources(), self.indices

    def reversed(self) -> Adjacency:
        """Return the graph with every edge turned round: its rows are the predecessors. Cost: as `from_edges`."""
        return Adjacency.from_edges(self.n_nodes, self.indices, self.sources())

    def to_dense(self) -> NDArray[np.bool_]:
        """Return the matrix: (n_nodes, n_nodes) bool, a row a source. It takes n_nodes squared bytes.

        Example:
            >>> Adjacency.from_edges(2, [0], [1]).to_dense().astype(int).tolist()
            [[0, 1], [0, 0]]
        """
        dense = np.zeros((self.n_nodes, self.n_nodes), np.bool_)
        dense[self.sources(), self.indices] = True
        return dense

    def to_scipy(self) -> Any:
        """Return the matrix as a ``scipy.sparse.csr_array`` of bool, a row a source; it shares this one's indices.

        Raises:
            ImportError: scipy is not installed.

        Example:
            >>> graph = Adjacency.from_edges(2, [0], [1])
            >>> Adjacency.from_scipy(graph.to_scipy()).edges()
            (array([0], dtype=int32), array([1], dtype=int32))
        """
        try:
            from scipy.sparse import csr_array
        except ImportError as missing:
            raise ImportError("Adjacency.to_scipy needs scipy: pip install 'forgepar[scipy]'") from missing
        ones = np.ones(self.n_edges, np.bool_)
        return csr_array((ones, self.indices, self.indptr), shape=(self.n_nodes, self.n_nodes))

    @classmethod
    def from_scipy(cls, matrix: Any) -> Adjacency:
        """Build the rows from a square sparse matrix of scipy's: an edge for each entry that is not zero.

        Raises:
            ValueError: it is no sparse matrix, or not square.
        """
        if not hasattr(matrix, "tocoo"):
            raise ValueError(f"matrix={shown(matrix)} is no sparse matrix. Give one of scipy.sparse.")
        if len(matrix.shape) != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"a graph's matrix is square, got {matrix.shape}. Give a row and a column for each node.")
        entries = matrix.tocoo()
        is_edge = entries.data != 0
        return cls.from_edges(matrix.shape[0], entries.row[is_edge], entries.col[is_edge])

    def descendants(self, nodes: ArrayLike) -> NDArray[np.bool_]:
        """Mark every node that can be reached from ``nodes`` by at least one edge. Breadth first, cost O(n + m).

        Args:
            nodes: integers, in any order; one of them is marked only where an edge leads back to it.

        Returns:
            (n_nodes,) bool.

        Raises:
            ValueError: ``nodes`` are not integers, or not there.

        Example:
            >>> Adjacency.from_edges(4, [0, 1, 3], [1, 2, 2]).descendants([0]).tolist()
            [False, True, True, False]
        """
        front = np.atleast_1d(_integers(nodes, "nodes"))
        _check_range(self.n_nodes, front, "nodes")
        front = np.unique(front.astype(self.indptr.dtype))
        reached = np.zeros(self.n_nodes, np.bool_)
        scratch = np.empty(self.n_nodes, self.indptr.dtype)
        while len(front):
            if len(front) <= _NARROW:
                front = _mark_plainly(self, front.tolist(), reached)
            after = self.successors_of(front)
            after = after[~reached.take(after)]
            reached[after] = True
            front = _distinct(after, scratch)
        return reached


def longest_path_layers(graph: Adjacency) -> NDArray[np.int32]:
    """Compute each node's layer: the number of edges on the longest path to it from a node without predecessors.

    Nodes whose predecessors all have a layer form the next one (A. B. Kahn, 1962, a whole layer at a time).
    Cost: O(n + m), 20 to 40 ns an edge where layers are wide, 0.1 us a node along chains, up to 1 us a node
    where layers are narrow.

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
    check_instance("graph", graph, Adjacency, "an Adjacency")
    layering = _Layering(graph)
    layering.run()
    if layering.n_done < graph.n_nodes:
        cycle = _cycle_among(graph, layering.waits > 0)
        told = [*map(str, cycle[:_SHOWN]), *(["..."] if len(cycle) > _SHOWN else []), str(cycle[0])]
        raise CycleFound(f"the graph has a cycle: {' -> '.join(told)}. Take out one of its edges.", cycle)
    return layering.layer


def find_cycle(graph: Adjacency) -> list[int] | None:
    """Find a cycle: peel off what lies on none by layering, then walk back from any node that is left. Cost: O(n + m).

    Args:
        graph: the edges.

    Returns:
        The nodes of a cycle in order, the first not repeated at the end (a node that leads to itself is a cycle of
        one); None without a cycle.

    Example:
        >>> find_cycle(Adjacency.from_edges(3, [0, 1], [1, 1]))
        [1]
    """
    check_instance("graph", graph, Adjacency, "an Adjacency")
    layering = _Layering(graph)
    layering.run()
    return None if layering.n_done == graph.n_nodes else _cycle_among(graph, layering.waits > 0)


def critical_path(graph: Adjacency, weights: ArrayLike) -> tuple[list[int], float]:
    """Find the heaviest path, a path's weight being the sum of its nodes' (J. E. Kelley, 1961). Cost: O(n + m).

    Args:
        graph: the edges.
        weights: (n_nodes,) float64, not negative.

    Returns:
        The nodes of the path in order, and its weight; no nodes and 0.0 for a graph without nodes.

    Raises:
        CycleFound: with the path of a cycle.
        ValueError: weights of another length, negative ones, or NaN.

    Example:
        >>> critical_path(Adjacency.from_edges(3, [0, 0], [1, 2]), [1.0, 5.0, 2.0])
        ([0, 1], 6.0)
    """
    check_instance("graph", graph, Adjacency, "an Adjacency")
    remaining = longest_remaining(graph, weights)
    if not graph.n_nodes:
        return [], 0.0
    first = int(np.argmax(remaining))
    return _heaviest_walk(graph, first, remaining), float(remaining[first])


def longest_remaining(graph: Adjacency, weights: ArrayLike) -> NDArray[np.float64]:
    """Compute for each node its weight plus the heaviest path behind it, last layer first. Cost: O(n log n + m).

    Args:
        graph: the edges.
        weights: (n_nodes,) float64, not negative.

    Returns:
        (n_nodes,) float64.

    Raises:
        CycleFound: with the path of a cycle.
        ValueError: weights of another length, negative ones, or NaN.

    Example:
        >>> longest_remaining(Adjacency.from_edges(3, [0, 0], [1, 2]), [1.0, 5.0, 2.0]).tolist()
        [6.0, 5.0, 2.0]
    """
    remaining: NDArray[np.float64] = checked_by("weights", lambda: np.array(weights, np.float64), "numbers", weights)
    _check_weights(graph.n_nodes, remaining)
    layers = longest_path_layers(graph)
    order = _sorted_beside(layers, np.arange(graph.n_nodes, dtype=graph.indptr.dtype))
    for start, end, is_wide in reversed(_stretches(graph, layers)):
        add_heaviest = _add_heaviest if is_wide else _add_heaviest_plainly
        add_heaviest(graph, order[start:end], remaining)
    return remaining


class _Layering:
    """The state of `longest_path_layers`: how many predecessors each node still waits for."""

    def __init__(self, graph: Adjacency) -> None:
        self.graph = graph
        self._n_before = graph.in_degrees()
        self.waits = self._n_before.copy()
        self.layer = np.zeros(graph.n_nodes, np.int32)
        self.n_done = 0
        self._depth = 0
        # Of the waits' own dtype: `subtract.at` is 20 times slower where it has to cast (numpy 2.4).
        self._one = self.waits.dtype.type(1)
        self._scratch = np.empty(graph.n_nodes, graph.indptr.dtype)

    def run(self) -> None:
        front: IndexArray = np.flatnonzero(self.waits == 0).astype(self.graph.indptr.dtype)
        while len(front):
            front = self._settle(front)
            if 0 < len(front) <= _NARROW:
                front = self._walk(front.tolist())

    def _settle(self, front: IndexArray) -> IndexArray:
        """Settle one layer by numpy and return the next."""
        self.layer[front] = self._depth
        self._depth += 1
        self.n_done += len(front)
        after = self.graph.successors_of(front)
        np.subtract.at(self.waits, after, self._one)
        return _distinct(after[self.waits.take(after) == 0], self._scratch)

    def _walk(self, front: list[int]) -> IndexArray:
        """Settle layers in Python until one is wide or has a hub, and return that. One loop: calls would double it."""
        starts, ends = self.graph.indptr.data, self.graph.indptr[1:].data
        indices, waits, layer = self.graph.indices.data, self.waits.data, self.layer.data
        links, hubs, depth = self._links.data, self._hubs, self._depth
        while front and len(front) <= _WIDE:
            if len(front) == 1 and links[front[0]] >= 0:
                front, depth = self._settle_chain(front[0], depth)
            if hubs and not hubs.isdisjoint(front):
                break
            following = []
            for node in front:
                layer[node] = depth
                for after in indices[starts[node] : ends[node]]:
                    left = waits[after] - 1
                    waits[after] = left
                    if not left:
                        following.append(after)
            self.n_done += len(front)
            front = following
            depth += 1
        self._depth = depth
        return np.array(front, self.graph.indptr.dtype)

    def _settle_chain(self, node: int, depth: int) -> tuple[list[int], int]:
        """Settle nodes from ``node`` on as long as one alone leads to the next alone.

        It comes to an end: nothing outside leads into a ring of such nodes.

        Returns:
            The first node that is not settled, as a layer, and its depth.
        """
        links, path = self._links.data, []
        while (after := links[node]) >= 0:
            path.append(node)
            node = after
        self.n_done += len(path)
        depth += len(path)
        if len(path) > _SHORT_CHAIN:
            self.layer[path] = np.arange(depth - len(path), depth)
            self.waits[path] = 0
        else:
            layer, waits = self.layer.data, self.waits.data
            for back, settled in enumerate(reversed(path), 1):
                layer[settled] = depth - back
                waits[settled] = 0
        self.waits[node] = 0
        return [node], depth

    @cached_property
    def _links(self) -> IndexArray:
        """Each node's successor if that is its only one and has no other predecessor, else -1."""
        graph = self.graph
        links: IndexArray = np.full(graph.n_nodes, -1, graph.indptr.dtype)
        single = np.flatnonzero(graph.out_degrees() == 1)
        after = graph.indices.take(graph.indptr.take(single))
        alone = self._n_before.take(after) == 1
        links[single[alone]] = after[alone]
        return links

    @cached_property
    def _hubs(self) -> frozenset[int]:
        """The nodes whose successors are many enough for numpy."""
        return frozenset(np.flatnonzero(self.graph.out_degrees() > _HUB).tolist())


def _cycle_among(graph: Adjacency, left: NDArray[np.bool_]) -> list[int]:
    """Find a cycle among the nodes that layering could not settle: each of them has a predecessor among them."""
    sources = graph.sources()
    inside = left[sources] & left[graph.indices]
    before = np.full(graph.n_nodes, -1, np.int64)
    before[graph.indices[inside]] = sources[inside]
    links, node = before.data, int(np.argmax(left))
    seen: dict[int, None] = {}
    while node not in seen:
        seen[node] = None
        node = links[node]
    path = list(seen)
    return path[path.index(node) :][::-1]


def _stretches(graph: Adjacency, layers: NDArray[np.int32]) -> list[tuple[int, int, bool]]:
    """Cut the nodes in the order of their layers: each wide layer is a stretch, and so are narrow ones in a row.

    Returns:
        Start, end and whether it is wide, a stretch.
    """
    n_nodes = np.bincount(layers)
    n_edges = np.bincount(layers, weights=graph.out_degrees())
    is_wide = (n_nodes > _NARROW) | (n_edges > _HUB)
    begins = is_wide.copy()
    begins[:1] = True
    begins[1:] |= is_wide[:-1]
    starts = (np.cumsum(n_nodes) - n_nodes)[begins].tolist()
    return list(zip(starts, [*starts[1:], graph.n_nodes], is_wide[begins].tolist(), strict=False))


def _add_heaviest(graph: Adjacency, nodes: IndexArray, remaining: NDArray[np.float64]) -> None:
    """Add to the nodes of one layer the heaviest of their successors, by numpy."""
    lengths = graph.indptr.take(nodes + 1) - graph.indptr.take(nodes)
    nodes, lengths = nodes[lengths > 0], lengths[lengths > 0]
    if len(nodes):
        starts = np.cumsum(lengths) - lengths
        remaining[nodes] += np.maximum.reduceat(remaining.take(graph.successors_of(nodes)), starts)


def _add_heaviest_plainly(graph: Adjacency, nodes: IndexArray, remaining: NDArray[np.float64]) -> None:
    """Add to the nodes of several layers the heaviest of their successors, last node first."""
    starts, ends = graph.indptr.data, graph.indptr[1:].data
    indices, values = graph.indices.data, remaining.data
    for node in reversed(nodes.tolist()):
        start, end = starts[node], ends[node]
        if end - start == 1:
            values[node] += values[indices[start]]
        elif end > start:
            values[node] += max([values[after] for after in indices[start:end]])


def _heaviest_walk(graph: Adjacency, node: int, remaining: NDArray[np.float64]) -> list[int]:
    """Follow the heaviest successor from ``node`` to a node without successors."""
    starts, ends = graph.indptr.data, graph.indptr[1:].data
    indices, values = graph.indices.data, remaining.data
    path = [node]
    while (n_after := ends[node] - starts[node]) > 0:
        if n_after > _HUB:
            after = graph.successors(node)
            node = int(after[np.argmax(remaining.take(after))])
        else:
            node = max(indices[starts[node] : ends[node]], key=values.__getitem__)
        path.append(node)
    return path


def _mark_plainly(graph: Adjacency, front: list[int], reached: NDArray[np.bool_]) -> IndexArray:
    """Mark what can be reached, layer by layer in Python, until a layer is wide or done; return that."""
    starts, ends = graph.indptr.data, graph.indptr[1:].data
    indices, marks = graph.indices.data, reached.data
    while front and len(front) <= _WIDE:
        following = []
        for node in front:
            for after in indices[starts[node] : ends[node]]:
                if not marks[after]:
                    marks[after] = True
                    following.append(after)
        front = following
    return np.array(front, graph.indptr.dtype)


def _distinct(nodes: IndexArray, scratch: IndexArray) -> IndexArray:
    """Keep one of each node without sorting: of all places of a node, ``scratch`` (n_nodes,) remembers the last."""
    places = np.arange(len(nodes), dtype=scratch.dtype)
    scratch[nodes] = places
    kept: IndexArray = nodes[scratch.take(nodes) == places]
    return kept


def _sorted_beside(keys: IndexArray, values: IndexArray) -> IndexArray:
    """Return values by key and then by value, or as they are where keys ascend. Both are below 2**63, not negative."""
    if bool((keys[1:] >= keys[:-1]).all()):
        return values
    if max(int(keys.max()), int(values.max())) >= _PACKABLE:
        ordered: IndexArray = values[np.lexsort((values, keys))]
        return ordered
    packed = keys.astype(np.int64)
    packed <<= 32
    packed |= values
    packed.sort()  # 12 ns a key by AVX2, yet 80 by AVX-512 on some AMD processors (numpy 2.4): most of `from_edges`
    packed &= 0xFFFFFFFF
    return packed


def _index_dtype(n_nodes: int, n_edges: int) -> type[np.signedinteger[Any]]:
    """Return the smallest type that counts nodes and edges."""
    return np.int32 if max(n_nodes, n_edges) < 2**31 - 1 else np.int64


def _integers(values: ArrayLike, name: str) -> IndexArray:
    array: IndexArray = checked_by(name, lambda: np.asarray(values), "integers", values)
    if not array.size:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {array.dtype}. Convert them first.")
    return array


def _checked_edges(n_nodes: int, sources: ArrayLike, targets: ArrayLike) -> tuple[IndexArray, IndexArray]:
    tails, heads = _integers(sources, "sources"), _integers(targets, "targets")
    if tails.shape != heads.shape or tails.ndim != 1:
        raise ValueError(
            f"sources and targets go together: an edge has one of each, got {tails.shape} and {heads.shape}. "
            "Give two lists of one length."
        )
    _check_range(n_nodes, tails, "sources")
    _check_range(n_nodes, heads, "targets")
    # numpy does not mix uint64 with signed integers; what is in range fits.
    return tails.astype(np.int64, copy=False), heads.astype(np.int64, copy=False)


def _check_range(n_nodes: int, nodes: IndexArray, name: str) -> None:
    if not nodes.size:
        return
    lowest, highest = int(nodes.min()), int(nodes.max())
    if lowest < 0 or highest >= n_nodes:
        there = f"the nodes are 0 to {n_nodes - 1}" if n_nodes else "there are no nodes"
        raise ValueError(f"{name} holds {lowest if lowest < 0 else highest}, and {there}. Give more nodes, or mend it.")


def _check_weights(n_nodes: int, weights: NDArray[np.float64]) -> None:
    if weights.shape != (n_nodes,):
        raise ValueError(f"weights must be {n_nodes} numbers, got shape {weights.shape}. Give one for each node.")
    bad = ~(weights >= 0)  # NaN as well
    if bool(bad.any()):
        node = int(np.argmax(bad))
        raise ValueError(f"weights[{node}] is {weights[node]}, and weights are not negative. Give 0 or more.")
