"""Directed graphs in numpy arrays: `Adjacency`, and layers, cycles and heaviest paths.

numpy processes each wide layer of a graph as a whole, plain Python processes the nodes of narrow layers. The dozen
numpy calls per layer take 10 to 20 us however few nodes it has; Python takes 0.1 to 0.3 us per node or edge.

The module is longer than others, as users import the type and its algorithms from one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forgepar._validate import check_count, check_instance, checked_by, has, refusal, shown
from forgepar.version import public

IndexArray: TypeAlias = NDArray[np.signedinteger[Any]]

NARROW = 48  # nodes in a layer, up to which Python is faster than numpy
WIDE = 2 * NARROW  # nodes in a layer, above which numpy takes over again; the gap prevents switching at each layer
_PACKABLE = 2**31  # node numbers below this fit into half of a 64-bit key
_MOST_NODES = 1 << 48  # more than any machine has memory for
_HUB = 256  # successors of one node, above which numpy processes its layer even if the layer is narrow
_SHORT_CHAIN = 32  # nodes, up to which writing them one by one is faster than as an array
_SHOWN = 20  # nodes of a cycle that a message names


@public
@dataclass(frozen=True, slots=True, eq=False)
class Adjacency:
    """A directed graph as a sparse adjacency matrix in compressed rows (CSR): the successors of each node.

    Attributes:
        n_nodes: number of nodes; they are numbered from 0.
        indptr: (n_nodes + 1,), where each node's successors begin in ``indices``.
        indices: (n_edges,), successors, node by node. Both arrays are int32 if the counts of nodes and edges fit, else
            int64. `from_edges` makes both read-only.

    Example:
        >>> graph = Adjacency.from_edges(4, [0, 0, 1, 2], [1, 2, 3, 3])
        >>> graph.n_edges, graph.successors(0).tolist()
        (4, [1, 2])
        >>> graph.in_degrees().tolist()
        [0, 1, 1, 2]
    """

    n_nodes: int
    indptr: IndexArray
    indices: IndexArray

    def __post_init__(self) -> None:
        check_count("n_nodes", self.n_nodes, 0, _MOST_NODES)
        for name in ("indptr", "indices"):
            column = getattr(self, name)
            if not isinstance(column, np.ndarray) or column.ndim != 1 or column.dtype.kind != "i":
                raise refusal(name, "an array of signed integers with one axis", column)
        n_edges = len(self.indices)
        if len(self.indptr) != self.n_nodes + 1 or self.indptr[0] != 0 or self.indptr[-1] != n_edges:
            raise ValueError(
                f"indptr must be n_nodes + 1 = {self.n_nodes + 1} numbers from 0 to len(indices) = {n_edges}, "
                f"got {shown(self.indptr)}. Build the graph with Adjacency.from_edges."
            )

    @classmethod
    def from_edges(cls, n_nodes: int, sources: ArrayLike, targets: ArrayLike) -> Adjacency:
        """Build a graph from its edges. It keeps duplicates and copies the arrays.

        Edges with ascending sources keep their order. Other edges are sorted by source and then by target, as packed
        64-bit keys: numpy sorts keys several times faster than it computes the sorting order (`argsort`).
        Cost: O(m log m), or O(n + m) if the sources ascend.

        Args:
            n_nodes: number of nodes.
            sources: (m,) integers of any dtype: where each edge begins.
            targets: (m,) integers of any dtype: where each edge ends.

        Returns:
            The graph.

        Raises:
            ValueError: the arrays differ in length or are not integers, or a node is out of range.

        Example:
            >>> Adjacency.from_edges(3, [2, 0, 0], [1, 2, 1]).indices.tolist()
            [1, 2, 1]
        """
        check_count("n_nodes", n_nodes, 0, _MOST_NODES)
        tails, heads = _checked_edges(n_nodes, sources, targets)
        dtype = _index_dtype(n_nodes, len(tails))
        indptr: IndexArray = np.zeros(n_nodes + 1, dtype)
        np.cumsum(np.bincount(tails, minlength=n_nodes), out=indptr[1:])
        indices = sorted_beside(tails, heads).astype(dtype)
        indptr.setflags(write=False)
        indices.setflags(write=False)
        return cls(n_nodes, indptr, indices)

    @property
    def n_edges(self) -> int:
        """The number of edges, duplicates included."""
        return len(self.indices)

    def successors(self, node: int) -> IndexArray:
        """Return a view of the successors of ``node``; they ascend unless the edges came sorted by source."""
        try:
            return self.indices[self.indptr[node] : self.indptr[node + 1]]
        except Exception:  # indexing calls the argument's own code, which may raise anything
            raise refusal("node", f"an integer from 0 to {self.n_nodes - 1}", node) from None

    def successors_of(self, nodes: IndexArray) -> IndexArray:
        """Return the successors of several nodes, node after node. Cost: O(nodes + successors).

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
        except MemoryError:
            raise
        except Exception:  # indexing calls the argument's own code, which may raise anything
            raise refusal("nodes", f"an array of integers from 0 to {self.n_nodes - 1}", nodes) from None
        return self.indices.take(places)

    def in_degrees(self) -> IndexArray:
        """Count the edges into each node: (n_nodes,) of ``indptr``'s dtype."""
        return np.bincount(self.indices, minlength=self.n_nodes).astype(self.indptr.dtype)

    def out_degrees(self) -> IndexArray:
        """Count the edges out of each node: (n_nodes,) of ``indptr``'s dtype."""
        return np.diff(self.indptr)

    def sources(self) -> IndexArray:
        """Return where each edge begins: (n_edges,), parallel to ``indices``."""
        return np.repeat(np.arange(self.n_nodes, dtype=self.indptr.dtype), self.out_degrees())

    def edges(self) -> tuple[IndexArray, IndexArray]:
        """Return the sources and the targets of all edges, each (n_edges,)."""
        return self.sources(), self.indices

    def reversed(self) -> Adjacency:
        """Return the graph with every edge reversed: its rows are the predecessors. Cost: as `from_edges`."""
        return Adjacency.from_edges(self.n_nodes, self.indices, self.sources())

    def to_dense(self) -> NDArray[np.bool_]:
        """Return the matrix as (n_nodes, n_nodes) bool, one row per source. It takes n_nodes squared bytes.

        Example:
            >>> Adjacency.from_edges(2, [0], [1]).to_dense().astype(int).tolist()
            [[0, 1], [0, 0]]
        """
        dense = np.zeros((self.n_nodes, self.n_nodes), np.bool_)
        dense[self.sources(), self.indices] = True
        return dense

    def to_scipy(self) -> Any:
        """Return the matrix as a ``scipy.sparse.csr_array`` of bool, one row per source. It shares ``indices``.

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
        """Build a graph from a square scipy sparse matrix: one edge per nonzero entry.

        Raises:
            ValueError: the argument is not a sparse matrix, or is not square.
        """
        if not has(matrix, "tocoo", "shape") or isinstance(matrix, type):
            raise refusal("matrix", "a scipy.sparse matrix", matrix)
        if len(matrix.shape) != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be square, got shape {matrix.shape}. Pass one row and column per node.")
        entries = matrix.tocoo()
        is_edge = entries.data != 0
        return cls.from_edges(matrix.shape[0], entries.row[is_edge], entries.col[is_edge])

    def descendants(self, nodes: ArrayLike) -> NDArray[np.bool_]:
        """Mark every node that ``nodes`` reach by at least one edge: breadth-first search, cost O(n + m).

        Args:
            nodes: integers in any order. One of them is marked only if an edge leads back to it.

        Returns:
            (n_nodes,) bool.

        Raises:
            ValueError: ``nodes`` are not integers, or out of range.

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
            if len(front) <= NARROW:
                front = _mark_in_python(self, front.tolist(), reached)
            after = self.successors_of(front)
            after = after[~reached.take(after)]
            reached[after] = True
            front = distinct(after, scratch)
        return reached


