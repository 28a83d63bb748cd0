"""Digests of graphs: equal as far as one can go along their edges means equal, and nothing else does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from forgepar.store.fingerprint.merkle import MerkleNode, encoded, settle


def graph(labels, edges) -> list[MerkleNode]:
    """Nodes with a label and edges in order, none of them settled."""
    nodes = [MerkleNode(None, is_vouched=False, depth=0) for _ in labels]
    for node, label, others in zip(nodes, labels, edges, strict=True):
        node.parts = [encoded("label", str(label)), *(nodes[other] for other in others)]
    return nodes


def digests(labels, edges) -> list[bytes]:
    nodes = graph(labels, edges)
    for node in nodes:
        settle(node)
    return [node.digest for node in nodes]


def classes(labels, edges) -> list[int]:
    """Which nodes are alike, by refining until nothing changes: the plain, slow way."""
    found = list(labels)
    while True:
        keys = [(found[i], *(found[other] for other in edges[i])) for i in range(len(labels))]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        refined = [numbers[key] for key in keys]
        if len(set(refined)) == len(set(found)):
            return refined
        found = refined


@st.composite
def graphs(draw):
    n = draw(st.integers(1, 9))
    labels = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    edges = draw(st.lists(st.lists(st.integers(0, n - 1), max_size=3), min_size=n, max_size=n))
    return labels, edges


@given(graphs())
def test_equal_digests_are_of_nodes_that_are_alike(drawn):
    labels, edges = drawn
    found, alike = digests(labels, edges), classes(labels, edges)
    for i in range(len(labels)):
        for j in range(i):
            if found[i] == found[j]:
                assert alike[i] == alike[j]


@given(graphs())
def test_within_a_circle_nodes_that_are_alike_have_equal_digests(drawn):
    labels, edges = drawn
    n = len(labels)
    edges = [[*others, (i + 1) % n] for i, others in enumerate(edges)]  # all in one circle
    found, alike = digests(labels, edges), classes(labels, edges)
    assert len(set(found)) == len(set(alike))
    assert len(set(zip(found, alike, strict=True))) == len(set(found))


@given(graphs(), st.randoms())
def test_neither_order_nor_where_one_begins_makes_a_difference(drawn, random):
    labels, edges = drawn
    n = len(labels)
    order = list(range(n))
    random.shuffle(order)  # the new number of each
    old = sorted(range(n), key=order.__getitem__)
    moved = digests([labels[i] for i in old], [[order[other] for other in edges[i]] for i in old])
    assert [moved[order[i]] for i in range(n)] == digests(labels, edges)


@given(graphs(), st.data())
def test_a_changed_label_reaches_all_that_lead_to_it_and_no_other(drawn, data):
    labels, edges = drawn
    at = data.draw(st.integers(0, len(labels) - 1))
    before = digests(labels, edges)
    after = digests([9 if i == at else label for i, label in enumerate(labels)], edges)
    reach = {at}
    while more := {i for i in range(len(labels)) if i not in reach and reach.intersection(edges[i])}:
        reach |= more
    assert {i for i in range(len(labels)) if before[i] != after[i]} == reach


def test_circles_of_other_lengths_are_told_apart_where_their_labels_differ():
    rings = [digests([1] + [0] * (n - 1), [[(i + 1) % n] for i in range(n)])[0] for n in (2, 3, 4, 5)]
    assert len(set(rings)) == 4
    # With equal labels they are alike: each node leads to one of the same kind for ever.
    assert len({digests([0] * n, [[(i + 1) % n] for i in range(n)])[0] for n in (2, 3, 5)}) == 1


def test_long_chains_and_long_circles_end():
    n = 10_000
    assert len(set(digests([0] * n, [[i + 1] if i + 1 < n else [] for i in range(n)]))) == n
    assert len(set(digests([0] * n, [[(i + 1) % n] for i in range(n)]))) == 1


def test_a_fault_is_told_along_the_way_to_it():
    nodes = graph("abcd", [[1], [2], [], [1, 2]])
    nodes[2].fault, nodes[2].parts = "it is broken", []
    nodes[0].names, nodes[1].names = {1: "one"}, {1: "two"}
    for node in nodes:
        settle(node)
    a, b, c, d = (node.fault for node in nodes)
    assert (a, b, c, d) == ("one: two: it is broken", "two: it is broken", "it is broken", "two: it is broken")
    assert all(node.digest is None for node in nodes)


def test_a_fault_in_a_circle_is_all_of_its_fault():
    nodes = graph("abc", [[1], [0, 2], []])
    nodes[2].fault, nodes[2].parts = "it is broken", []
    settle(nodes[0])
    assert [node.fault for node in nodes] == ["it is broken"] * 3


def test_who_asks_for_the_context_is_known_to_all_that_lead_there():
    nodes = graph("abcde", [[1], [2, 0], [3], [], [3]])
    nodes[2].asks_context = True
    for node in nodes:
        settle(node)
    assert [node.asks_context for node in nodes] == [True, True, True, False, False]


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.binary(max_size=3)), max_size=5))
def test_what_is_put_can_be_told(pairs):
    raw = b"".join(encoded(mark, data) for mark, data in pairs)
    found = []
    while raw:
        mark, size, rest = raw.split(b" ", 2)
        found.append((mark.decode(), rest[: int(size)]))
        raw = rest[int(size) :]
    assert found == pairs
