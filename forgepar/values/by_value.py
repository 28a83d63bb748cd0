"""How functions and classes of a script are pickled, on top of cloudpickle.

cloudpickle decides what a function or class consists of. This module adds what a worker needs to have one namespace per
module, as the caller has (values/namespaces.py makes the objects there):

- the function's `Home`, so that all functions of a module share its namespace;
- a key for each global that is data, which changes when the caller changes the data;
- the file name in code objects, without which a worker's traceback shows no source lines;
- real ``__slots__``, functions with caches, single-dispatch functions and cached properties.

An open file is refused: cloudpickle would send its content instead.

Two private names of cloudpickle are used, only here: `_dynamic_class_reduce` and `_dynamic_function_reduce`.
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

from forgepar.values import namespaces, origins
from forgepar.values.caller_values import KeptAsIs, Key, keep_as_is
from forgepar.values.comparison import ATOMS, CACHED, MISSING, cells_of, names_in, own_globals_of, repeated_in
from forgepar.values.namespaces import MEMBERS, REGISTERED
from forgepar.values.origins import Home, travels_by_value
from forgepar.values.unchanged import attributes_of_members, is_made, is_within, registered_with

_ANY_NAME = frozenset(("eval", "exec", "globals", "locals", "vars", "__subclasses__"))
_DISPATCH_CODE: types.CodeType = functools.singledispatch(lambda _: None).__code__  # type: ignore[attr-defined]
_SHORT = 64  # bytes or characters; shorter data is its own key
_SLOT_TYPES = (types.MemberDescriptorType, types.GetSetDescriptorType)
_METHODS = frozenset((types.FunctionType, classmethod, staticmethod, property))
_CODE_TYPES = (types.FunctionType, classmethod, staticmethod, property, type, types.ModuleType)
_N_CLASS_PARTS = 6  # of a class's reduction by cloudpickle; that of a builtin class has fewer


class _PicklerState(threading.local):
    """State of the pickling in one thread.

    Attributes:
        is_trial: whether a value is pickled only to see whether it can be.
        keyed: ids of the functions whose keys are being computed.
    """

    is_trial = False

    def __init__(self) -> None:
        self.keyed: set[int] = set()


_thread = _PicklerState()


class _ByValueReducers(pickle.Pickler):
    """The pickler's methods; `pickler_from` combines them with cloudpickle's class.

    Attributes:
        found: gets what the pickled functions and classes depend on, a `Dependencies`; or None.
        scope: globals of an importable module whose functions are pickled by value all the same; or None.
        root: an object that is pickled by value in any case.
        leaves_out: whether to replace what cannot be pickled in a class by a `KeptAsIs`.
    """

    found: Any = None
    scope: Any = None
    root: Any = None
    leaves_out = False
    base: Any  # the class that `pickler_from` returned, of which others are derived
    digest: Callable[[Any], bytes]
    reduce_class: Callable[[type], Any]  # of cloudpickle

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
        reduced: Any = super().reducer_override(fn)
        if reduced is NotImplemented:
            is_in_scope = fn is self.root or fn.__globals__ is self.scope
            if not is_in_scope and not travels_by_value(fn.__module__):
                return self._by_name(fn, reduced)
            reduced = self._dynamic_function_reduce(fn)  # type: ignore[attr-defined]  # of cloudpickle
        if self.found is not None:
            self.found.functions.append(fn)
        module = fn.__globals__.get("__name__")
        if not isinstance(module, str) or not _is_modules(module, fn.__globals__):
            return reduced  # its globals belong to no module, so only functions of the same pickle share them
        _, arguments, (attributes, slots), *_ = reduced
        name = fn.__qualname__ if _is_at(module, fn.__qualname__, fn) else ""
        home = _home(module, fn.__globals__, name)
        submodules = slots.pop("_cloudpickle_submodules", None)
        names, cells = slots.pop("__globals__"), slots.pop("__closure__")
        keys: dict[str, Any] = {}
        reads_any = bool(_ANY_NAME.intersection(names_in(fn.__code__)))
        has_modules_alone = not reads_any and all(isinstance(part, types.ModuleType) for part in names.values())
        wanted = tuple(names) or ("__name__",)
        if home.is_importable and not name and has_modules_alone:
            wanted = ()  # a worker need not import the function's module
        elif home.is_importable:
            names = {}
        else:
            names = self._all_names(fn, names)
            keys = self._keys(names)
            if self.found is not None:
                self.found.keys.update({(module, n): key for n, key in keys.items() if key is not None})
        has_state = fn.__defaults__ or fn.__kwdefaults__ or fn.__closure__ or vars(fn)
        if name and has_state and not _thread.is_trial:
            keys["()"] = _keys_within(fn, self.digest)
        made = (home, arguments[0], len(arguments[0].co_freevars), wanted)
        absent = () if home.is_importable else tuple(names_in(fn.__code__) - fn.__globals__.keys())
        state = (home, attributes, slots, cells, names, keys, submodules, absent)
        return namespaces.make_function, made, state, None, None, namespaces.fill_function

    def _by_name(self, value: Any, reduced: Any) -> Any:
        """Note that a value is pickled by name, and return its reduction."""
        if self.found is not None:
            self.found.named.append(value)
        return reduced

    def _all_names(self, fn: types.FunctionType, names: dict[str, Any]) -> dict[str, Any]:
        """Return the globals that a function may use: all that can be pickled, if its code does not show which."""
        if _thread.is_trial or not any(
            name in _ANY_NAME and name not in fn.__globals__ for name in names_in(fn.__code__)
        ):
            return names
        more = {name: value for name, value in fn.__globals__.items() if not name.startswith("__")}
        return names | {name: value for name, value in more.items() if name in names or _can_pickle(value, self.base)}

    def _reduce_class(self, cls: type) -> Any:
        reduced: Any = super().reducer_override(cls)
        is_in_scope = self._is_in_scope(cls)
        if reduced is NotImplemented:
            if not is_in_scope and not travels_by_value(cls.__module__):
                return self._by_name(cls, reduced)
            reduced = self.reduce_class(cls)
        if len(reduced) < _N_CLASS_PARTS:
            return reduced
        maker, arguments, state, _, _, setter = reduced
        module = cls.__module__
        scope = vars(sys.modules[module]) if module in sys.modules else {"__name__": module}
        name = cls.__qualname__ if _is_at(module, cls.__qualname__, cls) else ""
        attributes = _repeated_in(cls) | {
            n: value for n, value in state[0].items() if n != "__slots__" and not isinstance(value, _SLOT_TYPES)
        }
        # The metaclass of a named tuple makes its slots, and allows none in the body.
        if "__slots__" in vars(cls) and isinstance(arguments[3], dict) and typing.NamedTuple not in arguments[2]:
            slots = vars(cls)["__slots__"]
            arguments = (*arguments[:3], {**arguments[3], "__slots__": slots}, *arguments[4:])
        if cls.__qualname__ != cls.__name__ and isinstance(arguments[3], dict) and not isinstance(arguments[0], tuple):
            options = {**arguments[3], "__qualname__": cls.__qualname__}  # cloudpickle keeps that of enumerations only
            arguments = (*arguments[:3], options, *arguments[4:])
        keys = self._keys({n: value for n, value in attributes.items() if _is_data(n, value)})
        if "_member_map_" in vars(cls):
            attributes[MEMBERS] = attributes_of_members(cls)
            keys |= self._keys({MEMBERS: [*attributes[MEMBERS].items()]})
        registered = [] if _thread.is_trial else [kind for kind in registered_with(cls) if self._can_pickle(kind)]
        if registered:
            attributes[REGISTERED] = registered
        home = _home(module, scope, name, by_value=not is_in_scope)
        if self.leaves_out and is_in_scope:
            attributes = {
                n: value if n == REGISTERED or self._can_pickle(value) else self._leave_out(value)
                for n, value in attributes.items()
            }
        made = (home, namespaces.class_id(cls), maker, arguments)
        state = (home, setter, (attributes, *state[1:]), keys)
        return namespaces.make_class, made, state, None, None, namespaces.fill_class

    def _is_in_scope(self, value: Any) -> bool:
        return value is self.root or is_within(value, self.root)

    def _can_pickle(self, value: Any) -> bool:
        def again(*arguments: Any, **options: Any) -> Any:
            made = self.base(*arguments, **options)
            made.scope, made.root = self.scope, self.root
            return made

        return _can_pickle(value, again)

    def _leave_out(self, value: Any) -> KeptAsIs:
        if self.found is not None:
            self.found.left_out.append(value)
        return keep_as_is(value)

    def _reduce_cached(self, cached: Any) -> Any:
        home = self._home_by_value(cached)
        if home is None:
            return self._by_name(cached, NotImplemented)
        return namespaces.make_cached, (home, cached.__wrapped__, cached.cache_parameters())

    def _reduce_dispatch(self, fn: Any) -> Any:
        home = self._home_by_value(fn)
        if home is None:
            return self._by_name(fn, super().reducer_override(fn))
        made, implementations = (home, fn.registry[object]), list(fn.registry.items())
        return namespaces.make_dispatch, made, implementations, None, None, namespaces.fill_dispatch

    def _home_by_value(self, value: Any) -> Home | None:
        """Return where an object comes from, by its ``__module__``; None to pickle it by name."""
        module = getattr(value, "__module__", None)
        if not isinstance(module, str) or module not in sys.modules:
            return Home(origins.token(), "__main__", "", {}, False, True)
        name = value.__qualname__ if _is_at(module, value.__qualname__, value) else ""
        home = _home(module, vars(sys.modules[module]), name)
        return None if name and home.is_importable and not self._is_in_scope(value) else home

    def _keys(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {} if _thread.is_trial else {name: _key(value, self.digest) for name, value in values.items()}


def pickler_from(cloudpickle: Any) -> Any:
    """Return the pickler class, derived from that of the module cloudpickle."""
    reduce_code_by_parts = cloudpickle.Pickler.dispatch_table[types.CodeType]
    reduce_open_file = cloudpickle.Pickler.dispatch_table[io.TextIOWrapper]

    def reduce_code(code: types.CodeType) -> tuple[Any, ...]:
        _, arguments = reduce_code_by_parts(code)
        return _as_code, (code.co_filename, *arguments)

    def reduce_file(file: io.TextIOWrapper) -> tuple[Any, ...]:
        if file in (sys.stdout, sys.stderr):
            return tuple(reduce_open_file(file))
        raise TypeError(f"cannot pickle an open file ({getattr(file, 'name', None)!r})")

    class Pickler(_ByValueReducers, cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
        dispatch_table = cloudpickle.Pickler.dispatch_table.new_child(
            {
                types.CodeType: reduce_code,
                io.TextIOWrapper: reduce_file,
                functools.cached_property: _reduce_cached_property,
                functools.singledispatchmethod: _reduce_dispatch_method,
            }
        )
        reduce_class = staticmethod(cloudpickle.cloudpickle._dynamic_class_reduce)

    Pickler.base, Pickler.digest = Pickler, staticmethod(_digest_by(Pickler))
    return Pickler


def _digest_by(pickler: Any) -> Callable[[Any], bytes]:
    """Return a function that digests data as a pickler class pickles it."""

    class Shallow(pickler):  # type: ignore[misc]
        """Replaces functions and classes by their identity, as they are sent separately."""

        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, (types.FunctionType, type)) or type(value) is CACHED:
                module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
                held = _key(value, digest) if type(value) is types.FunctionType else None
                return str(module), name, id(value), id(getattr(value, "__code__", None)), held
            return None

    def digest(value: Any) -> bytes:
        """Return a digest of a value's pickle; buffers are not copied."""
        found = blake2b(digest_size=16)
        buffers: list[pickle.PickleBuffer] = []
        with io.BytesIO() as file:
            Shallow(file, protocol=5, buffer_callback=buffers.append).dump(value)
            found.update(file.getbuffer())
        for buffer in buffers:
            found.update(buffer.raw())
        return found.digest()

    return digest


