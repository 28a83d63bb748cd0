"""Make functions and classes that were pickled by value, in the namespace of their module.

    caller: function, class ──by_value.py──> (home, code, state) ──> receiver: make_*, then fill_*

`make_*` returns an object that may still be empty, so that functions and classes can refer to each other. `fill_*`
gives it its state. An object that this process has already is kept if it is the same; a worker changes it where the
caller has changed it.

Run stores have pickles that name the functions of this module, and `Home`, `Key` and `KeptAsIs`, by its path: none may
be renamed. A worker loads this module, so it imports little.
"""

from __future__ import annotations

import abc
import functools
import os
import sys
import types
import typing
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from forgepar.errors import CodeMismatch
from forgepar.values import origins
from forgepar.values.caller_values import KeptAsIs, check_kept, clear_caches, merge, register_cache
from forgepar.values.caller_values import Key as Key
from forgepar.values.comparison import CACHED, FRESH, MISSING, contents_of, same
from forgepar.values.origins import Home, existing, is_native, namespace_of, token, travels_by_value
from forgepar.values.unchanged import is_made, registered_with

MEMBERS = "()"  # entry in a class's attributes: attributes of the members of an enumeration
REGISTERED = "(abc)"  # entry in a class's attributes: classes registered with an abstract base class

_State = tuple[Home, Callable[[type, Any], object], tuple[dict[str, Any], Any], dict[str, Any]]

_class_ids: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()
_class_by_id: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
_unfilled: weakref.WeakSet[type] = weakref.WeakSet()  # classes that were made and have no attributes yet
_class_state: weakref.WeakKeyDictionary[type, dict[str, Any]] = weakref.WeakKeyDictionary()
_members_key: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()


def begin_run() -> None:
    """Forget which values the caller sent, so that the next ones are compared with those of this process."""
    origins.forget_received()
    _class_state.clear()
    _members_key.clear()


# Functions


def make_function(home: Home, code: types.CodeType, n_cells: int, wanted: tuple[str, ...]) -> types.FunctionType:
    """Return this process's function if it has the same code, else a new one for `fill_function`."""
    known = existing(home)
    if type(known) is types.FunctionType and known.__code__ == code and len(known.__closure__ or ()) == n_cells:
        return known
    cells = tuple(types.CellType() for _ in range(n_cells)) or None
    made = types.FunctionType(code, origins.globals_for(home, wanted), code.co_name, None, cells)
    made.__dict__[FRESH] = True
    return made


def fill_function(fn: types.FunctionType, state: tuple[Any, ...]) -> None:
    """Give a function its defaults, closure and globals.

    Args:
        fn: the function.
        state: its `Home`; its ``__dict__``; attributes to set, such as ``__defaults__``; its cells; its globals by
            name; the keys of values that the caller may change (see `merge`; "()" is the key of defaults, attributes
            and closure); modules that must be loaded; names that it refers to and the caller does not have.
    """
    home, attributes, slots, cells, names, keys, _, absent = state
    is_fresh = fn.__dict__.pop(FRESH, False)
    if is_fresh:
        _fill(fn, attributes, slots, cells)
    if is_native(home):
        if is_fresh and fn.__globals__ is not vars(sys.modules[home.module]):
            fn.__globals__.update(names)
        return
    if home.is_importable and not home.name:
        if is_fresh:
            for name, value in names.items():
                fn.__globals__.setdefault(name, value)
        return
    namespace = namespace_of(home)
    key = keys.pop("()", None)
    if is_fresh:
        if home.name and home.is_origins and "." not in home.name and not home.is_importable:
            namespace.names[home.name] = fn
        namespace.received[f"{home.name}()"] = key
    elif home.is_origins and home.name and namespace.received.get(f"{home.name}()", MISSING) != key:
        namespace.received[f"{home.name}()"] = key
        _update_function(fn, attributes, slots, cells)
    merge(namespace, names, keys, is_callers=home.is_origins)
    if home.is_origins:
        for name in namespace.sent.intersection(absent):
            namespace.sent.discard(name)
            namespace.received.pop(name, None)
            if name in namespace.names:
                del namespace.names[name]
                clear_caches()


def _fill(fn: types.FunctionType, attributes: dict[str, Any], slots: dict[str, Any], cells: Any) -> None:
    fn.__dict__.update(attributes)
    for name, value in slots.items():
        setattr(fn, name, value)
    for mine, sent in zip(fn.__closure__ or (), cells or (), strict=True):
        try:
            mine.cell_contents = sent.cell_contents
        except ValueError:  # the cell is empty
            continue


