"""How functions and classes of a script are pickled, on top of cloudpickle.

cloudpickle takes a function or class apart. This adds what a worker needs to have one module, as the caller has:

- the function's `Home`, so that all functions of a module share its namespace (values/namespaces.py makes them there);
- for each global that is data, a key that changes when the caller changes it;
- the name of the file in code: without it no traceback of a worker shows the line that it is about;
- real ``__slots__``, functions with caches, generic functions and cached properties.

An open file is refused: cloudpickle would send its content in place of it.

Two names of cloudpickle are private, and used here only: `_dynamic_class_reduce` and `_dynamic_function_reduce`.
"""

from __future__ import annotations

import functools
import io
import pickle
import sys
import threading
import types
import typing
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any

from forgepar.values import namespaces
from forgepar.values.comparison import ATOMS, CACHED, MISSING, cells_of, repeated_in
from forgepar.values.current import is_made, is_within
from forgepar.values.namespaces import Home, Kept, kept

_ANY_NAME = frozenset(("eval", "exec", "globals", "locals", "vars", "__subclasses__"))
_DISPATCH_CODE: types.CodeType = functools.singledispatch(lambda _: None).__code__  # type: ignore[attr-defined]
_SHORT = 64  # bytes or characters of data that is its own key
_DEEP = 3  # closures within closures that a key looks into
_SLOT_TYPES = (types.MemberDescriptorType, types.GetSetDescriptorType)
_METHODS = frozenset((types.FunctionType, classmethod, staticmethod, property))
_CODE_TYPES = (types.FunctionType, classmethod, staticmethod, property, type, types.ModuleType)


class _Trials(threading.local):
    """Whether this thread pickles something only to see whether it can be."""

    is_on = False


_trials = _Trials()


