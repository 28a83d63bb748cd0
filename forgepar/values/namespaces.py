"""Where functions and classes that travel by value come to life: one namespace per module and process.

    caller: function, class ──pickling.py──> (origin, module, name, code, state) ──> worker: make_*, fill_*

A function needs the globals of its module. All functions of one module share one dict in a process, whichever message
brought them, so that what one assigns another reads, as in the caller. Three cases:

- the process that the pickle comes from has the module itself: its own functions and classes are used as they are;
- a worker of forgepar: a script, or another module that cannot be imported, gets a module object in `sys.modules`;
- any other process (a Dask worker, a program that reads a run store): a dict that only this module knows.

The caller's assignments win over those of a worker only where the caller made one since it last sent that name: each
value comes with a key that tells whether the caller has changed it. So what a pool's initializer assigned stays, and
what the caller assigned later arrives.

This module loads little, as every worker loads it.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import marshal
import os
import sys
import types
import typing
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from forgepar.errors import CodeMismatch
from forgepar.values.comparison import CACHED, FRESH, MISSING, is_plain_instance, same
from forgepar.values.current import functions_in, is_made

_ABOUT = ("__name__", "__package__", "__path__", "__file__")  # of a module, for relative imports and `__file__`
_RANDOM = os.urandom(8).hex()


class Home(NamedTuple):
    """Where a function or class comes from.

    Attributes:
        origin: the process that has the module itself, as `token` names it.
        module: the module's name.
        name: its qualified name there, "" where the module does not have it under that name.
        about: ``__name__``, ``__file__`` and the like of the module.
        is_importable: whether other processes can import the module.
        is_origins: whether the process that pickled it is the origin, so that its state is the caller's.
    """

    origin: str
    module: str
    name: str
    about: Mapping[str, Any]
    is_importable: bool
    is_origins: bool


class Kept(NamedTuple):
    """In place of what cannot be pickled: where this arrives, what is there is kept.

    Attributes:
        type_name: of what it stands for.
        codes: the code in it, marshalled; what is kept must have the same.
    """

    type_name: str
    codes: tuple[bytes, ...]


def kept(value: Any) -> Kept:
    """Return what travels in place of a value that cannot."""
    return Kept(type_name(value), tuple([marshal.dumps(fn.__code__) for fn in functions_in(value)]))


def check_kept(mine: Any, sent: Kept, module: str, name: str) -> None:
    """Refuse what is kept here where its code is not the caller's; warn where it is something else altogether.

    Raises:
        CodeMismatch: the code differs.
    """
    if type_name(mine) != sent.type_name:
        here = "not defined" if mine is MISSING else f"a {type_name(mine)}"
        warnings.warn(
            f"{name!r} of module {module!r} is a {sent.type_name} in the caller, which cannot be pickled, and {here} "
            "in this worker. Make it inside the task, or where the module is imported.",
            RuntimeWarning,
            stacklevel=2,
        )
    elif [fn.__code__ for fn in functions_in(mine)] != [*map(marshal.loads, sent.codes)]:
        raise CodeMismatch(
            f"{name!r} of module {module!r} has other code in this worker than in the caller, and cannot be sent, as "
            "something in it cannot be pickled. Import the module anew in the caller, and start new workers.",
            module=module,
            name=name,
        )


def type_name(value: Any) -> str:
    """Return the qualified name of a value's class."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


class Space:
    """The namespace of a module, and what the caller was known to have in it."""

    def __init__(self, module: types.ModuleType, origin: str) -> None:
        self.module = module
        self.names = vars(module)
        self.origin = origin
        self.received: dict[str, Any] = {}  # in this run: what told whether the caller has changed a name
        self.sent: set[str] = set()  # all names that the caller ever sent


_spaces: dict[tuple[str, str], Space] = {}
_foreign_origin: dict[int, str] = {}  # of dicts that belong to spaces, by id
_class_ids: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()
_class_by_id: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
_unfilled: weakref.WeakSet[type] = weakref.WeakSet()  # classes that were made, and have no attributes yet
_class_state: weakref.WeakKeyDictionary[type, dict[str, Any]] = weakref.WeakKeyDictionary()
_caches: weakref.WeakSet[Any] = weakref.WeakSet()
_hidden: list[types.ModuleType] = []  # the modules that stood in `sys.modules` before
_is_worker = False
_by_value: set[str] = set()


