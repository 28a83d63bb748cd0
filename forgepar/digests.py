"""Digests of values by their content and of callables by what they do; the same in every process.

    value ──> its parts, each behind a mark of its kind, and what it refers to ──> nodes of a graph ──> 16 bytes

An object is taken apart as pickle would (``__reduce_ex__``), unless its class says by a method
``__forgepar_fingerprint__`` what stands for it. A callable is taken apart into what its bytecode does, defaults and the
values that it closes over. What a function of the user's own modules refers to by global names counts as well, and so
on through all that it calls; of a library only the names and its release. Comments, line numbers, docstrings,
annotations of functions, the names of local variables, of functions and of modules do not.

Where a module is used in ways that cannot be followed (``getattr(module, name)``, ``eval``, an import within a
function), all of it counts, and all of the user's that it imports. Not seen is a module that is found by a name made at
run time (``importlib.import_module(name)``, ``sys.modules[name]``).

It is content alone that counts: whether two equal parts are one object makes no difference. Cost: O(size).
"""

from __future__ import annotations

import copyreg
import enum
import marshal
import sys
import types
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from forgepar import digest_classes, digest_code, digest_data
from forgepar.digest_guests import taker_of
from forgepar.libraries import is_users, name_in_library
from forgepar.merkle import DIGEST_BYTES, Digest, Node, NoDigest, Walk, encoded, settle

ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes))
_MARSHAL_FORMAT = 0  # later ones tell whether a string is interned, and whether a value is shared
_SHORT = 16  # items of a sequence of atoms that is not worth a node of its own
_MOST_DEEP = 20_000  # pickle gives up far before
_KEPT = (types.FunctionType, types.CodeType, types.ModuleType, type, digest_code.Whole)  # what many tasks refer to
_TAKERS: dict[type, Callable[[Walk, Any], None]] = {**digest_classes.TAKERS, **digest_code.TAKERS, **digest_data.TAKERS}
_BASES = (*digest_data.BASES, *digest_code.BASES)


def digest_of(value: Any, *, is_vouched: bool = False) -> Digest:
    """Return the digest of a value or callable.

    Args:
        value: anything.
        is_vouched: leave out what cannot be compared; a version stands for it.

    Raises:
        NoDigest: something in it cannot be compared.

    Example:
        >>> digest_of({"a": [1, 2]}) == digest_of({"a": [1, 2]}), digest_of(1) == digest_of(1.0)
        (True, False)
    """
    return Digests().of(value, is_vouched=is_vouched)


def atoms_data(values: Sequence[Any]) -> bytes:
    """Return the bytes that stand for a list of values of the types in `ATOMS`: others for others, or other types."""
    return marshal.dumps(values, _MARSHAL_FORMAT)  # type: ignore[arg-type]


