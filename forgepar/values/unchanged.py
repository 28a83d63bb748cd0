"""Checks whether a name of a module still has the same value, in the caller and in workers.

Code is compared by identity and data by a digest of its pickle, both to the depth to which a function or class is
pickled by value: methods, properties, caches, closures, defaults and nested classes. A wrong "no" costs little, as all
is then compared.
"""

from __future__ import annotations

import abc
import functools
import itertools
import operator
import pickle
import sys
import types
from abc import _get_dump  # type: ignore[attr-defined]  # there is no public access to registered classes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from forgepar.values.comparison import ATOMS, CACHED, MISSING, own_globals_of, repeated_in, same

_MEMBERS = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")
_VALUES = operator.methodcaller("values")
_CONTENTS = operator.attrgetter("cell_contents")
_WRAPPERS = (
    *(classmethod, staticmethod, property),
    *(functools.cached_property, functools.partialmethod, functools.singledispatchmethod),
)
_OPAQUE = (  # immutable, or compared by identity alone
    *ATOMS,
    types.ModuleType,
    types.BuiltinFunctionType,
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
)


def check_of(
    names: Mapping[str, Any],
    name: str,
    value: Any,
    *,
    looks_into: bool = True,
    without: Sequence[Any] = (),
    within: Iterable[types.FunctionType] = (),
    by_fields: bool = False,
) -> Callable[[], bool]:
    """Return a function that returns whether a namespace still has a value under a name, unchanged.

    Args:
        names: the namespace of a module.
        name: a name in it.
        value: its value now.
        looks_into: whether to detect data that was changed in place, which takes 1 ms per MiB at each call.
        without: objects within the value that are compared by identity alone.
        within: functions within data; the digest of data has only their names.
        by_fields: whether to look at each of `fields_of` a value that cannot be pickled as a whole.
    """
    get = names.get
    where = _home_of(value)
    if type(value) is types.FunctionType and not (value.__closure__ or value.__dict__) and where is not None:
        fn: Any = value
        code, (find, own_name, is_home) = fn.__code__, where
        if not fn.__defaults__ and not fn.__kwdefaults__:  # 0.2 us
            return lambda: (
                fn.__code__ is code
                and not fn.__defaults__
                and not fn.__kwdefaults__
                and not fn.__dict__
                and (find(own_name) is fn) is is_home
                and get(name) is fn
            )
    if type(value) in ATOMS:
        return lambda: (now := get(name, MISSING)) is value or same(now, value)
    detector = _ChangeDetector(value, without, within, by_fields=by_fields)
    identities = detector.identities()
    content = detector.content() if looks_into else None

    def check() -> bool:
        if get(name, MISSING) is not value or _home_of(value) != where:
            return False
        now = detector.identities()
        if len(now) != len(identities) or not all(map(operator.is_, now, identities)):
            return False
        return content is None or content == detector.content()

    return check


def functions_in(value: Any) -> list[types.FunctionType]:
    """Return a function, or those of a class, with all functions that are pickled with it; none for data."""
    return _ChangeDetector(value).functions


def fields_of(value: Any) -> dict[Any, Any]:
    """Return the items of a dict, or the attributes of an instance."""
    return value if type(value) is dict else vars(value)