def _as_code(filename: str, *arguments: Any) -> types.CodeType:
    return types.CodeType(*arguments).replace(co_filename=filename)


def _key(value: Any, digest: Callable[[Any], bytes]) -> Any:
    """Return the key that changes when the caller changes a global; None for code, which is compared."""
    kind = type(value)
    if kind in ATOMS and (kind not in (str, bytes) or len(value) <= _SHORT):
        return (kind.__name__, value)
    if kind is types.FunctionType:
        if _is_at(value.__module__, value.__qualname__, value):
            return None
        return (id(value), id(value.__code__), _keys_within(value, digest))
    if isinstance(value, (*_CODE_TYPES, functools.singledispatchmethod)) or kind is CACHED or value is MISSING:
        return None
    try:
        return Key(id(value), digest(value))
    except Exception:  # it cannot be pickled; pickling it raises the error later
        return None


def _keys_within(fn: types.FunctionType, digest: Callable[[Any], bytes]) -> tuple[Any, ...]:
    """Return the keys of a function's closure, defaults and attributes; nothing if these refer to the function."""
    if id(fn) in _thread.keyed:
        return ()
    _thread.keyed.add(id(fn))
    try:
        held = {**vars(fn), "()": fn.__defaults__, "(*)": fn.__kwdefaults__, **own_globals_of(fn)}
        return (*(_key(cell, digest) for cell in cells_of(fn)), *((n, _key(part, digest)) for n, part in held.items()))
    finally:
        _thread.keyed.discard(id(fn))


