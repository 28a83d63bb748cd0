"""Where the boxes of a layered picture go: few crossings, short and straight arrows.

After Sugiyama, Tagawa and Toda, "Methods for Visual Understanding of Hierarchical System Structures", IEEE Transactions
on Systems, Man, and Cybernetics 11 (2), 1981: arrows that pass layers get a bend in each of them; sweeps over the
layers sort each by the mean place of its neighbours (barycentre); then boxes move towards their neighbours as far as
their order and size allow. The first step of theirs, the layers, is the workflow's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

MOST_BENDS = 50_000  # of all arrows together; arrows above that are drawn straight, whatever is in their way
_SWEEPS = 16  # at the most, down and up each counted once
_PATIENCE = 4  # sweeps without fewer crossings, after which the best order is taken
_WORK = 2_000_000  # segments times sweeps, above which there are fewer sweeps
_LAYERS_WORK = 8_000  # layers times sweeps, the same
_STRAIGHTER = 8.0  # how much more two bends pull at each other than boxes do


class Layout(NamedTuple):
    """Places of nodes: boxes first, by their numbers, then bends.

    Attributes:
        layer: of each node.
        centre: of each node, across the direction of the layers.
        tails: node where each segment begins.
        heads: node where it ends: in the next layer, but for arrows that are drawn straight.
        dashed: whether a segment belongs to arrows of order alone.
    """

    layer: Ints
    centre: Floats
    tails: Ints
    heads: Ints
    dashed: NDArray[np.bool_]


def placed(layers: Ints, sources: Ints, targets: Ints, dashed: NDArray[np.bool_], sizes: Floats, gap: float) -> Layout:
    """Lay boxes out.

    Args:
        layers: (n,) of each box, from 0.
        sources: (m,) boxes where arrows begin.
        targets: (m,) boxes where they end, in later layers.
        dashed: (m,) whether an arrow is one of order alone; arrows of the two sorts share no bends.
        sizes: (n,) extent of each box across the layers.
        gap: between two boxes.
    """
    layer, tails, heads, is_dashed = _routed(layers, sources, targets, dashed)
    nodes = np.argsort(layer, kind="stable")  # work on numbers by which a layer is a slice
    number = np.empty(len(nodes), np.int64)
    number[nodes] = np.arange(len(nodes))
    near = layer[heads] - layer[tails] == 1
    grid = _Grid(layer[nodes], number[tails[near]], number[heads[near]])
    place = _ordered(grid)
    size = np.zeros(len(nodes))
    size[number[: len(sizes)]] = sizes
    return Layout(layer, _centred(grid, place, size, gap)[number], tails, heads, is_dashed)


def _routed(
    layers: Ints, sources: Ints, targets: Ints, dashed: NDArray[np.bool_]
) -> tuple[Ints, Ints, Ints, NDArray[np.bool_]]:
    """Give arrows that pass layers a bend in each; those that leave one box, or reach one, share theirs."""
    n = len(layers)
    span = layers[targets] - layers[sources]
    far = np.flatnonzero(span > 1)
    ends = n * dashed[far]  # keeps the two sorts apart
    leaving = np.bincount(sources[far] + ends, minlength=2 * n)[sources[far] + ends]
    reaching = np.bincount(targets[far] + ends, minlength=2 * n)[targets[far] + ends]
    from_source = leaving >= reaching
    # A trunk is the bends that arrows share: all of one box, of one sort, on one side of it.
    owner = np.where(from_source, sources[far], targets[far])
    trunks, trunk_of = np.unique((owner * 2 + dashed[far]) * 2 + from_source, return_inverse=True)
    length = _trunk_lengths(len(trunks), trunk_of, span[far] - 1)
    start = n + np.cumsum(length) - length
    trunk_owner, leaves = trunks // 4, trunks % 2 == 1
    bend_trunk = np.repeat(np.arange(len(trunks)), length)
    depth = n + np.arange(len(bend_trunk)) - start[bend_trunk]  # from the owner on: 0 is next to it
    sign = np.where(leaves[bend_trunk], 1, -1)
    bends = n + np.arange(len(bend_trunk))
    bend_layer = layers[trunk_owner[bend_trunk]] + sign * (depth + 1)
    inner = np.where(depth == 0, trunk_owner[bend_trunk], bends - 1)
    # The arrow's other end hangs on the last bend before it.
    has_bends = length[trunk_of] > 0
    last = start[trunk_of] + span[far] - 2
    there = np.where(from_source, targets[far], sources[far])
    near_end = np.where(has_bends, last, owner)
    short = span == 1
    tails = [sources[short], np.where(sign > 0, inner, bends), np.where(from_source, near_end, there)]
    heads = [targets[short], np.where(sign > 0, bends, inner), np.where(from_source, there, near_end)]
    sorts = [dashed[short], trunks[bend_trunk] // 2 % 2 == 1, dashed[far]]
    return (
        np.concatenate([layers, bend_layer]),
        np.concatenate(tails),
        np.concatenate(heads),
        np.concatenate(sorts),
    )


def _trunk_lengths(n_trunks: int, trunk_of: Ints, passed: Ints) -> Ints:
    """Return how many bends each trunk has: as many as layers are passed, but none where that makes too many in all."""
    length = np.zeros(n_trunks, np.int64)
    np.maximum.at(length, trunk_of, passed)
    by_length = np.argsort(length, kind="stable")
    length[by_length[np.cumsum(length[by_length]) > MOST_BENDS]] = 0
    return length


class _Grid:
    """Nodes numbered layer by layer, and the segments between neighbouring layers, seen from both ends."""

    def __init__(self, layer: Ints, tails: Ints, heads: Ints) -> None:
        self.layer, self.tails, self.heads = layer, tails, heads
        self.n_layers = int(layer[-1]) + 1 if len(layer) else 0
        self.start = np.searchsorted(layer, np.arange(self.n_layers + 1)).tolist()
        self.up = self._seen_from(heads, tails)
        self.down = self._seen_from(tails, heads)

    def _seen_from(self, mine: Ints, theirs: Ints) -> tuple[Ints, Ints, list[int]]:
        """Return segments by the layer of one end: that end, the other, and where each layer's begin."""
        by_layer = np.argsort(mine, kind="stable")
        starts = np.searchsorted(mine[by_layer], np.array(self.start)).tolist()
        return mine[by_layer], theirs[by_layer], starts

    def segments(self, layer: int, upwards: bool) -> tuple[Ints, Ints]:
        """Return the segments from a layer to that before (upwards) or after it: place of a node in it, other end."""
        mine, theirs, starts = self.up if upwards else self.down
        part = slice(starts[layer], starts[layer + 1])
        return mine[part] - self.start[layer], theirs[part]

    def sweep(self, upwards: bool) -> Iterator[int]:
        """Yield the layers in the order in which each finds its neighbours settled."""
        yield from range(1, self.n_layers) if upwards else range(self.n_layers - 2, -1, -1)