def _mark_in_python(graph: Adjacency, front: list[int], reached: NDArray[np.bool_]) -> IndexArray:
    """Mark reachable nodes layer by layer in Python until a layer is wide or empty; return that layer."""
    starts, ends = graph.indptr.data, graph.indptr[1:].data
    indices, marks = graph.indices.data, reached.data
    while front and len(front) <= WIDE:
        following = []
        for node in front:
            for after in indices[starts[node] : ends[node]]:
                if not marks[after]:
                    marks[after] = True
                    following.append(after)
        front = following
    return np.array(front, graph.indptr.dtype)


def distinct(nodes: IndexArray, scratch: IndexArray) -> IndexArray:
    """Drop duplicates without sorting: ``scratch`` (n_nodes,) stores the last position of each node."""
    places = np.arange(len(nodes), dtype=scratch.dtype)
    scratch[nodes] = places
    kept: IndexArray = nodes[scratch.take(nodes) == places]
    return kept


def sorted_beside(keys: IndexArray, values: IndexArray) -> IndexArray:
    """Return the values sorted by key and then by value; unchanged if the keys ascend. All are from 0 to 2**63 - 1."""
    if bool((keys[1:] >= keys[:-1]).all()):
        return values
    if max(int(keys.max()), int(values.max())) >= _PACKABLE:
        ordered: IndexArray = values[np.lexsort((values, keys))]
        return ordered
    packed = keys.astype(np.int64)
    packed <<= 32
    packed |= values
    packed.sort()  # 12 ns per key with AVX2, but 80 with AVX-512 on some AMD CPUs (numpy 2.4): most of `from_edges`
    packed &= 0xFFFFFFFF
    return packed