class _ChangeDetector:
    """Collects the parts of a value that show whether it has changed.

    Attributes:
        functions: the functions among them.
    """

    def __init__(
        self,
        value: Any,
        without: Sequence[Any] = (),
        within: Iterable[types.FunctionType] = (),
        *,
        by_fields: bool = False,
    ) -> None:
        self._root = value
        self._seen = {id(part): part for part in without}
        self.functions: list[types.FunctionType] = []
        self._dicts: list[Mapping[Any, Any]] = []
        self._cells: list[types.CellType] = []
        self._repeated: list[tuple[Mapping[str, Any], str]] = []
        self._members: list[Any] = []  # of enumerations
        self._abstract: list[type] = []
        self._data: list[Any] = []
        if by_fields:
            fields = fields_of(value)
            self._dicts.append(fields)
            for part in list(fields.values()):
                self._add(part)
        else:
            self._add(value)
        for fn in within:
            self._add(fn)

    def identities(self) -> tuple[Any, ...]:
        """Return the objects that are compared by identity."""
        return (
            *itertools.chain.from_iterable(self._dicts),
            *itertools.chain.from_iterable(map(_VALUES, self._dicts)),
            *itertools.chain.from_iterable(map(_MEMBERS, self.functions)),
            *map(_CONTENTS, self._cells),
            *(names.get(name) for names, name in self._repeated),
            *itertools.chain.from_iterable(map(_VALUES, map(vars, self._members))),
            *itertools.chain.from_iterable(map(registered_with, self._abstract)),
        )

    def content(self) -> object:
        """Return the digest of the data, None if there is none."""
        if not self._data:
            return None
        try:
            return large_digest(self._data)
        except Exception:
            return object()  # unequal to any other, so the value counts as changed

    def _add(self, value: Any) -> None:
        if isinstance(value, _OPAQUE) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if type(value) is types.FunctionType:
            self._add_function(value)
        elif isinstance(value, type):
            self._add_class(value)
        elif _is_descriptor(value):
            if isinstance(value, functools.singledispatchmethod):
                self._dicts.append(value.dispatcher.registry)
            for part in _parts_of(value):
                self._add(part)
        elif not (type(value) in (tuple, frozenset) and ATOMS.issuperset(map(type, value))):
            self._data.append(value)

    def _add_function(self, fn: types.FunctionType) -> None:
        self.functions.append(fn)
        self._dicts.append(vars(fn))
        if fn.__kwdefaults__:
            self._dicts.append(fn.__kwdefaults__)
        for cell in fn.__closure__ or ():
            try:
                self._add(cell.cell_contents)
            except ValueError:  # the cell is empty
                continue
            self._cells.append(cell)
        for part in (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values(), *vars(fn).values()):
            self._add(part)
        own = own_globals_of(fn)
        if own:
            self._dicts.append(fn.__globals__)
            for part in own.values():
                self._add(part)

    def _add_class(self, cls: type) -> None:
        root, name = self._root, cls.__qualname__
        if cls is not root and not is_within(cls, root) and "<locals>" not in name:
            return  # it has a check of its own
        self._dicts.append(vars(cls))
        for attributes in attributes_of_members(cls).values():
            for part in attributes.values():
                self._add(part)
        if issubclass(type(cls), abc.ABCMeta):
            self._abstract.append(cls)
        self._members += vars(cls).get("_member_map_", {}).values()
        self._repeated += [(vars(base), name) for base in cls.__bases__ for name in repeated_in(cls)]
        for name, part in list(vars(cls).items()):
            # Attributes made by Python or a metaclass are compared by identity alone: many cannot be pickled.
            if not is_made(name) or type(part) is types.FunctionType or _is_descriptor(part):
                self._add(part)


def attributes_of_members(cls: Any) -> dict[str, dict[str, Any]]:
    """Return the attributes of an enumeration's members beside name and value; {} for other classes."""
    members = vars(cls).get("_member_map_", {})
    return {name: {n: value for n, value in vars(member).items() if not is_made(n)} for name, member in members.items()}


def registered_with(cls: Any) -> list[type]:
    """Return the classes registered with an abstract base class, by name; [] for other classes."""
    if not issubclass(type(cls), abc.ABCMeta):
        return []
    found = [kind for ref in _get_dump(cls)[0] if (kind := ref()) is not None]
    return sorted(found, key=lambda kind: (kind.__module__, kind.__qualname__))


def is_within(value: Any, root: Any) -> bool:
    """Return whether a class, or a function with a cache, is defined in a class and so pickled with it."""
    return (
        isinstance(root, type)
        and value.__module__ == root.__module__
        and value.__qualname__.startswith(f"{root.__qualname__}.")
    )


def is_made(name: str) -> bool:
    """Return whether an attribute of a class is made by Python or by a metaclass, by its name."""
    return name.startswith("_abc_") or (name.startswith("_") and name.endswith("_"))


def _is_descriptor(value: Any) -> bool:
    """Return whether a value is a wrapper of functions that is pickled with its class."""
    return type(value) is CACHED or isinstance(value, _WRAPPERS)


def _parts_of(value: Any) -> Iterator[Any]:
    if isinstance(value, (classmethod, staticmethod)):
        yield value.__func__
    elif isinstance(value, property):
        yield from (value.fget, value.fset, value.fdel)
    elif isinstance(value, functools.singledispatchmethod):
        yield value.func
        yield from value.dispatcher.registry.values()
    elif isinstance(value, functools.partialmethod):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, functools.cached_property):
        yield value.func
    else:
        yield value.__wrapped__


def _home_of(value: Any) -> tuple[Callable[[str], Any], str, bool] | None:
    """Return where a function or class says it is defined, and whether it is there.

    Returns:
        The lookup in that module's namespace, the name, and whether the lookup returns the value; None for a nested or
        unknown one.
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module not in sys.modules or "." in name:
        return None
    find = vars(sys.modules[module]).get
    return find, name, find(name) is value


def large_digest(value: Any) -> bytes:
    """Return a digest of a value's pickle; buffers are not copied."""
    from hashlib import blake2b

    digest = blake2b(digest_size=16)
    buffers: list[pickle.PickleBuffer] = []
    digest.update(pickle.dumps(value, protocol=5, buffer_callback=buffers.append))
    for buffer in buffers:
        digest.update(buffer.raw())
    return digest.digest()
