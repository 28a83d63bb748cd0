"""The layout of a layered picture: few crossings, short and straight arrows.

It follows Sugiyama, Tagawa and Toda, "Methods for Visual Understanding of Hierarchical System Structures", IEEE
Transactions on Systems, Man, and Cybernetics 11 (2), 1981. An arrow that passes layers gets a bend in each of them.
Sweeps over the layers sort each layer by the mean place of the neighbours (barycentre). Then boxes move towards their
neighbours within the limits of their order and size. The layers, their first step, are those of the workflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

MOST_BENDS = 50_000  # bends of all arrows together; further arrows are drawn straight, even across boxes
_SWEEPS = 16  # most sweeps; down and up are one each
_PATIENCE = 4  # sweeps without improvement before the best order is used
_WORK = 2_000_000  # limit of segments times sweeps
_LAYERS_WORK = 8_000  # limit of layers times sweeps
_STRAIGHTER = 8.0  # weight of a segment between two bends relative to others


class Layout(NamedTuple):
    """Places of nodes: first the boxes, by number, then the bends.

    Attributes:
        layer: the layer of each node.
        centre: the centre of each node, across the direction of the layers.
        tails: the node where each segment begins.
        heads: the node where each segment ends: in the next layer, except for arrows that are drawn straight.
        dashed: whether a segment belongs to dependencies without a value.
    """

    layer: Ints
    centre: Floats
    tails: Ints
    heads: Ints
    dashed: NDArray[np.bool_]


def placed(layers: Ints, sources: Ints, targets: Ints, dashed: NDArray[np.bool_], sizes: Floats, gap: float) -> Layout:
    """Place boxes.

    Args:
        layers: (n,) the layer of each box, from 0.
        sources: (m,) the box where each arrow begins.
        targets: (m,) the box where each arrow ends, in a later layer.
        dashed: (m,) whether an arrow is dashed; dashed and solid arrows share no bends.
        sizes: (n,) extent of each box across the direction of the layers.
        gap: distance of two boxes.
    """
    layer, tails, heads, is_dashed = _routed(layers, sources, targets, dashed)
    nodes = np.argsort(layer, kind="stable")  # number the nodes so that a layer is a slice
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
    """Add a bend in each layer that an arrow passes. Arrows that leave the same box, or reach it, share bends."""
    n = len(layers)
    span = layers[targets] - layers[sources]
    far = np.flatnonzero(span > 1)
    ends = n * dashed[far]  # separates dashed and solid arrows
    leaving = np.bincount(sources[far] + ends, minlength=2 * n)[sources[far] + ends]
    reaching = np.bincount(targets[far] + ends, minlength=2 * n)[targets[far] + ends]
    from_source = leaving >= reaching
    # A trunk is the bends that arrows share: dashed or solid arrows, on one side of one box, the owner.
    owner = np.where(from_source, sources[far], targets[far])
    trunks, trunk_of = np.unique((owner * 2 + dashed[far]) * 2 + from_source, return_inverse=True)
    length = _trunk_lengths(len(trunks), trunk_of, span[far] - 1)
    start = n + np.cumsum(length) - length
    trunk_owner, leaves = trunks // 4, trunks % 2 == 1
    bend_trunk = np.repeat(np.arange(len(trunks)), length)
    depth = n + np.arange(len(bend_trunk)) - start[bend_trunk]  # distance from the owner: 0 is next to it
    sign = np.where(leaves[bend_trunk], 1, -1)
    bends = n + np.arange(len(bend_trunk))
    bend_layer = layers[trunk_owner[bend_trunk]] + sign * (depth + 1)
    inner = np.where(depth == 0, trunk_owner[bend_trunk], bends - 1)
    # The other end of an arrow is connected to the last bend before it.
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
    """Return the number of bends of each trunk: the layers that it passes, or none once there are too many in all."""
    length = np.zeros(n_trunks, np.int64)
    np.maximum.at(length, trunk_of, passed)
    by_length = np.argsort(length, kind="stable")
    length[by_length[np.cumsum(length[by_length]) > MOST_BENDS]] = 0
    return length


class _Grid:
    """Nodes numbered by layer, and the segments between neighbouring layers, indexed by both ends."""

    def __init__(self, layer: Ints, tails: Ints, heads: Ints) -> None:
        self.layer, self.tails, self.heads = layer, tails, heads
        self.n_layers = int(layer[-1]) + 1 if len(layer) else 0
        self.start = np.searchsorted(layer, np.arange(self.n_layers + 1)).tolist()
        self.up = self._by_end(heads, tails)
        self.down = self._by_end(tails, heads)

    def _by_end(self, mine: Ints, theirs: Ints) -> tuple[Ints, Ints, list[int]]:
        """Sort segments by one end: return that end, the other end, and where the segments of each layer begin."""
        by_layer = np.argsort(mine, kind="stable")
        starts = np.searchsorted(mine[by_layer], np.array(self.start)).tolist()
        return mine[by_layer], theirs[by_layer], starts

    def segments(self, layer: int, upwards: bool) -> tuple[Ints, Ints]:
        """Return the segments from a layer to the one before (upwards) or after it: index in the layer, other end."""
        mine, theirs, starts = self.up if upwards else self.down
        part = slice(starts[layer], starts[layer + 1])
        return mine[part] - self.start[layer], theirs[part]

    def sweep(self, upwards: bool) -> Iterator[int]:
        """Yield the layers so that each comes after the neighbour that it is placed by."""
        yield from range(1, self.n_layers) if upwards else range(self.n_layers - 2, -1, -1)


def _ordered(grid: _Grid) -> Ints:
    """Return the place of each node within its layer."""
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
    wanted = np.where(counts > 0, sums / np.maximum(counts, 1), before)  # a node without neighbours keeps its place
    order = np.lexsort((before, wanted))
    place[begin + order] = np.arange(end - begin)


def crossings(group: Ints, tail_place: Ints, head_place: Ints) -> int:
    """Count the pairs of segments that cross. Segments of a group connect the same two layers.

    With segments sorted by tail, a pair crosses if its heads are out of order. Such pairs are counted in all groups at
    once, by the bits of the heads' places, the highest bit first: the first bit in which a pair out of order differs is
    set in the earlier segment and not in the later one. Cost: O(m log m).
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
    """Return the centre of each node: as near to its neighbours as the order and the sizes allow."""
    order = np.lexsort((place, grid.layer))
    width = np.where(size[order] > 0, size[order] + gap, gap)
    offset = np.cumsum(width) - width / 2
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    offset = offset[rank]  # of each node from a common edge: only differences within a layer matter
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
    """Return the weight of each segment: higher between bends, so that long arrows are straight."""
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
    """Move the nodes of a layer towards their neighbours on the given sides."""
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
    weight[free] = 0.01  # a node without neighbours gives way
    row = order[begin:end]
    local = row - begin
    shift = offset[row]
    centre[row] = shift + _rising((wanted[local] - shift).tolist(), weight[local].tolist())


def _rising(values: Sequence[float], weights: Sequence[float]) -> Floats:
    """Return the nearest ascending numbers by weighted least squares (pool adjacent violators)."""
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
    """Return the offsets from the centre of a node at which its segments end, side by side and in order.

    Args:
        node: (m,) the node of each segment.
        other: (m,) the place of the other end.
        room: (m,) the usable length of the side of the node.
        step: distance of two segments, less if there is not enough room.
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
