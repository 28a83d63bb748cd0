"""Seconds from edge arrays to layers, beside rustworkx (or networkx, where that is all there is).

Both build their graph and layer it; ours and theirs take turns, and the ratio is that of the medians. Turning the
peer's lists of nodes into an array of layers, to compare the two, is not timed.

    python -m benchmarks.layering.run [--small] [--repeat 5]
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks import _common
from benchmarks._common import Row
from benchmarks.layering import system_forgepar, system_networkx, system_rustworkx
from benchmarks.layering.cases import Case, Edges, cases

TITLE = "Layering: seconds from edge arrays to layers"
_PEERS = (system_rustworkx, system_networkx)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    return _common.main(TITLE, rows, argv)


def rows(small: bool, repeat: int) -> list[Row]:
    """Measure all graphs.

    Raises:
        AssertionError: the layers are not those of the peer.
    """
    peer = next((system for system in _PEERS if system.available()), None)
    return [measure(case, peer, repeat) for case in cases(small)]


def measure(case: Case, peer: ModuleType | None, repeat: int) -> Row:
    """Measure one graph, and compare the layers before that; the first run of each is not counted."""
    edges = case.edges()
    systems = [system_forgepar, *([peer] if peer else [])]
    found = [system.layers(case.n_nodes, *edges) for system in systems]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    seconds: dict[str, list[float]] = {system.name: [] for system in systems}
    for _ in range(repeat):
        for system in systems:
            seconds[system.name].append(timed(system, case, edges))
    depth = int(found[0].max()) + 1
    row: Row = {"case": case.name, "nodes": case.n_nodes, "edges": len(edges[0]), "layers": depth}
    row |= {f"{name} s": statistics.median(samples) for name, samples in seconds.items()}
    return judged(row, case, peer)


def timed(system: Any, case: Case, edges: Edges) -> float:
    gc.collect()
    start = time.perf_counter()
    solved = system.solve(case.n_nodes, *edges)
    seconds = time.perf_counter() - start
    del solved  # outside of what is timed: freeing a million lists takes a while
    return seconds


def judged(row: Row, case: Case, peer: ModuleType | None) -> Row:
    """Add the ratio; the target is a share of rustworkx's time and of no other's."""
    if peer is None:
        return {**row, "note": "rustworkx is not installed"}
    row["ratio"] = row["forgepar s"] / row[f"{peer.name} s"]
    if peer is not system_rustworkx:
        return {**row, "note": "rustworkx is not installed"}
    return row if case.target is None else _common.target(row, "ratio", case.target)


if __name__ == "__main__":
    raise SystemExit(main())