def _update_function(fn: types.FunctionType, attributes: dict[str, Any], slots: dict[str, Any], cells: Any) -> None:
    if not same(fn.__dict__, attributes):
        fn.__dict__.clear()
        fn.__dict__.update(attributes)
        clear_caches()
    for mine, sent in zip(fn.__closure__ or (), cells or (), strict=True):
        if not same(contents_of(mine), value := contents_of(sent)) and value is not MISSING:
            mine.cell_contents = value
            clear_caches()
    for name in ("__defaults__", "__kwdefaults__"):
        if not same(getattr(fn, name), slots[name]):
            setattr(fn, name, slots[name])
            clear_caches()


def make_cached(home: Home, fn: Any, parameters: dict[str, Any]) -> Any:
    """Return a function with a cache; this process's own, with its cached results, if its function is the same."""
    known = existing(home)
    if type(known) is CACHED and _has_code_of(known.__wrapped__, fn) and known.cache_parameters() == parameters:
        register_cache(known)
        return known
    made = functools.update_wrapper(functools.lru_cache(**parameters)(fn), fn)
    register_cache(made)
    return made


def _has_code_of(one: Any, other: Any) -> bool:
    return bool(getattr(one, "__code__", one) == getattr(other, "__code__", other))


def make_dispatch(home: Home, fn: Any) -> Any:
    """Return a single-dispatch function, which `fill_dispatch` gives its implementations."""
    known = existing(home)
    if is_native(home) and known is not MISSING:
        return known
    made = functools.singledispatch(fn)
    made.__dict__[FRESH] = True
    return made


def fill_dispatch(dispatch: Any, implementations: list[tuple[type, Any]]) -> None:
    """Register the implementations of a function that `make_dispatch` made."""
    if dispatch.__dict__.pop(FRESH, False):
        for kind, implementation in implementations:
            dispatch.register(kind, implementation)


def make_dispatch_method(dispatcher: Any, fn: Any) -> Any:
    """Return a single-dispatch method."""
    made = functools.singledispatchmethod(fn)
    made.dispatcher = dispatcher
    return made


def make_cached_property(fn: Any, name: str | None) -> Any:
    """Return a `functools.cached_property`."""
    made: Any = functools.cached_property(fn)
    if name is not None:
        made.__set_name__(None, name)
    return made


# Classes


def class_id(cls: type) -> str:
    """Return an identifier of a class that is the same in every process."""
    found_id = _class_ids.get(cls)
    if found_id is None:
        found_id = _class_ids[cls] = os.urandom(12).hex()
        _class_by_id[found_id] = cls
    return found_id


def make_class(home: Home, identity: str, maker: Callable[..., type], arguments: tuple[Any, ...]) -> type:
    """Return the class with an identifier; if this process has none, a new one for `fill_class`."""
    cls = _class_by_id.get(identity)
    if cls is not None:
        return cls
    is_new = origins.is_worker and home.is_origins and not home.is_importable and not is_native(home)
    known = MISSING if is_new else existing(home)
    if isinstance(known, type):
        if home.is_importable and home.is_origins and origins.is_worker:
            _check_layout(known, home, arguments)
        return known
    cls = _make_without_hooks(maker, arguments)
    _class_by_id[identity] = cls
    _class_ids[cls] = identity
    _unfilled.add(cls)
    if home.name and home.is_origins and not is_native(home) and not home.is_importable and "." not in home.name:
        namespace_of(home).names[home.name] = cls
    return cls


class _NoSubclassHook:
    """Base class, put first, that stops ``__init_subclass__`` of the other bases: it has run in the caller."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def _make_without_hooks(maker: Callable[..., type], arguments: tuple[Any, ...]) -> type:
    """Make a class without ``__init_subclass__`` of its bases, and without ``__new__`` of a metaclass of the script."""
    meta, name, bases, options = (*arguments, None, None, None, None)[:4]
    if not isinstance(meta, type) or not isinstance(options, dict) or not all(isinstance(base, type) for base in bases):
        return maker(*arguments)
    hooks = [
        vars(kind)["__init_subclass__"] for base in bases for kind in base.__mro__ if "__init_subclass__" in vars(kind)
    ]
    has_hook = any(hook is not vars(object)["__init_subclass__"] for hook in hooks)
    makers = [kind for kind in meta.__mro__ if "__new__" in vars(kind) and not travels_by_value(kind.__module__)]
    try:
        if not has_hook:
            return makers[0].__new__(meta, name, bases, dict(options))
        made: Any = makers[0].__new__(meta, name, (_NoSubclassHook, *bases), dict(options))
        made.__bases__ = bases
    except TypeError:  # the layout of the class does not allow it
        return maker(*arguments)
    cls: type = made
    return cls


def _check_layout(cls: Any, home: Home, arguments: tuple[Any, ...]) -> None:
    """Refuse a class of this process that has other bases, slots or members than the caller's."""
    if isinstance(arguments[0], tuple):  # of an enumeration
        bases, members = arguments[0], arguments[3]
        is_alike = same({member.name: member.value for member in cls}, members)
    else:
        bases, options = arguments[2], arguments[3]
        has_own_slots = typing.NamedTuple not in bases  # else its metaclass makes them
        is_alike = not has_own_slots or same(vars(cls).get("__slots__", MISSING), options.get("__slots__", MISSING))
    mine = cls.__bases__ if isinstance(arguments[0], tuple) else vars(cls).get("__orig_bases__", cls.__bases__)
    if not is_alike or [*map(_base_name, mine)] != [*map(_base_name, bases)]:
        raise CodeMismatch(
            f"class {home.name!r} of module {home.module!r} has other bases, slots or members in this worker than in "
            "the caller: its source was edited after the caller imported it. Reload the module in the caller.",
            module=home.module,
            name=home.name,
        )


