"""rustworkx: graphs in Rust, by petgraph."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

name = "rustworkx"


def available() -> bool:
    return importlib.util.find_spec("rustworkx") is not None


def solve(n: int, sources: NDArray[Any], targets: NDArray[Any]) -> Iterable[Any]:
    """Build the graph and layer it: what is timed."""
    import rustworkx

    graph = rustworkx.PyDiGraph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from_no_data(list(zip(sources.tolist(), targets.tolist(), strict=True)))
    return rustworkx.topological_generations(graph)


def as_layers(n: int, solved: Iterable[Any]) -> NDArray[np.int32]:
    """Return the layer of each node, from what `solve` returned."""
    layer = np.full(n, -1, np.int32)
    for depth, nodes in enumerate(solved):
        layer[list(nodes)] = depth
    return layer


def layers(n: int, sources: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.int32]:
    """Return the layer of each node."""
    return as_layers(n, solve(n, sources, targets))
