"""Digests of a graph of objects by content: equal subgraphs have equal digests, with shared objects and cycles.

    node ──> its own bytes, and the digests of the nodes it refers to ──> BLAKE2b ──> 16 bytes

A node is digested after the nodes that it refers to. The nodes of a strongly connected component are digested together,
by partition refinement: each step digests every node with the previous digests of its neighbours, until a step
distinguishes no more nodes than the one before. The digest of each node then includes those of all nodes of the
component, so the result does not depend on where the walk began. Cost: O(n + m); O(m) per step for a component.

BLAKE2: J.-P. Aumasson, S. Neves, Z. Wilcox-O'Hearn, C. Winnerlein (2013). Components: R. Tarjan (1972).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

DIGEST_BYTES = 16  # among 10^12 tasks, the probability that any two collide is 10^-15
_NONE_YET = bytes(DIGEST_BYTES)


class NoDigest(Exception):
    """An object has no digest, because it cannot be compared across processes; the message has the reason."""


class Digest(NamedTuple):
    """The digest of an object.

    Attributes:
        data: 16 bytes.
        asks_context: whether a function in it may use the `TaskContext`, and so the name and seed of its task.
    """

    data: bytes
    asks_context: bool


@dataclass(slots=True, eq=False)
class MerkleNode:
    """One object of a graph.

    A node is settled when its digest, or the fault that it has instead, is known.

    Attributes:
        value: the object; the reference keeps its id from being reused.
        is_vouched: whether to leave out what cannot be compared.
        depth: distance from the root of the walk.
        parts: its own bytes and the nodes that it refers to, in order.
        names: descriptions of parts, for messages, by position.
        is_unordered: whether the order of the parts after the first is ignored.
        asks_context: see `Digest`; after settling, also of all nodes that it refers to.
        digest: 16 bytes, after settling.
        fault: why it has no digest; None if it has one.
        number: position among the nodes that are being settled; -1: not visited yet.
        low: the lowest number that is reachable from it.
    """

    value: Any
    is_vouched: bool
    depth: int
    parts: list[bytes | MerkleNode] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    is_unordered: bool = False
    asks_context: bool = False
    digest: bytes | None = None
    fault: str | None = None
    number: int = -1
    low: int = -1


class Walk(Protocol):
    """Receives the parts of an object from its handler, which is a function ``digest_...(walk, object)``."""

    def put(self, mark: str, data: bytes | str = b"") -> None:
        """Add bytes, after a mark that names their kind."""

    def visit(self, value: Any, what: str = "", *, is_vouched: bool = False) -> None:
        """Add an object, whose handler is called later.

        Args:
            value: the object.
            what: description of the object, for messages.
            is_vouched: leave out what cannot be compared, in the object and in all that it refers to.
        """

    def ignore_order(self) -> None:
        """Ignore the order of the parts after the first."""

    def ask_context(self) -> None:
        """Mark that the object may use the `TaskContext`."""


def encoded(mark: str, data: bytes | str) -> bytes:
    """Return a mark, the length of the data, and the data: different arguments give different bytes."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return b"%s %d %s" % (mark.encode(), len(raw), raw)


def settle(root: MerkleNode) -> None:
    """Set the digest or the fault of a node and of all nodes that it refers to."""
    seen: list[MerkleNode] = []
    path = [_begun(root, seen)] if not _is_settled(root) else []
    while path:
        node, rest = path[-1]
        for child in rest:
            if _is_settled(child):
                continue
            if child.number < 0:
                path.append(_begun(child, seen))
                break
            node.low = min(node.low, child.low)
        else:
            path.pop()
            if path:
                path[-1][0].low = min(path[-1][0].low, node.low)
            if node.low == node.number:
                component = seen[node.number :]
                del seen[node.number :]
                _settle_component(component)


def _begun(node: MerkleNode, seen: list[MerkleNode]) -> tuple[MerkleNode, Iterator[MerkleNode]]:
    node.number = node.low = len(seen)
    seen.append(node)
    return node, _children(node)


def _children(node: MerkleNode) -> Iterator[MerkleNode]:
    return (part for part in node.parts if type(part) is MerkleNode)


def _is_settled(node: MerkleNode) -> bool:
    return node.digest is not None or (node.fault is not None and not node.parts)


def _settle_component(nodes: list[MerkleNode]) -> None:
    """Settle the nodes of a strongly connected component; all others that they refer to are settled."""
    asks_context = any(node.asks_context or any(child.asks_context for child in _children(node)) for node in nodes)
    fault = next((found for node in nodes if (found := _fault_of(node)) is not None), None)
    digests: dict[MerkleNode, bytes] = {}
    if fault is None:
        is_cycle = len(nodes) > 1 or nodes[0] in _children(nodes[0])
        digests = _refined(nodes) if is_cycle else {nodes[0]: _digest(nodes[0], {})}
    for node in nodes:
        node.asks_context, node.fault, node.digest = asks_context, fault, digests.get(node)
    for node in nodes:
        node.parts, node.names = [], {}


def _fault_of(node: MerkleNode) -> str | None:
    """Return why a node has no digest: its own fault, or that of a node that it refers to."""
    if node.fault is not None:
        return node.fault
    for place, part in enumerate(node.parts):
        if type(part) is MerkleNode and part.fault is not None:
            name = node.names.get(place)
            return f"{name}: {part.fault}" if name else part.fault
    return None


def _refined(nodes: list[MerkleNode]) -> dict[MerkleNode, bytes]:
    """Return the digests of nodes that refer to each other, by partition refinement."""
    digests = dict.fromkeys(nodes, _NONE_YET)
    n_kinds = 0
    while True:
        digests = {node: _digest(node, digests) for node in nodes}
        kinds = set(digests.values())
        if len(kinds) == n_kinds:
            break
        n_kinds = len(kinds)
    whole = b"".join(sorted(kinds))
    return {node: blake2b(digest + whole, digest_size=DIGEST_BYTES).digest() for node, digest in digests.items()}


def _digest(node: MerkleNode, of_component: dict[MerkleNode, bytes]) -> bytes:
    parts = [part if type(part) is bytes else b"> %b" % _known(part, of_component) for part in node.parts]
    if node.is_unordered:
        parts[1:] = sorted(parts[1:])
    return blake2b(b"".join(parts), digest_size=DIGEST_BYTES).digest()


def _known(node: Any, of_component: dict[MerkleNode, bytes]) -> bytes:
    found: bytes = of_component.get(node) or node.digest
    return found