def pickler_from(cloudpickle: Any) -> Any:
    """Return the pickler class, derived from that of the module cloudpickle."""
    by_value_class = cloudpickle.cloudpickle._dynamic_class_reduce
    take_apart = cloudpickle.Pickler.dispatch_table[types.CodeType]
    take_file_apart = cloudpickle.Pickler.dispatch_table[io.TextIOWrapper]

    def reduce_code(code: types.CodeType) -> tuple[Any, ...]:
        _, arguments = take_apart(code)
        return _as_code, (code.co_filename, *arguments)

    def reduce_file(file: io.TextIOWrapper) -> tuple[Any, ...]:
        if file in (sys.stdout, sys.stderr):
            return tuple(take_file_apart(file))
        raise TypeError(f"cannot pickle an open file ({getattr(file, 'name', None)!r})")

    table = cloudpickle.Pickler.dispatch_table.new_child(
        {
            types.CodeType: reduce_code,
            io.TextIOWrapper: reduce_file,
            functools.cached_property: _reduce_cached_property,
            functools.singledispatchmethod: _reduce_dispatch_method,
        }
    )

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
        dispatch_table = table
        found: Any = None
        scope: Any = None  # the names of a module that other processes can import, whose functions go by value
        root: Any = None  # what goes by value in any case
        leaves_out = False  # whether a class goes without what cannot be pickled

        def reducer_override(self, value: Any) -> Any:
            kind = type(value)
            if kind is types.FunctionType:
                return self._reduce_function(value)
            if issubclass(kind, type):
                return self._reduce_class(value)
            if kind is CACHED:
                return self._reduce_cached(value)
            if hasattr(kind, "__forgepar_named__") and value is self.root:
                return object.__reduce_ex__(value, 2)
            if self.found is not None and (kind is types.ModuleType or hasattr(kind, "__forgepar_named__")):
                self.found.named.append(value)
            return NotImplemented

        def _reduce_function(self, fn: types.FunctionType) -> Any:
            if fn.__code__ is _DISPATCH_CODE:
                return self._reduce_dispatch(fn)
            reduced = super().reducer_override(fn)
            if reduced is NotImplemented:
                is_in_scope = fn is self.root or fn.__globals__ is self.scope
                if not is_in_scope and not namespaces.travels_by_value(fn.__module__):
                    if self.found is not None:
                        self.found.named.append(fn)
                    return reduced
                reduced = self._dynamic_function_reduce(fn)
            if self.found is not None:
                self.found.functions.append(fn)
            module = fn.__globals__.get("__name__")
            if not isinstance(module, str) or not _is_modules(module, fn.__globals__):
                return reduced  # its globals are no module's, so only those of this message share them
            _, arguments, (attributes, slots), *_ = reduced
            name = fn.__qualname__ if _is_home(module, fn.__qualname__, fn) else ""
            home = _home(module, fn.__globals__, name)
            submodules = slots.pop("_cloudpickle_submodules", None)
            names, cells = slots.pop("__globals__"), slots.pop("__closure__")
            keys: dict[str, Any] = {}
            reads_any = bool(_ANY_NAME.intersection(names_in(fn.__code__)))
            has_modules_alone = not reads_any and all(isinstance(part, types.ModuleType) for part in names.values())
            wanted = tuple(names) or ("__name__",)
            if home.is_importable and not name and has_modules_alone:
                wanted = ()  # a worker need not import the module that it is of
            elif home.is_importable:
                names = {}
            else:
                names = self._all_names(fn, names)
                keys = self._keys(names)
                if self.found is not None:
                    self.found.keys.update({(module, n): key for n, key in keys.items() if key is not None})
            if fn.__defaults__ or fn.__kwdefaults__:
                keys |= self._keys({"()": (fn.__defaults__, fn.__kwdefaults__)})
            made = (home, arguments[0], len(arguments[0].co_freevars), wanted)
            absent = () if home.is_importable else tuple(names_in(fn.__code__) - fn.__globals__.keys())
            state = (home, attributes, slots, cells, names, keys, submodules, absent)
            return namespaces.make_function, made, state, None, None, namespaces.fill_function

        def _all_names(self, fn: types.FunctionType, names: dict[str, Any]) -> dict[str, Any]:
            """Return the globals that a function may use: all that can travel, where its code does not tell which."""
            if _trials.is_on or not any(
                name in _ANY_NAME and name not in fn.__globals__ for name in names_in(fn.__code__)
            ):
                return names
            more = {name: value for name, value in fn.__globals__.items() if not name.startswith("__")}
            return names | {name: value for name, value in more.items() if name in names or _can_travel(value, Pickler)}

        def _reduce_class(self, cls: type) -> Any:
            reduced = super().reducer_override(cls)
            is_in_scope = self._is_in_scope(cls)
            if reduced is NotImplemented:
                if not is_in_scope and not namespaces.travels_by_value(cls.__module__):
                    if self.found is not None:
                        self.found.named.append(cls)
                    return reduced
                reduced = by_value_class(cls)
            if len(reduced) < 6:  # of a builtin
                return reduced
            maker, arguments, state, _, _, setter = reduced
            module = cls.__module__
            scope = vars(sys.modules[module]) if module in sys.modules else {"__name__": module}
            name = cls.__qualname__ if _is_home(module, cls.__qualname__, cls) else ""
            attributes = _repeated_in(cls) | {
                n: value for n, value in state[0].items() if n != "__slots__" and not isinstance(value, _SLOT_TYPES)
            }
            # A named tuple's are made by its metaclass, which allows none in the body.
            if "__slots__" in vars(cls) and isinstance(arguments[3], dict) and typing.NamedTuple not in arguments[2]:
                slots = vars(cls)["__slots__"]
                arguments = (*arguments[:3], {**arguments[3], "__slots__": slots}, *arguments[4:])
            keys = self._keys({n: value for n, value in attributes.items() if _is_data(n, value)})
            home = _home(module, scope, name, by_value=not is_in_scope)
            if self.leaves_out and is_in_scope:
                attributes = {
                    n: value if self._travels(value) else self._kept(value) for n, value in attributes.items()
                }
            made = (home, namespaces.class_id(cls), maker, arguments)
            state = (home, setter, (attributes, *state[1:]), keys)
            return namespaces.make_class, made, state, None, None, namespaces.fill_class

        def _is_in_scope(self, value: Any) -> bool:
            return value is self.root or is_within(value, self.root)

        def _travels(self, value: Any) -> bool:
            def again(*arguments: Any, **options: Any) -> Any:
                made = Pickler(*arguments, **options)
                made.scope, made.root = self.scope, self.root
                return made

            return _can_travel(value, again)

        def _kept(self, value: Any) -> Kept:
            if self.found is not None:
                self.found.left_out.append(value)
            return kept(value)

        def _reduce_cached(self, cached: Any) -> Any:
            home = _home_of(cached)
            if home is not None and home.name and home.is_importable and not self._is_in_scope(cached):
                if self.found is not None:
                    self.found.named.append(cached)
                return NotImplemented
            home = home or Home(namespaces.token(), "__main__", "", {}, False, True)
            return namespaces.make_cached, (home, cached.__wrapped__, cached.cache_parameters())

        def _reduce_dispatch(self, fn: Any) -> Any:
            home = _home_of(fn)
            if home is not None and home.name and home.is_importable and not self._is_in_scope(fn):
                if self.found is not None:
                    self.found.named.append(fn)
                return super().reducer_override(fn)
            home = home or Home(namespaces.token(), "__main__", "", {}, False, True)
            implementations = list(fn.registry.items())
            base = fn.registry[object]
            return namespaces.make_dispatch, (home, base), implementations, None, None, namespaces.fill_dispatch

        def _keys(self, values: Mapping[str, Any]) -> dict[str, Any]:
            return {} if _trials.is_on else {name: _key(value, digest) for name, value in values.items()}

    class Shallow(Pickler):
        """Pickles data for its digest: of code only which object it is, so that no code is looked into twice."""

        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, (types.FunctionType, type)) or type(value) is CACHED:
                module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
                return str(module), name, id(value), id(getattr(value, "__code__", None))
            return None

    def digest(value: Any) -> bytes:
        """Return a digest of a value's pickle; buffers are read where they are."""
        found = blake2b(digest_size=16)
        buffers: list[pickle.PickleBuffer] = []
        with io.BytesIO() as file:
            Shallow(file, protocol=5, buffer_callback=buffers.append).dump(value)
            found.update(file.getbuffer())
        for buffer in buffers:
            found.update(buffer.raw())
        return found.digest()

    return Pickler