class Digests:
    """Finds digests, and keeps those of functions, classes and modules for the next time."""

    def __init__(self) -> None:
        self._nodes: dict[int, Node] = {}  # by id, twice, and one more for the vouched ones
        self._new: list[Node] = []
        self._todo: list[Node] = []
        self._node = Node(None, is_vouched=False, depth=0)

    def of(self, value: Any, *, is_vouched: bool = False) -> Digest:
        """Return the digest of a value or callable; see `digest_of`."""
        if type(value) in (tuple, list) and ATOMS.issuperset(map(type, value)):
            return Digest(blake2b(_atoms(value), digest_size=DIGEST_BYTES).digest(), False)  # as of its node
        self._node = Node(None, is_vouched=is_vouched, depth=0)
        root = self._at(value, is_vouched=is_vouched)
        try:
            while self._todo:
                self._node = self._todo.pop()
                self._take(self._node)
            settle(root)
        finally:
            self._forget()
        if root.digest is None:
            raise NoDigest(root.fault)
        return Digest(root.digest, root.asks_context)

    def _forget(self) -> None:
        """Keep what many tasks refer to, if it is done; anything else may change, and takes memory."""
        for node in self._new:
            is_done = node.digest is not None or node.fault is not None
            if not (is_done and issubclass(type(node.value), _KEPT)):
                del self._nodes[2 * id(node.value) + node.is_vouched]
        self._new, self._todo = [], []

    def _at(self, value: Any, *, is_vouched: bool) -> Node:
        """Return the node of an object."""
        key = 2 * id(value) + is_vouched
        node = self._nodes.get(key)
        if node is None:
            node = Node(value, is_vouched=is_vouched, depth=self._node.depth + 1)
            self._nodes[key] = node
            self._new.append(node)
            self._todo.append(node)
        return node

    # What is taken apart is told by these

    def put(self, mark: str, data: bytes | str = b"") -> None:
        """Add bytes."""
        self._node.parts.append(encoded(mark, data))

    def visit(self, value: Any, what: str = "", *, is_vouched: bool = False) -> None:
        """Add an object."""
        node, kind = self._node, type(value)
        if kind in ATOMS:
            node.parts.append(encoded("atom", marshal.dumps(value, _MARSHAL_FORMAT)))
        elif (kind is tuple or kind is list) and len(value) <= _SHORT and ATOMS.issuperset(map(type, value)):
            node.parts.append(_atoms(value))
        else:
            if what:
                node.names[len(node.parts)] = what
            node.parts.append(self._at(value, is_vouched=is_vouched or node.is_vouched))

    def disorder(self) -> None:
        """Leave the order of the parts out."""
        self._node.is_unordered = True

    def ask_context(self) -> None:
        """Take note that the context may be asked for."""
        self._node.asks_context = True

    def _take(self, node: Node) -> None:
        if node.depth > _MOST_DEEP:
            raise NoDigest(f"{_named(type(node.value))} is nested too deeply to be compared")
        try:
            self._take_apart(node.value)
            return
        except NoDigest as error:
            fault = str(error)
        except (Exception, SystemExit) as error:  # whatever a property or method of the user's raises
            fault = f"{_named(type(node.value))} cannot be compared ({_said(error)})"
        node.parts, node.names = [], {}
        if node.is_vouched:
            self.put("vouched", type(node.value).__name__)
        else:
            node.fault = fault

    def _take_apart(self, value: Any) -> None:
        kind = type(value)
        if (take := _TAKERS.get(kind)) is not None:
            if kind in (tuple, list) and ATOMS.issuperset(map(type, value)):
                self._node.parts.append(_atoms(value))
            else:
                take(self, value)
        elif issubclass(kind, type):
            digest_classes.take_class(self, value)
        elif (own := getattr(kind, "__forgepar_fingerprint__", None)) is not None:
            self.put("own")
            self.visit(kind)
            self.visit(own(value))
        elif issubclass(kind, enum.Enum):
            self.put("member", value.name or str(value.value))
            self.visit(kind)
        elif (take := taker_of(kind)) is not None:
            take(self, value)
        else:
            self._take_object(value)

    def _take_object(self, value: Any) -> None:
        """Take an object apart by what its class derives from, or as pickle does."""
        kind = type(value)
        take = next((take for base, take in _BASES if issubclass(kind, base)), None)
        if take is not None and (_is_plain(kind) or not is_users(kind.__module__)):
            self.visit(kind)
            take(self, value)
        elif issubclass(kind, np.ndarray) and kind.__reduce__ is np.ndarray.__reduce__:
            self.visit(kind)
            self.visit(vars(value))
            digest_data.take_array(self, value)
        else:
            self._take_reduced(value)

    def _take_reduced(self, value: Any) -> None:
        kind = type(value)
        registered = copyreg.dispatch_table.get(kind)
        reduced: Any = value.__reduce_ex__(4) if registered is None else registered(value)
        if isinstance(reduced, str):
            self._take_named(value, reduced)
            return
        maker, arguments, state, items, pairs, setter = (*reduced, None, None, None, None)[:6]
        self.put("object")
        for part in (maker, arguments, state, setter):
            self.visit(part)
        self.put("items")
        for part in items or ():
            self.visit(part)
        self.put("pairs")
        for pair in pairs or ():
            self.visit(tuple(pair))

    def _take_named(self, value: Any, name: str) -> None:
        """Count an object by its name, if that is where it is found."""
        module = _home_of(value, name)
        if module is None:
            raise NoDigest(f"{_named(type(value))} cannot be compared (no module has it under its name, {name!r})")
        if is_users(module):
            self.put("global", name)
            self.visit(digest_code.whole(module))  # which alone tells what it is
        else:
            self.put("global", name_in_library(module, name))
        self.visit(type(value))


def _atoms(values: Any) -> bytes:
    return encoded("atoms", marshal.dumps(values, _MARSHAL_FORMAT))


def _home_of(value: Any, name: str) -> str | None:
    """Return the module that has an object under a name: the one that it says, or a library's before the user's."""
    said = getattr(value, "__module__", None)
    candidates = [said] if isinstance(said, str) else list(sys.modules)
    homes = [module for module in candidates if _is_there(value, module, name)]
    return min(homes, key=lambda module: (is_users(module), len(module), module), default=None)


def _is_there(value: Any, module: str, name: str) -> bool:
    first, *rest = name.split(".")
    found = getattr(sys.modules.get(module), "__dict__", {}).get(first)  # past a __getattr__, which may import
    for part in rest:
        found = getattr(found, part, None)
    return found is value


def _is_plain(kind: type) -> bool:
    """Tell whether a class leaves it to `object` how it is taken apart."""
    return vars(object)["__reduce_ex__"] is getattr(kind, "__reduce_ex__", None)


def _named(kind: type) -> str:
    module = kind.__module__
    return f"a {kind.__qualname__}" if module == "builtins" else f"a {module}.{kind.__qualname__}"


def _said(error: BaseException) -> str:
    try:
        return str(error) or type(error).__name__
    except Exception:
        return type(error).__name__