def _index_dtype(n_nodes: int, n_edges: int) -> type[np.signedinteger[Any]]:
    """Return the smallest dtype that can count the nodes and the edges."""
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
            f"sources and targets must have one axis and equal lengths, got shapes {tails.shape} and {heads.shape}. "
            "Pass one source and one target per edge."
        )
    _check_range(n_nodes, tails, "sources")
    _check_range(n_nodes, heads, "targets")
    # numpy does not mix uint64 with signed integers; numbers in range fit into int64.
    return tails.astype(np.int64, copy=False), heads.astype(np.int64, copy=False)


def _check_range(n_nodes: int, nodes: IndexArray, name: str) -> None:
    if not nodes.size:
        return
    lowest, highest = int(nodes.min()), int(nodes.max())
    if lowest < 0 or highest >= n_nodes:
        must_be = f"nodes from 0 to {n_nodes - 1}" if n_nodes else "empty as the graph has no nodes"
        raise ValueError(
            f"{name} must be {must_be} (n_nodes={n_nodes}), got {lowest if lowest < 0 else highest}. "
            "Increase n_nodes or correct the number."
        )


class CycleFound(ValueError):
    """The graph has a cycle.

    Attributes:
        cycle: its nodes in order; the last one leads to the first, which is not repeated.
    """

    def __init__(self, message: str, cycle: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.cycle = list(cycle)


@public
def longest_path_layers(graph: Adjacency) -> NDArray[np.int32]:
    """Compute each node's layer: the number of edges on the longest path to it from a node without predecessors.

    Each layer is the nodes without unassigned predecessors (A. B. Kahn, 1962, for whole layers at once).
    Cost: O(n + m): 20 to 40 ns per edge in wide layers, 0.1 us per node along chains, up to 1 us per node in narrow
    layers.

    Args:
        graph: the graph.

    Returns:
        (n_nodes,) int32.

    Raises:
        CycleFound: the graph has a cycle; the error has its path.

    Example:
        >>> longest_path_layers(Adjacency.from_edges(3, [0, 1, 0], [1, 2, 2])).tolist()
        [0, 1, 2]
    """
    check_instance("graph", graph, Adjacency, "an Adjacency")
    layering = _Layering(graph)
    layering.run()
    if layering.n_done < graph.n_nodes:
        cycle = _cycle_among(graph, layering.waits > 0)
        path = [*map(str, cycle[:_SHOWN]), *(["..."] if len(cycle) > _SHOWN else []), str(cycle[0])]
        raise CycleFound(f"The graph has a cycle: {' -> '.join(path)}. Remove one of its edges.", cycle)
    return layering.layer


@public
def find_cycle(graph: Adjacency) -> list[int] | None:
    """Find a cycle: remove acyclic nodes by layering, then walk backwards from any node that is left. Cost: O(n + m).

    Args:
        graph: the graph.

    Returns:
        The nodes of a cycle in order, the first not repeated at the end (a node with an edge to itself is a cycle of
        length one); None if there is no cycle.

    Example:
        >>> find_cycle(Adjacency.from_edges(3, [0, 1], [1, 1]))
        [1]
    """
    check_instance("graph", graph, Adjacency, "an Adjacency")
    layering = _Layering(graph)
    layering.run()
    return None if layering.n_done == graph.n_nodes else _cycle_among(graph, layering.waits > 0)


@public
def critical_path(graph: Adjacency, weights: ArrayLike) -> tuple[list[int], float]:
    """Find the heaviest path, where a path weighs the sum of its nodes (J. E. Kelley, 1961). Cost: O(n + m).

    Args:
        graph: the graph.
        weights: (n_nodes,) float64, 0 or more.

    Returns:
        The nodes of the path in order, and its weight. An empty list and 0.0 for a graph without nodes.

    Raises:
        CycleFound: the graph has a cycle; the error has its path.
        ValueError: the weights have another length, are negative or NaN.

    Example:
        >>> critical_path(Adjacency.from_edges(3, [0, 0], [1, 2]), [1.0, 5.0, 2.0])
        ([0, 1], 6.0)
    """
    check_instance("graph", graph, Adjacency, "an Adjacency")
    remaining = longest_remaining(graph, weights)
    if not graph.n_nodes:
        return [], 0.0
    first = int(np.argmax(remaining))
    return _heaviest_from(graph, first, remaining), float(remaining[first])


def longest_remaining(graph: Adjacency, weights: ArrayLike) -> NDArray[np.float64]:
    """Compute each node's weight plus the heaviest path after it, last layer first. Cost: O(n log n + m).

    Args:
        graph: the graph.
        weights: (n_nodes,) float64, 0 or more.

    Returns:
        (n_nodes,) float64.

    Raises:
        CycleFound: the graph has a cycle; the error has its path.
        ValueError: the weights have another length, are negative or NaN.

    Example:
        >>> longest_remaining(Adjacency.from_edges(3, [0, 0], [1, 2]), [1.0, 5.0, 2.0]).tolist()
        [6.0, 5.0, 2.0]
    """
    remaining: NDArray[np.float64] = checked_by("weights", lambda: np.array(weights, np.float64), "numbers", weights)
    _check_weights(graph.n_nodes, remaining)
    layers = longest_path_layers(graph)
    order = sorted_beside(layers, np.arange(graph.n_nodes, dtype=graph.indptr.dtype))
    for start, end, is_wide in reversed(_stretches(graph, layers)):
        add_heaviest = _add_heaviest if is_wide else _add_heaviest_in_python
        add_heaviest(graph, order[start:end], remaining)
    return remaining


class _Layering:
    """State of `longest_path_layers`: the number of predecessors that each node still waits for."""

    def __init__(self, graph: Adjacency) -> None:
        self.graph = graph
        self._n_before = graph.in_degrees()
        self.waits = self._n_before.copy()
        self.layer = np.zeros(graph.n_nodes, np.int32)
        self.n_done = 0
        self._depth = 0
        # The dtype of `waits`: `subtract.at` is 20 times slower if it has to cast (numpy 2.4).
        self._one = self.waits.dtype.type(1)
        self._scratch = np.empty(graph.n_nodes, graph.indptr.dtype)

    def run(self) -> None:
        front: IndexArray = np.flatnonzero(self.waits == 0).astype(self.graph.indptr.dtype)
        while len(front):
            front = self._settle(front)
            if 0 < len(front) <= NARROW:
                front = self._walk(front.tolist())

    def _settle(self, front: IndexArray) -> IndexArray:
        """Assign one layer with numpy and return the next."""
        self.layer[front] = self._depth
        self._depth += 1
        self.n_done += len(front)
        after = self.graph.successors_of(front)
        np.subtract.at(self.waits, after, self._one)
        return distinct(after[self.waits.take(after) == 0], self._scratch)

    def _walk(self, front: list[int]) -> IndexArray:
        """Assign layers in Python until one is wide or has a hub, and return it. Calls would double the loop's time."""
        starts, ends = self.graph.indptr.data, self.graph.indptr[1:].data
        indices, waits, layer = self.graph.indices.data, self.waits.data, self.layer.data
        links, hubs, depth = self._links.data, self._hubs, self._depth
        while front and len(front) <= WIDE:
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
        """Assign layers along a chain of nodes, each with one successor that has one predecessor.

        The loop ends: no node outside of a ring leads into it, so layering never reaches one.

        Returns:
            The first node after the chain, as a layer, and its depth.
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
        """Each node's successor if it has only one, which has no other predecessor; else -1."""
        graph = self.graph
        links: IndexArray = np.full(graph.n_nodes, -1, graph.indptr.dtype)
        single = np.flatnonzero(graph.out_degrees() == 1)
        after = graph.indices.take(graph.indptr.take(single))
        alone = self._n_before.take(after) == 1
        links[single[alone]] = after[alone]
        return links

    @cached_property
    def _hubs(self) -> frozenset[int]:
        """The nodes with so many successors that numpy is faster."""
        return frozenset(np.flatnonzero(self.graph.out_degrees() > _HUB).tolist())


def _cycle_among(graph: Adjacency, left: NDArray[np.bool_]) -> list[int]:
    """Find a cycle among the nodes that layering left over: each of them has a predecessor among them."""
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
    """Cut the nodes, ordered by layer, into stretches: a wide layer, or consecutive narrow layers.

    Returns:
        Start, end, and whether it is wide, for each stretch.
    """
    n_nodes = np.bincount(layers)
    n_edges = np.bincount(layers, weights=graph.out_degrees())
    is_wide = (n_nodes > NARROW) | (n_edges > _HUB)
    begins = is_wide.copy()
    begins[:1] = True
    begins[1:] |= is_wide[:-1]
    starts = (np.cumsum(n_nodes) - n_nodes)[begins].tolist()
    return list(zip(starts, [*starts[1:], graph.n_nodes], is_wide[begins].tolist(), strict=False))


def _add_heaviest(graph: Adjacency, nodes: IndexArray, remaining: NDArray[np.float64]) -> None:
    """Add to each node of one layer the heaviest of its successors, with numpy."""
    lengths = graph.indptr.take(nodes + 1) - graph.indptr.take(nodes)
    nodes, lengths = nodes[lengths > 0], lengths[lengths > 0]
    if len(nodes):
        starts = np.cumsum(lengths) - lengths
        remaining[nodes] += np.maximum.reduceat(remaining.take(graph.successors_of(nodes)), starts)


def _add_heaviest_in_python(graph: Adjacency, nodes: IndexArray, remaining: NDArray[np.float64]) -> None:
    """Add to each node of several layers the heaviest of its successors, last node first."""
    starts, ends = graph.indptr.data, graph.indptr[1:].data
    indices, values = graph.indices.data, remaining.data
    for node in reversed(nodes.tolist()):
        start, end = starts[node], ends[node]
        if end - start == 1:
            values[node] += values[indices[start]]
        elif end > start:
            values[node] += max([values[after] for after in indices[start:end]])


def _heaviest_from(graph: Adjacency, node: int, remaining: NDArray[np.float64]) -> list[int]:
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


def _check_weights(n_nodes: int, weights: NDArray[np.float64]) -> None:
    if weights.shape != (n_nodes,):
        raise ValueError(f"weights must be {n_nodes} numbers, got shape {weights.shape}. Pass one per node.")
    bad = ~(weights >= 0)  # true for NaN as well
    if bool(bad.any()):
        node = int(np.argmax(bad))
        raise ValueError(f"weights[{node}] must be 0 or more, got {weights[node]}.")