def token() -> str:
    """Return what names this process among all that pickles may come from; a forked child has another one."""
    return f"{_RANDOM}-{os.getpid()}"


def become_worker() -> None:
    """Let scripts of the caller have their module in `sys.modules` of this process, which is a worker of forgepar's."""
    global _is_worker  # one word about the whole process
    _is_worker = True
    _spaces.clear()
    _foreign_origin.clear()


def begin_run() -> None:
    """Forget what the caller was known to have: what it sends next is compared with what is here."""
    for space in _spaces.values():
        space.received.clear()
    _class_state.clear()


def origin_of(names: dict[str, Any]) -> str:
    """Return the process whose module a namespace of this process stands for; `token` for this one's own modules."""
    return _foreign_origin.get(id(names)) or token()


def about(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a module's namespace says of the module itself."""
    said = {name: names[name] for name in _ABOUT if name in names}
    if "__path__" in said:
        said["__path__"] = list(said["__path__"])  # of a package without __init__.py it cannot be pickled
    return said


def send_by_value(module: str) -> None:
    """Have what a module defines travel by value: other processes are not to import it."""
    _by_value.add(module)


def travels_by_value(module: str) -> bool:
    """Tell whether what a module defines travels by value: it is the script, or cannot be imported elsewhere."""
    if module in ("__main__", "__mp_main__") or module in _by_value:
        return True
    loaded = sys.modules.get(module)
    return loaded is not None and getattr(loaded, "__spec__", None) is None and not hasattr(loaded, "__file__")


# Namespaces


def space_of(home: Home) -> Space:
    """Return the namespace, in this process, of a module that another one has."""
    key = (home.origin if not _is_worker else "", home.module)
    space = _spaces.get(key)
    if space is None:
        space = _spaces[key] = Space(_module(home), home.origin)
        _foreign_origin[id(space.names)] = home.origin
    elif _is_worker and home.is_importable and sys.modules.get(home.module) not in (space.module, None):
        space = _spaces[key] = Space(sys.modules[home.module], home.origin)  # it was imported anew
        _foreign_origin[id(space.names)] = home.origin
    return space


def _module(home: Home) -> types.ModuleType:
    """Return the module that a namespace belongs to: imported where that is possible, else made."""
    if home.is_importable:
        return importlib.import_module(home.module)
    module = types.ModuleType(home.module)
    vars(module).update(home.about, __builtins__=builtins)
    _by_value.add(home.module)
    if _is_worker:
        before = sys.modules.get(home.module)
        if before is not None:
            _hidden.append(before)
        sys.modules[home.module] = module
    return module


def is_native(home: Home) -> bool:
    """Tell whether this is the process that something comes from, which so has the module itself."""
    return home.origin == token() and home.module in sys.modules


def names_of(home: Home, wanted: Iterable[str] = ()) -> dict[str, Any]:
    """Return the globals for a function.

    Args:
        home: where it comes from.
        wanted: names that it refers to. Where this process has the module itself but lacks one of these, the function
            gets globals of its own: a value that is only read must not assign names in the caller's module.
    """
    if is_native(home):
        names = vars(sys.modules[home.module])
        return names if names.keys() >= set(wanted) else {**home.about, "__builtins__": builtins}
    if home.is_importable and not home.name and not wanted:
        return {**home.about, "__builtins__": builtins}
    return space_of(home).names


def found(home: Home) -> Any:
    """Return what this process has under the name in the module, `MISSING` if nothing."""
    if not home.name:
        return MISSING
    module = sys.modules.get(home.module)
    if is_native(home):
        names = vars(module)
    elif _is_worker or module is None or not (home.is_importable or _is_of_file(module, home)):
        names = space_of(home).names
    else:  # a program that reads what another one kept
        names = vars(module)
    first, *rest = home.name.split(".")
    value = names.get(first, MISSING)
    for part in rest:
        value = MISSING if value is MISSING else getattr(value, part, MISSING)
    return value


def _is_of_file(module: types.ModuleType, home: Home) -> bool:
    """Tell whether a script that runs here is the one that something comes from."""
    here, there = getattr(module, "__file__", None), home.about.get("__file__")
    return here is not None and there is not None and os.path.abspath(here) == os.path.abspath(there)  # noqa: PTH100


# Functions


def make_function(home: Home, code: types.CodeType, n_cells: int, wanted: tuple[str, ...]) -> types.FunctionType:
    """Return the function of some code: the one that is here if it is the same, else a new one to be filled."""
    known = found(home)
    if type(known) is types.FunctionType and known.__code__ == code and len(known.__closure__ or ()) == n_cells:
        return known
    cells = tuple(types.CellType() for _ in range(n_cells)) or None
    made = types.FunctionType(code, names_of(home, wanted), code.co_name, None, cells)
    made.__dict__[FRESH] = True
    return made


def fill_function(fn: types.FunctionType, state: tuple[Any, ...]) -> None:
    """Give a function its defaults, its closure and its globals.

    Args:
        fn: the function.
        state: its `Home`, its attributes, what is set by attribute, its cells, its globals by name, the keys of values
            that the caller may change (see `merge`; "()" is that of its defaults), modules that it needs loaded, and
            names that it refers to and the caller does not have.
    """
    home, attributes, slots, cells, names, keys, _, absent = state
    is_fresh = fn.__dict__.pop(FRESH, False)
    if is_native(home):
        if is_fresh:
            _fill(fn, attributes, slots, cells)
            if fn.__globals__ is not vars(sys.modules[home.module]):
                fn.__globals__.update(names)
        return
    if home.is_importable and not home.name:
        if is_fresh:
            _fill(fn, attributes, slots, cells)
            for name, value in names.items():
                fn.__globals__.setdefault(name, value)
        return
    space = space_of(home)
    if is_fresh:
        _fill(fn, attributes, slots, cells)
        if home.name and home.is_origins and "." not in home.name and not home.is_importable:
            space.names[home.name] = fn
        space.received[f"{home.name}()"] = keys.pop("()", None)
    elif home.is_origins and home.name:
        key = keys.pop("()", None)
        if space.received.get(f"{home.name}()", MISSING) != key:
            space.received[f"{home.name}()"] = key
            _update_function(fn, attributes, slots)
    keys.pop("()", None)
    merge(space, names, keys, is_callers=home.is_origins)
    if home.is_origins:
        for name in space.sent.intersection(absent):
            space.sent.discard(name)
            space.received.pop(name, None)
            if name in space.names:
                del space.names[name]
                changed()


def _fill(fn: types.FunctionType, attributes: dict[str, Any], slots: dict[str, Any], cells: Any) -> None:
    fn.__dict__.update(attributes)
    for name, value in slots.items():
        setattr(fn, name, value)
    for mine, sent in zip(fn.__closure__ or (), cells or (), strict=True):
        try:
            mine.cell_contents = sent.cell_contents
        except ValueError:  # it is empty
            continue


def _update_function(fn: types.FunctionType, attributes: dict[str, Any], slots: dict[str, Any]) -> None:
    if not same(fn.__dict__, attributes):
        fn.__dict__.update(attributes)
    for name in ("__defaults__", "__kwdefaults__"):
        if not same(getattr(fn, name), slots[name]):
            setattr(fn, name, slots[name])
            changed()


def make_cached(home: Home, fn: Any, parameters: dict[str, Any]) -> Any:
    """Return a function with a cache: the one that is here if its function is the same, so that its cache stays."""
    known = found(home)
    if type(known) is CACHED and _is_alike(known.__wrapped__, fn) and known.cache_parameters() == parameters:
        _caches.add(known)
        return known
    made = functools.update_wrapper(functools.lru_cache(**parameters)(fn), fn)
    _caches.add(made)
    return made


def _is_alike(one: Any, other: Any) -> bool:
    return bool(getattr(one, "__code__", one) == getattr(other, "__code__", other))


def make_dispatch(home: Home, fn: Any) -> Any:
    """Return a generic function of a single dispatch, to be given its implementations by `fill_dispatch`."""
    known = found(home)
    if is_native(home) and known is not MISSING:
        return known
    made = functools.singledispatch(fn)
    made.__dict__[FRESH] = True
    return made


def fill_dispatch(dispatch: Any, implementations: list[tuple[type, Any]]) -> None:
    """Register the implementations of a generic function that `make_dispatch` made."""
    if dispatch.__dict__.pop(FRESH, False):
        for kind, implementation in implementations:
            dispatch.register(kind, implementation)


def make_dispatch_method(dispatcher: Any, fn: Any) -> Any:
    """Return a generic method of a single dispatch."""
    made = functools.singledispatchmethod(fn)
    made.dispatcher = dispatcher
    return made


def make_cached_property(fn: Any, name: str | None) -> Any:
    """Return a property that is computed once for each instance."""
    made: Any = functools.cached_property(fn)
    if name is not None:
        made.__set_name__(None, name)
    return made


# Classes


def class_id(cls: type) -> str:
    """Return what tells a class from others of its name, in every process."""
    found_id = _class_ids.get(cls)
    if found_id is None:
        found_id = _class_ids[cls] = os.urandom(12).hex()
        _class_by_id[found_id] = cls
    return found_id


def make_class(home: Home, identity: str, maker: Callable[..., type], arguments: tuple[Any, ...]) -> type:
    """Return the class of an identity; of one that was never here, an empty one to be filled."""
    cls = _class_by_id.get(identity)
    if cls is not None:
        return cls
    is_new = _is_worker and home.is_origins and not home.is_importable and not is_native(home)
    known = MISSING if is_new else found(home)
    if isinstance(known, type):
        if home.is_importable and home.is_origins and _is_worker:
            _check_shape(known, home, arguments)
        return known
    cls = _quietly_made(maker, arguments)
    _class_by_id[identity] = cls
    _class_ids[cls] = identity
    _unfilled.add(cls)
    if home.name and home.is_origins and not is_native(home) and not home.is_importable and "." not in home.name:
        space_of(home).names[home.name] = cls
    return cls


class _Quiet:
    """A base that keeps the other bases from hearing of a new class: what they do then was done in the caller."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def _quietly_made(maker: Callable[..., type], arguments: tuple[Any, ...]) -> type:
    """Make a class without ``__init_subclass__`` of its bases, and without ``__new__`` of a metaclass of the script."""
    meta, name, bases, options = (*arguments, None, None, None, None)[:4]
    if not isinstance(meta, type) or not isinstance(options, dict) or not all(isinstance(base, type) for base in bases):
        return maker(*arguments)
    hears = [
        vars(kind)["__init_subclass__"] for base in bases for kind in base.__mro__ if "__init_subclass__" in vars(kind)
    ]
    is_heard = any(hear is not vars(object)["__init_subclass__"] for hear in hears)
    makers = [kind for kind in meta.__mro__ if "__new__" in vars(kind) and not travels_by_value(kind.__module__)]
    try:
        if not is_heard:
            return makers[0].__new__(meta, name, bases, dict(options))
        made: Any = makers[0].__new__(meta, name, (_Quiet, *bases), dict(options))
        made.__bases__ = bases
    except TypeError:  # its layout does not allow it
        return maker(*arguments)
    cls: type = made
    return cls


def _check_shape(cls: Any, home: Home, arguments: tuple[Any, ...]) -> None:
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
            "the caller, so its source was edited after the caller imported it. Import it anew in the caller.",
            module=home.module,
            name=home.name,
        )


def _base_name(base: Any) -> str:
    return getattr(base, "__qualname__", None) or str(base)


def fill_class(
    cls: type, state: tuple[Home, Callable[[type, Any], object], tuple[dict[str, Any], Any], dict[str, Any]]
) -> None:
    """Give a class its attributes; one that was here keeps its own, but for those that the caller has changed.

    Args:
        cls: the class.
        state: where it comes from, what sets all of its attributes, these, and the keys of those that are data.
    """
    home, setter, attributes, keys = state
    if is_native(home):
        return
    sent, own = attributes[0], vars(cls)
    left_out = [name for name, value in sent.items() if type(value) is Kept]
    for name in left_out:
        check_kept(own.get(name, MISSING), sent.pop(name), home.module, f"{home.name}.{name}")
    if cls in _unfilled:  # another thread may be at it as well; whoever needs the class has it whole
        setter(cls, attributes)
        _class_state[cls] = {**dict.fromkeys(attributes[0]), **keys}
        _unfilled.discard(cls)
        return
    if not home.is_origins or not _is_worker or home.origin == token():
        return
    before = _class_state.get(cls)
    known = {} if before is None else before
    for name, value in sent.items():
        mine, key = own.get(name, MISSING), keys.get(name)
        is_new = name in keys and (key is None or known.get(name, MISSING) != key)
        if not is_new and not isinstance(value, (types.FunctionType, classmethod, staticmethod, property, type)):
            continue
        if mine is not value and not same(mine, value):
            setattr(cls, name, value)
            changed()
        if type(value) is CACHED:
            note_cache(value)
    # At the beginning of a run a class has no other attributes than the caller's; later, tasks may have added some.
    gone = (own.keys() if before is None else before.keys()) - sent.keys() - set(left_out)
    for name in gone:
        if name in own and not _is_special(cls, name):
            delattr(cls, name)
            changed()
    _class_state[cls] = {**dict.fromkeys(sent), **keys}


def _is_special(cls: Any, name: str) -> bool:
    """Tell whether an attribute of a class is made for it, by Python or by its metaclass."""
    is_member = name in getattr(cls, "__members__", ())  # of an enumeration
    return (
        is_made(name)
        or is_member
        or isinstance(vars(cls)[name], (types.MemberDescriptorType, types.GetSetDescriptorType, type))
    )


# Values of names


def merge(space: Any, values: Mapping[str, Any], keys: Mapping[str, Any], *, is_callers: bool) -> None:
    """Take in the values of global names.

    Args:
        space: whose names.
        values: what was sent, by name.
        keys: for each, what tells whether the caller has changed it since it last sent it; None: it is code, of which
            the comparison tells.
        is_callers: whether they are the caller's; those of another worker count only where a name is missing.
    """
    names, received = space.names, space.received
    for name, value in values.items():
        key = keys.get(name)
        if name not in names:
            names[name] = value
        elif not is_callers:
            continue
        elif (key is None or received.get(name, MISSING) != key) and not same(names[name], value):
            put(names, name, value)
            changed()
        if is_callers:
            received[name] = key
            space.sent.add(name)


def put(names: dict[str, Any], name: str, value: Any) -> None:
    """Assign a name; a container keeps its identity, as others may refer to it."""
    mine = names.get(name, MISSING)
    if type(mine) is type(value) and mine is not value:
        if type(mine) is dict:
            mine.clear()
            mine.update(value)
            return
        if type(mine) is list:
            mine[:] = value
            return
        if type(mine) is set:
            mine.clear()
            mine.update(value)
            return
        if _is_alike_array(mine, value):
            mine[...] = value
            return
        if is_plain_instance(mine):
            vars(mine).clear()
            vars(mine).update(vars(value))
            return
    names[name] = value


def _is_alike_array(mine: Any, value: Any) -> bool:
    kind = type(mine)
    if (kind.__module__, kind.__name__) != ("numpy", "ndarray"):
        return False
    return bool(mine.flags.writeable and mine.shape == value.shape and mine.dtype == value.dtype)


def changed() -> None:
    """Clear the caches of functions: what they hold may have come from what was before."""
    for cached in list(_caches):
        cached.cache_clear()


def note_cache(cached: Any) -> None:
    """Have a function's cache cleared when what it may depend on changes."""
    _caches.add(cached)


def is_space(names: dict[str, Any]) -> bool:
    """Tell whether a dict is the namespace of a module that another process has."""
    return id(names) in _foreign_origin