def _ordered(grid: _Grid) -> Ints:
    """Return each node's place within its layer."""
    place = np.arange(len(grid.layer)) - np.array(grid.start)[grid.layer]
    best: Ints = place.copy()
    fewest, since = crossings(grid.layer[grid.tails], place[grid.tails], place[grid.heads]), 0
    for number in range(_n_sweeps(grid)):
        if fewest == 0 or since == _PATIENCE:
            break
        upwards = number % 2 == 0
        for layer in grid.sweep(upwards):
            _sort_layer(grid, layer, upwards, place)
        now = crossings(grid.layer[grid.tails], place[grid.tails], place[grid.heads])
        since += 1
        if now < fewest:
            best, fewest, since = place.copy(), now, 0
    return best


def _n_sweeps(grid: _Grid) -> int:
    most = min(_WORK // max(len(grid.tails), 1), _LAYERS_WORK // max(grid.n_layers, 1))
    return max(2, min(_SWEEPS, most))


def _sort_layer(grid: _Grid, layer: int, upwards: bool, place: Ints) -> None:
    begin, end = grid.start[layer], grid.start[layer + 1]
    if end - begin < 2:
        return
    mine, theirs = grid.segments(layer, upwards)
    counts = np.bincount(mine, minlength=end - begin)
    sums = np.bincount(mine, place[theirs], minlength=end - begin)
    before = place[begin:end].astype(np.float64)
    wanted = np.where(counts > 0, sums / np.maximum(counts, 1), before)  # who has no neighbour there stays
    order = np.lexsort((before, wanted))
    place[begin + order] = np.arange(end - begin)


def crossings(group: Ints, tail_place: Ints, head_place: Ints) -> int:
    """Count the pairs of segments that cross, where those of one group join the same two layers.

    Of segments sorted by their tails, those pairs cross whose heads are out of order. They are counted for all groups
    at once, a bit of the heads' places at a time, the highest first: a pair out of order differs first in the bit that
    the earlier one has and the later one lacks. Cost: O(m log m).
    """
    order = np.lexsort((head_place, tail_place, group))
    heads, group = head_place[order], group[order]
    found = 0
    for bit in range(int(heads.max(initial=0)).bit_length() - 1, -1, -1):
        has = (heads >> bit) & 1
        begins = np.flatnonzero(np.diff(group, prepend=-1))
        before = np.cumsum(has) - has
        within = before - np.repeat(before[begins], np.diff(begins, append=len(group)))
        found += int(within[has == 0].sum())
        group = group * 2 + has
        split = np.argsort(group, kind="stable")
        heads, group = heads[split], group[split]
        group = np.cumsum(np.diff(group, prepend=-1) != 0)
    return found


def _centred(grid: _Grid, place: Ints, size: Floats, gap: float) -> Floats:
    """Return each node's centre: as near to its neighbours' as the order and the sizes allow."""
    order = np.lexsort((place, grid.layer))
    width = np.where(size[order] > 0, size[order] + gap, gap)
    offset = np.cumsum(width) - width / 2
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    offset = offset[rank]  # of each node, from an edge that all have in common: only differences within a layer count
    middle = np.bincount(grid.layer, offset) / np.bincount(grid.layer)
    centre = offset - middle[grid.layer]
    is_bend = size == 0
    pull = {True: _pull(grid.up, is_bend), False: _pull(grid.down, is_bend)}
    rounds = max(2, min(6, _n_sweeps(grid) // 2))
    for number in range(2 * rounds):
        upwards = number % 2 == 0
        for layer in grid.sweep(upwards):
            _settle(grid, layer, (upwards,), pull, order, offset, centre)
    for upwards in (True, False):
        for layer in grid.sweep(upwards):
            _settle(grid, layer, (True, False), pull, order, offset, centre)
    return centre


def _pull(segments: tuple[Ints, Ints, list[int]], is_bend: NDArray[np.bool_]) -> Floats:
    """Return how strongly each segment pulls: long arrows are to be straight."""
    mine, theirs, _ = segments
    return np.where(is_bend[mine] & is_bend[theirs], _STRAIGHTER, 1.0)


def _settle(
    grid: _Grid,
    layer: int,
    sides: Sequence[bool],
    pull: dict[bool, Floats],
    order: Ints,
    offset: Floats,
    centre: Floats,
) -> None:
    """Move the nodes of a layer to where their neighbours on some sides pull them."""
    begin, end = grid.start[layer], grid.start[layer + 1]
    weight, sums = np.zeros(end - begin), np.zeros(end - begin)
    for upwards in sides:
        mine, theirs = grid.segments(layer, upwards)
        starts = (grid.up if upwards else grid.down)[2]
        strength = pull[upwards][starts[layer] : starts[layer + 1]]
        weight += np.bincount(mine, strength, minlength=end - begin)
        sums += np.bincount(mine, strength * centre[theirs], minlength=end - begin)
    free = weight == 0
    wanted = np.where(free, centre[begin:end], sums / np.where(free, 1.0, weight))
    weight[free] = 0.01  # it goes where there is room
    row = order[begin:end]
    local = row - begin
    shift = offset[row]
    centre[row] = shift + _rising((wanted[local] - shift).tolist(), weight[local].tolist())


def _rising(values: Sequence[float], weights: Sequence[float]) -> Floats:
    """Return the rising numbers that are nearest to the values, by weighted squares (pool adjacent violators)."""
    means: list[float] = []
    totals: list[float] = []
    counts: list[int] = []
    for value, total in zip(values, weights, strict=True):
        count = 1
        while means and means[-1] >= value:
            before = totals.pop()
            value = (means.pop() * before + value * total) / (before + total)
            total += before
            count += counts.pop()
        means.append(value)
        totals.append(total)
        counts.append(count)
    return np.repeat(np.array(means), counts)


def spread_ports(node: Ints, other: Floats, room: Floats, step: float) -> Floats:
    """Return how far off its centre each segment meets a node, so that several lie side by side, in order.

    Args:
        node: (m,) the node each segment meets.
        other: (m,) where its other end is.
        room: (m,) how much of the node's side may be used.
        step: from one to the next, where there is room for that.
    """
    order = np.lexsort((other, node))
    counts = np.bincount(node) if len(node) else np.zeros(1, np.int64)
    count = counts[node]
    begins = np.cumsum(counts) - counts
    rank = np.empty(len(node), np.float64)
    rank[order] = np.arange(len(node)) - begins[node[order]]
    steps = np.minimum(step, room / np.maximum(count - 1, 1))
    found: Any = (rank - (count - 1) / 2) * steps
    return np.asarray(found, np.float64)
