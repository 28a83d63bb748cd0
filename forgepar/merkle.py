"""Digests of a graph by content: equal parts give equal digests, whatever they share and wherever they go in circles.

    node ──> its own bytes, and the digests of the nodes it refers to ──> BLAKE2b ──> 16 bytes

A node comes after those that it refers to. Those of a circle come together: each is told from the others by its bytes,
then by those of its neighbours, then of theirs, until another step tells no two more apart (partition refinement); what
all of them became then is part of the digest of each. Where a walk began thus makes no difference. Cost: O(n + m), and
for a circle O(m) times its steps.

BLAKE2: J.-P. Aumasson, S. Neves, Z. Wilcox-O'Hearn, C. Winnerlein (2013). Circles: R. Tarjan (1972).
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

DIGEST_BYTES = 16  # two of 10^12 tasks have the same one with a probability of 10^-15
_NONE_YET = bytes(DIGEST_BYTES)


class NoDigest(Exception):
    """Something cannot be compared with what it was in another process; the message says what, and why."""


class Digest(NamedTuple):
    """What came out.

    Attributes:
        data: 16 bytes.
        asks_context: whether a function in it may ask for the task that it runs in, and so for its name and seed.
    """

    data: bytes
    asks_context: bool


class Node:
    """One object of a graph, with what makes it what it is.

    Attributes:
        value: the object, held so that no other gets its id.
        is_vouched: whether what cannot be compared is left out.
        depth: how far it is from where the walk began.
        parts: its own bytes and the nodes that it refers to, in order.
        names: what some of the parts are to it, by their place.
        is_unordered: whether the order of the parts behind the first does not count.
        asks_context: see `Digest`; once it is settled, of all that it refers to.
        digest: 16 bytes, once it is settled.
        fault: why it has none; None: it has.
        number: its place among those that are being settled; -1: not yet.
        low: the lowest number that can be reached from it.
    """

    __slots__ = (
        "asks_context",
        "depth",
        "digest",
        "fault",
        "is_unordered",
        "is_vouched",
        "low",
        "names",
        "number",
        "parts",
        "value",
    )

    def __init__(self, value: Any, *, is_vouched: bool, depth: int) -> None:
        self.value = value
        self.is_vouched = is_vouched
        self.depth = depth
        self.parts: list[bytes | Node] = []
        self.names: dict[int, str] = {}
        self.is_unordered = False
        self.asks_context = False
        self.digest: bytes | None = None
        self.fault: str | None = None
        self.number = self.low = -1


class Walk(Protocol):
    """Takes objects apart: what is put and visited belongs to the object that is being taken apart."""

    def put(self, mark: str, data: bytes | str = b"") -> None:
        """Add bytes, behind a mark of their kind."""

    def visit(self, value: Any, what: str = "", *, is_vouched: bool = False) -> None:
        """Add an object, to be taken apart later.

        Args:
            value: the object.
            what: what it is to this one, for messages.
            is_vouched: leave out what cannot be compared in it; so in all that is visited from there.
        """

    def disorder(self) -> None:
        """Say that the order of what follows the first part does not count."""

    def ask_context(self) -> None:
        """Say that this may ask for the task that it runs in."""


def encoded(mark: str, data: bytes | str) -> bytes:
    """Return bytes behind a mark of their kind, from which both can be told."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return b"%s %d %s" % (mark.encode(), len(raw), raw)


def settle(root: Node) -> None:
    """Find the digest, or the fault, of a node and of all that it refers to."""
    seen: list[Node] = []
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
                ring = seen[node.number :]
                del seen[node.number :]
                _settle_together(ring)


def _begun(node: Node, seen: list[Node]) -> tuple[Node, Iterator[Node]]:
    node.number = node.low = len(seen)
    seen.append(node)
    return node, _children(node)


def _children(node: Node) -> Iterator[Node]:
    return (part for part in node.parts if type(part) is Node)


def _is_settled(node: Node) -> bool:
    return node.digest is not None or (node.fault is not None and not node.parts)


def _settle_together(ring: list[Node]) -> None:
    """Settle the nodes of a circle, or one that is in none; what else they refer to is settled."""
    asks_context = any(node.asks_context or any(child.asks_context for child in _children(node)) for node in ring)
    fault = next((found for node in ring if (found := _fault_of(node)) is not None), None)
    digests: dict[Node, bytes] = {}
    if fault is None:
        is_circle = len(ring) > 1 or ring[0] in _children(ring[0])
        digests = _refined(ring) if is_circle else {ring[0]: _digest(ring[0], {})}
    for node in ring:
        node.asks_context, node.fault, node.digest = asks_context, fault, digests.get(node)
    for node in ring:
        node.parts, node.names = [], {}


def _fault_of(node: Node) -> str | None:
    """Return why a node has no digest, by itself or by what it refers to."""
    if node.fault is not None:
        return node.fault
    for place, part in enumerate(node.parts):
        if type(part) is Node and part.fault is not None:
            name = node.names.get(place)
            return f"{name}: {part.fault}" if name else part.fault
    return None


def _refined(ring: list[Node]) -> dict[Node, bytes]:
    """Tell the nodes of a circle apart, as far as what they are and refer to tells them apart."""
    digests = dict.fromkeys(ring, _NONE_YET)
    n_kinds = 0
    while True:
        digests = {node: _digest(node, digests) for node in ring}
        kinds = set(digests.values())
        if len(kinds) == n_kinds:
            break
        n_kinds = len(kinds)
    whole = b"".join(sorted(kinds))
    return {node: blake2b(digest + whole, digest_size=DIGEST_BYTES).digest() for node, digest in digests.items()}


def _digest(node: Node, of_ring: dict[Node, bytes]) -> bytes:
    parts = [part if type(part) is bytes else b"> %b" % _known(part, of_ring) for part in node.parts]
    if node.is_unordered:
        parts[1:] = sorted(parts[1:])
    return blake2b(b"".join(parts), digest_size=DIGEST_BYTES).digest()


def _known(node: Any, of_ring: dict[Node, bytes]) -> bytes:
    found: bytes = of_ring.get(node) or node.digest
    return found