def _can_pickle(value: Any, pickler: Any) -> bool:
    _thread.is_trial = True  # a `__reduce__` may pickle in turn, and would try all names again
    try:
        with io.BytesIO() as file:
            pickler(file, protocol=5, buffer_callback=lambda _: None).dump(value)
    except Exception:
        return False
    finally:
        _thread.is_trial = False
    return True


def _is_modules(module: str, names: dict[str, Any]) -> bool:
    loaded = sys.modules.get(module)
    return (loaded is not None and vars(loaded) is names) or origins.is_namespace(names)


def _is_at(module: Any, qualname: str, value: Any) -> bool:
    """Return whether a module has an object under a qualified name."""
    found: Any = sys.modules.get(module) if isinstance(module, str) else None
    if found is None or "<" in qualname:
        return False
    for part in qualname.split("."):
        found = vars(found).get(part) if isinstance(found, types.ModuleType) else getattr(found, part, None)
    return found is value


def _home(module: str, names: dict[str, Any], name: str, *, by_value: bool = False) -> Home:
    about = origins.about(names)
    origin, here = origins.origin_of(names), origins.token()
    is_importable = not travels_by_value(module) and not (by_value and bool(name))
    return Home(origin, module, name, about, is_importable, origin == here)


def _repeated_in(cls: type) -> dict[str, Any]:
    """Return the attributes that are identical to a base's: cloudpickle omits them, but the base's may change.

    Mutable data is omitted here too, as class and base must share one object.
    """
    if hasattr(cls, "__members__"):  # the metaclass of an enumeration sets its attributes
        return {}
    return {n: value for n, value in repeated_in(cls).items() if type(value) in ATOMS or type(value) in _METHODS}


def _is_data(name: str, value: Any) -> bool:
    return not is_made(name) and not isinstance(value, _CODE_TYPES)


def _reduce_cached_property(value: Any) -> tuple[Any, ...]:
    return namespaces.make_cached_property, (value.func, value.attrname)


def _reduce_dispatch_method(value: Any) -> tuple[Any, ...]:
    return namespaces.make_dispatch_method, (value.dispatcher, value.func)
