"""Layers, cycles and heaviest paths against plain oracles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgepar import graph as graph_module
from forgepar.graph import (
    Adjacency,
    CycleFound,
    critical_path,
    find_cycle,
    longest_path_layers,
    longest_remaining,
)


@st.composite
def graphs(draw, acyclic=True):
    """A number of nodes and edges; acyclic ones are drawn forward and then relabelled."""
    n = draw(st.integers(0, 30))
    nodes = st.integers(0, max(n - 1, 0))
    edges = draw(st.lists(st.tuples(nodes, nodes), max_size=80)) if n else []
    if acyclic:
        labels = draw(st.permutations(range(n)))
        edges = [(labels[min(a, b)], labels[max(a, b)]) for a, b in edges if a != b]
    return n, edges


def build(n, edges):
    return Adjacency.from_edges(n, [a for a, _ in edges], [b for _, b in edges])


def oracle_layers(n, edges):
    """Relax every edge until nothing changes."""
    layers = [0] * n
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            if layers[b] < layers[a] + 1:
                layers[b] = layers[a] + 1
                changed = True
    return layers


def stacked(widths):
    """Edges of layers of these widths, each node waiting for two of the layer before."""
    starts = [0, *itertools.accumulate(widths)]
    edges = []
    for layer in range(1, len(widths)):
        for i in range(widths[layer]):
            edges += [(starts[layer - 1] + j % widths[layer - 1], starts[layer] + i) for j in (i, i + 1)]
    return starts[-1], edges


@given(graphs())
def test_layers_equal_the_oracle(drawn):
    n, edges = drawn
    assert longest_path_layers(build(n, edges)).tolist() == oracle_layers(n, edges)


@pytest.mark.parametrize("narrow", [0, 2, 1000])
@settings(max_examples=40)
@given(drawn=graphs())
def test_layers_are_the_same_whichever_way_they_are_walked(narrow, drawn):
    n, edges = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_module, "NARROW", narrow)
        patch.setattr(graph_module, "WIDE", 2 * narrow)
        assert longest_path_layers(build(n, edges)).tolist() == oracle_layers(n, edges)


@pytest.mark.parametrize(
    "widths",
    [[1] * 300, [500] * 3, [1, 500] * 5, [60, 70, 120, 40, 90, 30] * 4, [1] * 50 + [200] + [1] * 50, [300] + [1] * 100],
    ids=["chain", "wide", "alternating", "near the border", "bulge", "funnel"],
)
def test_layers_of_shapes_that_switch_between_wide_and_narrow(widths):
    n, edges = stacked(widths)
    expected = np.repeat(np.arange(len(widths)), widths)
    shuffled = np.random.default_rng(3).permutation(n)
    relabelled = [(int(shuffled[a]), int(shuffled[b])) for a, b in edges]
    np.testing.assert_array_equal(longest_path_layers(build(n, edges)), expected)
    np.testing.assert_array_equal(longest_path_layers(build(n, relabelled))[shuffled], expected)


def everything_between(widths):
    """Edges of layers of these widths, each node waiting for all of the layer before, so that there are hubs."""
    starts = [0, *itertools.accumulate(widths)]
    layers = [range(a, b) for a, b in itertools.pairwise(starts)]
    return starts[-1], [edge for two in itertools.pairwise(layers) for edge in itertools.product(*two)]


@pytest.mark.parametrize(
    "widths",
    [[1, 500] * 5, [1, 1, 1, 300, 2, 300, 1, 1], [300, 1, 300], [1, 1, 2] * 40, [1] * 40 + [2] + [1] * 31],
    ids=["hubs", "chain to a hub", "sink and hub", "short chains", "long chains"],
)
def test_shapes_of_hubs_and_chains(widths):
    n, edges = everything_between(widths)
    shuffled = np.random.default_rng(5).permutation(n)
    graph = build(n, [(int(shuffled[a]), int(shuffled[b])) for a, b in edges])
    depth = np.repeat(np.arange(len(widths)), widths)
    np.testing.assert_array_equal(longest_path_layers(graph)[shuffled], depth)
    np.testing.assert_array_equal(longest_remaining(graph, np.ones(n))[shuffled], len(widths) - depth)
    np.testing.assert_array_equal(graph.descendants(shuffled[:1])[shuffled], depth > 0)
    path, total = critical_path(graph, np.ones(n))
    assert total == len(path) == len(widths)
    assert all(b in graph.successors(a) for a, b in itertools.pairwise(path))


def test_heaviest_paths_through_a_hub():
    n, edges = everything_between([1, 400, 1])
    weights = np.ones(n)
    weights[123] = 7
    assert critical_path(build(n, edges), weights) == ([0, 123, 401], 9.0)


def test_chains_beside_each_other_and_joined():
    chain = list(itertools.pairwise(range(1000)))
    layers = longest_path_layers(build(1002, [*chain, (1000, 500), (999, 1001)]))
    assert layers[:1000].tolist() == list(range(1000))
    assert layers[[1000, 1001]].tolist() == [0, 1000]


@given(graphs(acyclic=False))
def test_a_cycle_is_found_exactly_where_there_is_one(drawn):
    n, edges = drawn
    cycle = find_cycle(build(n, edges))
    peeled, left = set(), set(range(n))
    while free := {b for b in left if not any(a in left for a, t in edges if t == b)}:
        peeled |= free
        left -= free
    assert (cycle is None) == (not left)
    if cycle is not None:
        assert len(set(cycle)) == len(cycle)
        for a, b in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            assert (a, b) in edges
        with pytest.raises(CycleFound, match="The graph has a cycle") as caught:
            longest_path_layers(build(n, edges))
        assert caught.value.cycle == cycle


def test_a_node_that_leads_to_itself():
    assert find_cycle(build(3, [(0, 1), (1, 1), (1, 2)])) == [1]


def test_a_ring_that_nothing_leads_into_stays_beside_a_chain():
    chain = list(itertools.pairwise(range(100)))
    graph = build(103, [*chain, (100, 101), (101, 102), (102, 100)])
    assert sorted(find_cycle(graph)) == [100, 101, 102]


def test_a_cycle_behind_a_chain_and_before_a_wide_layer():
    chain = list(itertools.pairwise(range(100)))
    graph = build(700, [*chain, (99, 50), *((99, node) for node in range(100, 700))])
    cycle = find_cycle(graph)
    assert sorted(cycle) == list(range(50, 100))
    assert cycle[(cycle.index(99) + 1) % len(cycle)] == 50


def test_a_long_cycle_is_cut_in_the_message_but_whole_in_the_error():
    ring = [(i, (i + 1) % 500) for i in range(500)]
    with pytest.raises(CycleFound, match=r"-> \.\.\. ->") as caught:
        longest_path_layers(build(500, ring))
    assert len(caught.value.cycle) == 500


@given(graphs())
def test_rows_degrees_and_matrix_agree(drawn):
    n, edges = drawn
    graph = build(n, edges)
    assert graph.n_edges == len(edges)
    dense = np.zeros((n, n), bool)
    for a, b in edges:
        dense[a, b] = True
    np.testing.assert_array_equal(graph.to_dense(), dense)
    np.testing.assert_array_equal(graph.reversed().to_dense(), dense.T)
    for node in range(n):
        assert sorted(graph.successors(node).tolist()) == sorted(b for a, b in edges if a == node)
    assert graph.out_degrees().tolist() == [sum(a == node for a, _ in edges) for node in range(n)]
    assert graph.in_degrees().tolist() == [sum(b == node for _, b in edges) for node in range(n)]


@pytest.mark.parametrize("narrow", [0, 48])
@given(drawn=graphs(acyclic=False), data=st.data())
def test_descendants_are_what_can_be_reached(narrow, drawn, data):
    n, edges = drawn
    roots = data.draw(st.lists(st.integers(0, n - 1), max_size=3)) if n else []
    reached, front = set(), set(roots)
    while front := {b for a, b in edges if a in front} - reached:
        reached |= front
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_module, "NARROW", narrow)
        patch.setattr(graph_module, "WIDE", 2 * narrow)
        assert np.flatnonzero(build(n, edges).descendants(roots)).tolist() == sorted(reached)


def test_descendants_of_nodes_that_are_not_there():
    graph = build(2, [(0, 1)])
    for bad in (-1, 2):
        with pytest.raises(ValueError, match=rf"nodes must be nodes from 0 to 1 \(n_nodes=2\), got {bad}\."):
            graph.descendants([bad])
    with pytest.raises(ValueError, match="nodes must be integers"):
        graph.descendants([0.5])


@pytest.mark.parametrize("narrow", [0, 48])
@given(drawn=graphs(), data=st.data())
def test_heaviest_paths_equal_the_oracle(narrow, drawn, data):
    n, edges = drawn
    weights = data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    expected = [0.0] * n
    for node in sorted(range(n), key=oracle_layers(n, edges).__getitem__, reverse=True):
        expected[node] = weights[node] + max((expected[b] for a, b in edges if a == node), default=0)
    graph = build(n, edges)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_module, "NARROW", narrow)
        assert longest_remaining(graph, weights).tolist() == expected
    path, total = critical_path(graph, weights)
    assert total == max(expected, default=0)
    assert total == sum(weights[node] for node in path)
    assert all(pair in edges for pair in itertools.pairwise(path))


@pytest.mark.parametrize(
    ("n", "sources", "targets", "said"),
    [
        (3, [0, 1], [1], r"must have one axis and equal lengths, got shapes \(2,\) and \(1,\)"),
        (3, [0], [3], r"targets must be nodes from 0 to 2 \(n_nodes=3\), got 3\."),
        (3, [-1], [0], r"sources must be .*, got -1\."),
        (3, [0.5], [1], "sources must be integers"),
        (3, [[0]], [[1]], "must have one axis and equal lengths"),
        (3, [0], np.array([2**63], np.uint64), r"targets must be .*, got 9223372036854775808\."),
        (0, [0], [0], "sources must be empty as the graph has no nodes"),
        (-1, [], [], "n_nodes must be an integer from 0 to .*, got -1"),
    ],
)
def test_edges_that_cannot_be(n, sources, targets, said):
    with pytest.raises(ValueError, match=said):
        Adjacency.from_edges(n, sources, targets)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0], "weights must be 2 numbers, got shape"),
        ([[1.0, 2.0]], "weights must be 2 numbers, got shape"),
        ([1.0, -2.0], r"weights\[1\] must be 0 or more, got -2.0\."),
        ([float("nan"), 1.0], r"weights\[0\] must be 0 or more, got nan\."),
    ],
)
def test_weights_that_cannot_be(weights, said):
    with pytest.raises(ValueError, match=said):
        longest_remaining(build(2, [(0, 1)]), weights)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.uint32, np.int64, np.uint64, ">i4"])
def test_edges_of_any_integers_give_the_same_graph(dtype):
    graph = Adjacency.from_edges(3, np.array([2, 0, 0], dtype), np.array([1, 2, 1], dtype))
    assert graph.indptr.tolist() == [0, 2, 2, 3]
    assert graph.indices.tolist() == [1, 2, 1]
    assert graph.indices.dtype == graph.indptr.dtype == np.int32


def test_rows_keep_duplicates_and_keep_the_order_of_edges_that_come_sorted():
    assert Adjacency.from_edges(3, [0, 0, 0], [2, 1, 2]).successors(0).tolist() == [2, 1, 2]
    assert Adjacency.from_edges(3, [1, 0, 0, 0], [2, 2, 1, 2]).successors(0).tolist() == [1, 2, 2]
    assert longest_path_layers(Adjacency.from_edges(2, [0, 0, 0], [1, 1, 1])).tolist() == [0, 1]


def test_a_graph_does_not_change_with_the_arrays_it_was_made_of():
    targets = np.array([1], np.int32)
    graph = Adjacency.from_edges(3, np.array([0], np.int32), targets)
    targets[0] = 2
    assert graph.successors(0).tolist() == [1]
    with pytest.raises(ValueError, match="read-only"):
        graph.successors(0)[0] = 2


@pytest.mark.parametrize(("n_nodes", "n_edges"), [(2**31, 0), (0, 2**31), (2**31 - 1, 5), (5, 2**31 - 1)])
def test_what_int32_cannot_count_is_int64(n_nodes, n_edges):
    assert graph_module._index_dtype(n_nodes, n_edges) is np.int64
    assert graph_module._index_dtype(min(n_nodes, 2**31 - 2), min(n_edges, 2**31 - 2)) is np.int32


@given(graphs())
def test_int64_graphs_and_keys_too_large_to_pack_give_the_same(drawn):
    n, edges = drawn
    expected = build(n, edges)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_module, "_index_dtype", lambda n_nodes, n_edges: np.int64)
        patch.setattr(graph_module, "_PACKABLE", 0)
        graph = build(n, edges)
    assert graph.indices.dtype == np.int64
    np.testing.assert_array_equal(graph.indices, expected.indices)
    np.testing.assert_array_equal(graph.indptr, expected.indptr)
    np.testing.assert_array_equal(longest_path_layers(graph), longest_path_layers(expected))
    np.testing.assert_array_equal(longest_remaining(graph, np.ones(n)), longest_remaining(expected, np.ones(n)))


def test_keys_above_32_bits_are_sorted_too():
    large = 2**40
    keys, values = np.array([large, 1, large, 0]), np.array([3, large, 2, 1])
    assert graph_module.sorted_beside(keys, values).tolist() == [1, large, 2, 3]


@pytest.mark.parametrize("n", [0, 1, 200])
def test_graphs_without_edges(n):
    graph = Adjacency.from_edges(n, [], [])
    assert graph.n_edges == 0
    assert longest_path_layers(graph).tolist() == [0] * n
    assert longest_path_layers(graph).dtype == np.int32
    assert find_cycle(graph) is None
    assert longest_remaining(graph, np.full(n, 2.0)).tolist() == [2.0] * n
    assert critical_path(graph, np.full(n, 2.0)) == (([0], 2.0) if n else ([], 0.0))
    assert graph.to_dense().shape == (n, n)
    assert graph.reversed().n_edges == 0
    assert graph.descendants([]).tolist() == [False] * n


def test_edges_may_be_any_integers_and_are_stored_small():
    graph = Adjacency.from_edges(3, np.array([2, 0], np.uint8), np.array([1, 2], np.int64))
    assert graph.indices.dtype == graph.indptr.dtype == np.int32
    assert longest_path_layers(graph).tolist() == [0, 2, 1]
