"""Whether a name of a module still has what it had: how the caller, and each worker, sees that nothing has changed.

Code is looked at by identity, data by a digest of its pickle, both as deep as a function or class goes by value: into
methods, properties, caches, closures, defaults and nested classes. A wrong "no" costs little, as all is then compared.
"""

from __future__ import annotations

import functools
import itertools
import operator
import pickle
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from forgepar.values.comparison import ATOMS, CACHED, MISSING, repeated_in, same

_MEMBERS = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")
_VALUES = operator.methodcaller("values")
_CONTENTS = operator.attrgetter("cell_contents")
_OPAQUE = (  # there is nothing in them that can change
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
    by_fields: bool = False,
) -> Callable[[], bool]:
    """Return what tells whether a namespace still has a value under a name, unchanged.

    Args:
        names: the namespace of a module.
        name: one in it.
        value: what it has there now.
        looks_into: whether to see that data was changed in place, which takes 1 ms per MiB at each call.
        without: what within it is compared by identity alone.
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
    look = _Look(value, without, by_fields=by_fields)
    held = look.held()
    content = look.content() if looks_into else None

    def check() -> bool:
        if get(name, MISSING) is not value or _home_of(value) != where:
            return False
        now = look.held()
        if len(now) != len(held) or not all(map(operator.is_, now, held)):
            return False
        return content is None or content == look.content()

    return check


def functions_in(value: Any) -> list[types.FunctionType]:
    """Return a function, or those of a class, and all within it that goes by value with it; of data, none."""
    return _Look(value).functions


def fields_of(value: Any) -> dict[Any, Any]:
    """Return the items of a dict, or the attributes of an instance."""
    return value if type(value) is dict else vars(value)


class _Look:
    """What in a value is looked at to see whether it has changed.

    Attributes:
        functions: it, or those within it.
    """

    def __init__(self, value: Any, without: Sequence[Any] = (), *, by_fields: bool = False) -> None:
        self._root = value
        self._seen = {id(part): part for part in without}
        self.functions: list[types.FunctionType] = []
        self._dicts: list[Mapping[Any, Any]] = []
        self._cells: list[types.CellType] = []
        self._repeated: list[tuple[Mapping[str, Any], str]] = []
        self._data: list[Any] = []
        if by_fields:
            fields = fields_of(value)
            self._dicts.append(fields)
            for part in list(fields.values()):
                self._look(part)
        else:
            self._look(value)

    def held(self) -> tuple[Any, ...]:
        """Return what is compared by identity."""
        return (
            *itertools.chain.from_iterable(map(_VALUES, self._dicts)),
            *itertools.chain.from_iterable(map(_MEMBERS, self.functions)),
            *map(_CONTENTS, self._cells),
            *(names.get(name) for names, name in self._repeated),
        )

    def content(self) -> object:
        """Return what is compared by content; None: there is nothing."""
        if not self._data:
            return None
        try:
            return large_digest(self._data)
        except Exception:
            return object()  # equal to no other: to be looked at each time

    def _look(self, value: Any) -> None:
        if isinstance(value, _OPAQUE) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if type(value) is types.FunctionType:
            self._look_at_function(value)
        elif isinstance(value, type):
            self._look_at_class(value)
        elif _is_descriptor(value):
            if isinstance(value, functools.singledispatchmethod):
                self._dicts.append(value.dispatcher.registry)
            for part in _parts_of(value):
                self._look(part)
        elif not (type(value) in (tuple, frozenset) and ATOMS.issuperset(map(type, value))):
            self._data.append(value)

    def _look_at_function(self, fn: types.FunctionType) -> None:
        self.functions.append(fn)
        self._dicts.append(vars(fn))
        for cell in fn.__closure__ or ():
            try:
                self._look(cell.cell_contents)
            except ValueError:  # it is empty
                continue
            self._cells.append(cell)
        for part in (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values(), *vars(fn).values()):
            self._look(part)

    def _look_at_class(self, cls: type) -> None:
        root, name = self._root, cls.__qualname__
        if cls is not root and not is_within(cls, root) and "<locals>" not in name:
            return  # it is compared by itself
        self._dicts.append(vars(cls))
        self._repeated += [(vars(base), name) for base in cls.__bases__ for name in repeated_in(cls)]
        for name, part in list(vars(cls).items()):
            # What Python or a metaclass made is compared by identity alone: much of it cannot be pickled.
            if not is_made(name) or type(part) is types.FunctionType or _is_descriptor(part):
                self._look(part)


def is_within(value: Any, root: Any) -> bool:
    """Tell whether a class, or a function with a cache, is defined within a class, and so goes by value with it."""
    return (
        isinstance(root, type)
        and value.__module__ == root.__module__
        and value.__qualname__.startswith(f"{root.__qualname__}.")
    )


def is_made(name: str) -> bool:
    """Tell whether an attribute of a class is one that Python or a metaclass makes, by its name."""
    return name.startswith("_abc_") or (name.startswith("_") and name.endswith("_"))


def _is_descriptor(value: Any) -> bool:
    """Tell whether a value is one of those around functions that travel with a class."""
    kind = type(value)
    return kind is CACHED or isinstance(
        value,
        (
            classmethod,
            staticmethod,
            property,
            functools.cached_property,
            functools.partialmethod,
            functools.singledispatchmethod,
        ),
    )


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
    """Return where a function or class says that it is, and whether it is there: if not, it does not go by its name."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module not in sys.modules or "." in name:
        return None
    find = vars(sys.modules[module]).get
    return find, name, find(name) is value


def large_digest(value: Any) -> bytes:
    """Return a digest of a value's pickle; buffers are read where they are."""
    from hashlib import blake2b

    digest = blake2b(digest_size=16)
    buffers: list[pickle.PickleBuffer] = []
    digest.update(pickle.dumps(value, protocol=5, buffer_callback=buffers.append))
    for buffer in buffers:
        digest.update(buffer.raw())
    return digest.digest()
