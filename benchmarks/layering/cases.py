"""Graphs to be layered, as edge arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Edges: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64]]

_SEED = 20


class Case(NamedTuple):
    """A graph.

    Attributes:
        name: what the table calls it.
        n_nodes: how many nodes.
        edges: makes sources and targets.
        target: the most that we may take, as a share of rustworkx's time; None where that is not judged.
    """

    name: str
    n_nodes: int
    edges: Callable[[], Edges]
    target: float | None


def cases(small: bool) -> list[Case]:
    """Return the graphs: a million nodes, a fifth of that for the chain; or 20,000 each, too few to be judged by."""
    n, n_chain, width = (20_000, 20_000, 200) if small else (1_000_000, 200_000, 1000)
    found = [
        Case("wide", n, lambda: wide(n, width, 4), 0.35),
        Case("random", n, lambda: random(n, 5 * n), 0.15),
        Case("deep", n_chain, lambda: chain(n_chain), 0.9),
    ]
    return [case._replace(target=None) for case in found] if small else found


def wide(n_nodes: int, width: int, n_parents: int) -> Edges:
    """Layers of one width; each node waits for random nodes of the layer before. Sources do not ascend."""
    targets = np.repeat(np.arange(width, n_nodes), n_parents)
    drawn = np.random.default_rng(_SEED).integers(0, width, len(targets))
    return (targets // width - 1) * width + drawn, targets


def random(n_nodes: int, n_edges: int) -> Edges:
    """Draw pairs of different nodes; each edge leads from the lower to the higher."""
    pairs = np.random.default_rng(_SEED).integers(0, n_nodes, (2, n_edges))
    pairs[1, pairs[0] == pairs[1]] += 1
    pairs %= n_nodes
    return pairs.min(axis=0), pairs.max(axis=0)


def chain(n_nodes: int) -> Edges:
    """Each node leads to the next."""
    return np.arange(n_nodes - 1), np.arange(1, n_nodes)
