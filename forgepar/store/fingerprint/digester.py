"""Digests of values by content, and of callables by behaviour; they are the same in every process.

    value ──> handler of its type ──> bytes and other objects ──> nodes of a graph ──> 16 bytes

Objects:
    The parts are those that pickle would write (``__reduce_ex__``), unless the class has a method
    ``__forgepar_fingerprint__``, which returns a value to digest instead. Only content counts: whether two equal parts
    are one object makes no difference.

Callables:
    The digest covers the bytecode, the defaults, the closure, and the globals that a function of the user's modules
    refers to, recursively. It covers of a library only the names and the release. It does not cover comments, line
    numbers, docstrings, annotations of functions, and names of local variables, functions and modules.

Modules:
    If code uses a module in a way that cannot be analysed (``getattr(module, name)``, ``eval``, an import within a
    function), the digest covers the whole module and the user's modules that it imports. A module that is looked up by
    a computed name (``importlib.import_module(name)``, ``sys.modules[name]``) is not detected.

Cost: O(size).
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

from forgepar.store.fingerprint import classes as class_handlers
from forgepar.store.fingerprint import code as code_handlers
from forgepar.store.fingerprint import data as data_handlers
from forgepar.store.fingerprint.merkle import DIGEST_BYTES, Digest, MerkleNode, NoDigest, Walk, encoded, settle
from forgepar.store.fingerprint.names import name_in_library
from forgepar.store.fingerprint.third_party import handler_of
from forgepar.values.modules import is_users

ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes))
_MARSHAL_FORMAT = 0  # later formats depend on whether strings are interned and values are shared
_SHORT = 16  # items of the longest sequence of atoms that gets no node
_MOST_DEEP = 20_000  # pickle fails at a far smaller depth
_KEPT = (types.FunctionType, types.CodeType, types.ModuleType, type, code_handlers.Whole)  # many tasks refer to these
_HANDLERS: dict[type, Callable[[Walk, Any], None]] = {
    **class_handlers.HANDLERS,
    **code_handlers.HANDLERS,
    **data_handlers.HANDLERS,
}
_BASES = (*data_handlers.BASES, *code_handlers.BASES)


def digest_of(value: Any, *, is_vouched: bool = False) -> Digest:
    """Return the digest of a value or callable.

    Args:
        value: any object.
        is_vouched: leave out what cannot be compared, because a declared version represents it.

    Raises:
        NoDigest: a part of the value cannot be compared.

    Example:
        >>> digest_of({"a": [1, 2]}) == digest_of({"a": [1, 2]}), digest_of(1) == digest_of(1.0)
        (True, False)
    """
    return Digests().of(value, is_vouched=is_vouched)


def atoms_data(values: Sequence[Any]) -> bytes:
    """Return bytes for a list of values of the types in `ATOMS`; different values or types give different bytes."""
    return marshal.dumps(values, _MARSHAL_FORMAT)  # type: ignore[arg-type]


class Digests:
    """Computes digests, and caches those of functions, classes and modules."""

    def __init__(self) -> None:
        self._nodes: dict[int, MerkleNode] = {}  # by 2 * id, plus 1 if vouched
        self._new: list[MerkleNode] = []
        self._todo: list[MerkleNode] = []
        self._node = MerkleNode(None, is_vouched=False, depth=0)

    def of(self, value: Any, *, is_vouched: bool = False) -> Digest:
        """Return the digest of a value or callable; see `digest_of`."""
        if type(value) in (tuple, list) and ATOMS.issuperset(map(type, value)):
            return Digest(blake2b(_atoms(value), digest_size=DIGEST_BYTES).digest(), False)  # equals that of a node
        self._node = MerkleNode(None, is_vouched=is_vouched, depth=0)
        root = self._at(value, is_vouched=is_vouched)
        try:
            while self._todo:
                self._node = self._todo.pop()
                self._digest(self._node)
            settle(root)
        finally:
            self._forget()
        if root.digest is None:
            raise NoDigest(root.fault)
        return Digest(root.digest, root.asks_context)

    def _forget(self) -> None:
        """Drop all new nodes except settled ones of the `_KEPT` types; other objects may change, and take memory."""
        for node in self._new:
            is_done = node.digest is not None or node.fault is not None
            if not (is_done and issubclass(type(node.value), _KEPT)):
                del self._nodes[2 * id(node.value) + node.is_vouched]
        self._new, self._todo = [], []

    def _at(self, value: Any, *, is_vouched: bool) -> MerkleNode:
        """Return the node of an object."""
        key = 2 * id(value) + is_vouched
        node = self._nodes.get(key)
        if node is None:
            node = MerkleNode(value, is_vouched=is_vouched, depth=self._node.depth + 1)
            self._nodes[key] = node
            self._new.append(node)
            self._todo.append(node)
        return node

    # The methods of a `Walk`

    def put(self, mark: str, data: bytes | str = b"") -> None:
        """Add bytes, after a mark that names their kind."""
        self._node.parts.append(encoded(mark, data))

    def visit(self, value: Any, what: str = "", *, is_vouched: bool = False) -> None:
        """Add an object, whose handler is called later."""
        node, kind = self._node, type(value)
        if kind in ATOMS:
            node.parts.append(encoded("atom", marshal.dumps(value, _MARSHAL_FORMAT)))
        elif (kind is tuple or kind is list) and len(value) <= _SHORT and ATOMS.issuperset(map(type, value)):
            node.parts.append(_atoms(value))
        else:
            if what:
                node.names[len(node.parts)] = what
            node.parts.append(self._at(value, is_vouched=is_vouched or node.is_vouched))

    def ignore_order(self) -> None:
        """Ignore the order of the parts after the first."""
        self._node.is_unordered = True

    def ask_context(self) -> None:
        """Mark that the object may use the `TaskContext`."""
        self._node.asks_context = True

    def _digest(self, node: MerkleNode) -> None:
        if node.depth > _MOST_DEEP:
            raise NoDigest(f"{_named(type(node.value))} is nested too deeply to be compared")
        try:
            self._visit_parts(node.value)
            return
        except NoDigest as error:
            fault = str(error)
        except (Exception, SystemExit) as error:  # raised by a property or method of the user's class
            fault = f"{_named(type(node.value))} cannot be compared ({_text_of(error)})"
        node.parts, node.names = [], {}
        if node.is_vouched:
            self.put("vouched", type(node.value).__name__)  # so names of classes here, as `Whole`, must not change
        else:
            node.fault = fault

    def _visit_parts(self, value: Any) -> None:
        kind = type(value)
        if (handler := _HANDLERS.get(kind)) is not None:
            if kind in (tuple, list) and ATOMS.issuperset(map(type, value)):
                self._node.parts.append(_atoms(value))
            else:
                handler(self, value)
        elif issubclass(kind, type):
            class_handlers.digest_class(self, value)
        elif (own := getattr(kind, "__forgepar_fingerprint__", None)) is not None:
            self.put("own")
            self.visit(kind)
            self.visit(own(value))
        elif issubclass(kind, enum.Enum):
            self.put("member", value.name or str(value.value))
            self.visit(kind)
        elif (handler := handler_of(kind)) is not None:
            handler(self, value)
        else:
            self._digest_object(value)

    def _digest_object(self, value: Any) -> None:
        """Digest an object with the handler of a base class, or by the parts that pickle would write."""
        kind = type(value)
        handler = next((handler for base, handler in _BASES if issubclass(kind, base)), None)
        if handler is not None and (_is_plain(kind) or not is_users(kind.__module__)):
            self.visit(kind)
            handler(self, value)
        elif issubclass(kind, np.ndarray) and kind.__reduce__ is np.ndarray.__reduce__:
            self.visit(kind)
            self.visit(vars(value))
            data_handlers.digest_array(self, value)
        else:
            self._digest_reduced(value)

    def _digest_reduced(self, value: Any) -> None:
        kind = type(value)
        registered = copyreg.dispatch_table.get(kind)
        reduced: Any = value.__reduce_ex__(4) if registered is None else registered(value)
        if isinstance(reduced, str):
            self._digest_named(value, reduced)
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

    def _digest_named(self, value: Any, name: str) -> None:
        """Digest an object by its global name, if a module has it under that name."""
        module = _home_of(value, name)
        if module is None:
            raise NoDigest(f"{_named(type(value))} cannot be compared (no module has it under the name {name!r})")
        if is_users(module):
            self.put("global", name)
            self.visit(code_handlers.whole(module))  # the name alone does not identify the object
        else:
            self.put("global", name_in_library(module, name))
        self.visit(type(value))


def _atoms(values: Any) -> bytes:
    return encoded("atoms", marshal.dumps(values, _MARSHAL_FORMAT))


def _home_of(value: Any, name: str) -> str | None:
    """Return the module that has an object under a name: its ``__module__``, or else a library's before a user's."""
    own = getattr(value, "__module__", None)
    candidates = [own] if isinstance(own, str) else list(sys.modules)
    homes = [module for module in candidates if _is_there(value, module, name)]
    return min(homes, key=lambda module: (is_users(module), len(module), module), default=None)


def _is_there(value: Any, module: str, name: str) -> bool:
    first, *rest = name.split(".")
    found = getattr(sys.modules.get(module), "__dict__", {}).get(first)  # avoids a __getattr__, which may import
    for part in rest:
        found = getattr(found, part, None)
    return found is value


def _is_plain(kind: type) -> bool:
    """Return whether a class inherits ``__reduce_ex__`` from `object`."""
    return vars(object)["__reduce_ex__"] is getattr(kind, "__reduce_ex__", None)


def _named(kind: type) -> str:
    module = kind.__module__
    return f"a {kind.__qualname__}" if module == "builtins" else f"a {module}.{kind.__qualname__}"


def _text_of(error: BaseException) -> str:
    try:
        return str(error) or type(error).__name__
    except Exception:
        return type(error).__name__