def _as_code(filename: str, *arguments: Any) -> types.CodeType:
    return types.CodeType(*arguments).replace(co_filename=filename)


def _key(value: Any, digest: Callable[[Any], bytes], depth: int = 0) -> Any:
    """Return what tells whether the caller has changed a global; None: comparing the code tells."""
    kind = type(value)
    if kind in ATOMS and (kind not in (str, bytes) or len(value) <= _SHORT):
        return (kind.__name__, value)
    if kind is types.FunctionType:
        if _is_home(value.__module__, value.__qualname__, value):
            return None
        cells = cells_of(value) if depth < _DEEP else []
        return (id(value), id(value.__code__), tuple(_key(cell, digest, depth + 1) for cell in cells))
    if isinstance(value, (*_CODE_TYPES, functools.singledispatchmethod)) or kind is CACHED or value is MISSING:
        return None
    try:
        return digest(value)
    except Exception:  # it cannot travel, as its pickling says next
        return None


def _can_travel(value: Any, pickler: Any) -> bool:
    _trials.is_on = True  # what pickles itself may pickle in turn, and would try all names again
    try:
        with io.BytesIO() as file:
            pickler(file, protocol=5, buffer_callback=lambda _: None).dump(value)
    except Exception:
        return False
    finally:
        _trials.is_on = False
    return True


def _is_modules(module: str, names: dict[str, Any]) -> bool:
    loaded = sys.modules.get(module)
    return (loaded is not None and vars(loaded) is names) or namespaces.is_space(names)


def _is_home(module: Any, qualname: str, value: Any) -> bool:
    """Tell whether a module has an object under its qualified name."""
    found: Any = sys.modules.get(module) if isinstance(module, str) else None
    if found is None or "<" in qualname:
        return False
    for part in qualname.split("."):
        found = vars(found).get(part) if isinstance(found, types.ModuleType) else getattr(found, part, None)
    return found is value


def _home_of(value: Any) -> Home | None:
    """Return where an object with a module and a name comes from, None if it is no module's."""
    module = getattr(value, "__module__", None)
    if not isinstance(module, str) or module not in sys.modules:
        return None
    name = value.__qualname__ if _is_home(module, value.__qualname__, value) else ""
    return _home(module, vars(sys.modules[module]), name)


def _home(module: str, names: dict[str, Any], name: str, *, by_value: bool = False) -> Home:
    about = namespaces.about(names)
    origin, here = namespaces.origin_of(names), namespaces.token()
    is_importable = not namespaces.travels_by_value(module) and not (by_value and bool(name))
    return Home(origin, module, name, about, is_importable, origin == here)


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> frozenset[str]:
    """Return the names that code, and the code within it, refers to: globals and attributes."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


def _repeated_in(cls: type) -> dict[str, Any]:
    """Return attributes that repeat those of a base: cloudpickle leaves them out, but the base's may change.

    Data that can change in place is left to the base all the same: both are to have one object.
    """
    if hasattr(cls, "__members__"):  # an enumeration has what its metaclass gives it
        return {}
    return {n: value for n, value in repeated_in(cls).items() if type(value) in ATOMS or type(value) in _METHODS}


def _is_data(name: str, value: Any) -> bool:
    return not is_made(name) and not isinstance(value, _CODE_TYPES)


def _reduce_cached_property(value: Any) -> tuple[Any, ...]:
    return namespaces.make_cached_property, (value.func, value.attrname)


def _reduce_dispatch_method(value: Any) -> tuple[Any, ...]:
    return namespaces.make_dispatch_method, (value.dispatcher, value.func)