def _base_name(base: Any) -> str:
    return getattr(base, "__qualname__", None) or str(base)


def fill_class(cls: type, state: _State) -> None:
    """Give a new class its attributes; in a class that a worker had already, set those that the caller changed.

    Args:
        cls: the class.
        state: its `Home`; the function that sets all attributes; their values; the keys of those that are data.
    """
    home, setter, attributes, keys = state
    if is_native(home) and cls not in _unfilled:
        return  # this process has the class itself; one that a task made in a function is new here as well
    sent, own = attributes[0], vars(cls)
    takes_callers = home.is_origins and origins.is_worker
    for kind in sent.pop(REGISTERED, ()):
        if (cls in _unfilled or takes_callers) and kind not in registered_with(cls):
            vars(abc.ABCMeta)["register"](cls, kind)
            clear_caches()
    members = sent.pop(MEMBERS, None)
    if members is not None:
        key = keys.pop(MEMBERS, None)
        if cls in _unfilled or (takes_callers and _members_key.get(cls, MISSING) != key):
            _members_key[cls] = key
            _fill_members(cls, members)
    left_out = [name for name, value in sent.items() if type(value) is KeptAsIs]
    for name in left_out:
        check_kept(own.get(name, MISSING), sent.pop(name), home.module, f"{home.name}.{name}")
    if cls in _unfilled:  # set all before the mark is removed: another thread may be filling the class as well
        setter(cls, attributes)
        _class_state[cls] = {**dict.fromkeys(attributes[0]), **keys}
        _unfilled.discard(cls)
    elif takes_callers and home.origin != token():
        _update_class(cls, sent, keys, left_out)


def _update_class(cls: type, sent: Mapping[str, Any], keys: Mapping[str, Any], left_out: Iterable[str]) -> None:
    """Set the attributes that the caller changed, and delete those that it does not have."""
    own, before = vars(cls), _class_state.get(cls)
    known = {} if before is None else before
    for name, value in sent.items():
        mine, key = own.get(name, MISSING), keys.get(name)
        is_new = name in keys and (key is None or known.get(name, MISSING) != key)
        if not is_new and not isinstance(value, (types.FunctionType, classmethod, staticmethod, property, type)):
            continue
        if mine is not value and not same(mine, value):
            setattr(cls, name, value)
            clear_caches()
        if type(value) is CACHED:
            register_cache(value)
    # At the beginning of a run a class has no other attributes than the caller's; later, tasks may have added some.
    gone = (own.keys() if before is None else before.keys()) - sent.keys() - set(left_out)
    for name in gone:
        if name in own and not _is_special(cls, name):
            delattr(cls, name)
            clear_caches()
    _class_state[cls] = {**dict.fromkeys(sent), **keys}


def _fill_members(cls: Any, members: dict[str, dict[str, Any]]) -> None:
    """Give the members of an enumeration the attributes that they have in the caller."""
    for name, sent in members.items():
        own = vars(cls.__members__[name])
        if not same({n: value for n, value in own.items() if not is_made(n)}, sent):
            for n in [n for n in own if not is_made(n) and n not in sent]:
                del own[n]
            own.update(sent)
            clear_caches()


def _is_special(cls: Any, name: str) -> bool:
    """Return whether Python or a metaclass made an attribute of a class."""
    is_member = name in getattr(cls, "__members__", ())  # of an enumeration
    return (
        is_made(name)
        or is_member
        or isinstance(vars(cls)[name], (types.MemberDescriptorType, types.GetSetDescriptorType, type))
    )
