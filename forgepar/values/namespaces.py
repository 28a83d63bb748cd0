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
import contextlib
import functools
import importlib
import os
import pickle
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from importlib.machinery import ModuleSpec
from typing import Any, NamedTuple

from forgepar.errors import CodeMismatch

NEW_RUN = -1  # the number of the part that has a worker forget what it was sent for earlier runs
MISSING = object()
ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes))
CACHED = type(functools.lru_cache(lambda: None))
_FRESH = "__forgepar_fresh__"
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


class _Space:
    """The namespace of a module, and what the caller was known to have in it."""

    def __init__(self, module: types.ModuleType, origin: str) -> None:
        self.module = module
        self.names = vars(module)
        self.origin = origin
        self.received: dict[str, Any] = {}


_spaces: dict[tuple[str, str], _Space] = {}
_foreign_origin: dict[int, str] = {}  # of dicts that belong to spaces, by id
_class_ids: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()
_class_by_id: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
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
    _pending.clear()
    _expected_sources.clear()


def origin_of(names: dict[str, Any]) -> str:
    """Return the process whose module a namespace of this process stands for; `token` for this one's own modules."""
    return _foreign_origin.get(id(names)) or token()


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


def _space(home: Home) -> _Space:
    key = (home.origin if not _is_worker else "", home.module)
    space = _spaces.get(key)
    if space is None:
        space = _spaces[key] = _Space(_module(home), home.origin)
        _foreign_origin[id(space.names)] = home.origin
    elif _is_worker and home.is_importable and sys.modules.get(home.module) not in (space.module, None):
        space = _spaces[key] = _Space(sys.modules[home.module], home.origin)  # it was imported anew
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
        return names if names.keys() >= set(wanted) else dict(home.about)
    return _space(home).names


def found(home: Home) -> Any:
    """Return what this process has under the name in the module, `MISSING` if nothing."""
    if not home.name:
        return MISSING
    module = sys.modules.get(home.module)
    if is_native(home):
        names = vars(module)
    elif _is_worker or module is None or not (home.is_importable or _is_of_file(module, home)):
        names = _space(home).names
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
    made.__dict__[_FRESH] = True
    return made


def fill_function(fn: types.FunctionType, state: tuple[Any, ...]) -> None:
    """Give a function its defaults, its closure and its globals.

    Args:
        fn: the function.
        state: its `Home`, its attributes, what is set by attribute, its cells, its globals by name, the keys of values
            that the caller may change (see `merge`; "()" is that of its defaults), and modules that it needs loaded.
    """
    home, attributes, slots, cells, names, keys, _ = state
    is_fresh = fn.__dict__.pop(_FRESH, False)
    if is_native(home):
        if is_fresh:
            _fill(fn, attributes, slots, cells)
            if fn.__globals__ is not vars(sys.modules[home.module]):
                fn.__globals__.update(names)
        return
    space = _space(home)
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
    made.__dict__[_FRESH] = True
    return made


def fill_dispatch(dispatch: Any, implementations: list[tuple[type, Any]]) -> None:
    """Register the implementations of a generic function that `make_dispatch` made."""
    if dispatch.__dict__.pop(_FRESH, False):
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
    cls = maker(*arguments)
    _class_by_id[identity] = cls
    _class_ids[cls] = identity
    _class_state[cls] = {_FRESH: True}
    if home.name and home.is_origins and not is_native(home) and not home.is_importable and "." not in home.name:
        _space(home).names[home.name] = cls
    return cls


def _check_shape(cls: type, home: Home, arguments: tuple[Any, ...]) -> None:
    """Refuse a class of this process that has other bases or slots than the caller's, and cannot be given these."""
    _, _, bases, options, *_ = arguments
    if isinstance(options, dict):
        slots = options.get("__slots__", MISSING)
        mine = vars(cls).get("__slots__", MISSING)
        names = [getattr(base, "__qualname__", str(base)) for base in vars(cls).get("__orig_bases__", cls.__bases__)]
        if not same(mine, slots) or names != [getattr(base, "__qualname__", str(base)) for base in bases]:
            raise CodeMismatch(
                f"class {home.name!r} of module {home.module!r} has other bases or slots in this worker than in the "
                "caller, so its source was edited after the caller imported it. Import it anew in the caller.",
                module=home.module,
                name=home.name,
            )


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
    before = _class_state.get(cls)
    if before is not None and before.pop(_FRESH, False):
        setter(cls, attributes)
        _class_state[cls] = dict(keys)
        return
    if not home.is_origins or not _is_worker or home.origin == token():
        return
    if before is None:
        before = _class_state[cls] = {}
    sent = attributes[0]
    for name, key in keys.items():
        if before.get(name, MISSING) != key and not same(vars(cls).get(name, MISSING), sent[name]):
            setattr(cls, name, sent[name])
            changed()
    for name, value in sent.items():
        if isinstance(value, (types.FunctionType, classmethod, staticmethod, property)):
            mine = vars(cls).get(name, MISSING)
            if mine is not value and not same(mine, value):
                setattr(cls, name, value)
                changed()
    for name in before.keys() - keys.keys():
        if name in vars(cls):
            delattr(cls, name)
            changed()
    before.clear()
    before.update(keys)


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
        if is_plain_instance(mine):
            vars(mine).clear()
            vars(mine).update(vars(value))
            return
    names[name] = value


def changed() -> None:
    """Clear the caches of functions: what they hold may have come from what was before."""
    for cached in list(_caches):
        cached.cache_clear()


def note_cache(cached: Any) -> None:
    """Have a function's cache cleared when what it may depend on changes."""
    _caches.add(cached)


# What the caller has in modules that this process can import


def take_part(data: bytes) -> None:
    """Make a name of a module in this worker what it is in the caller: now, or once something imports the module.

    Raises:
        CodeMismatch: it cannot be made so.
        Exception: whatever unpickling the value raises.
    """
    part = pickle.loads(data)
    kind, origin, module, _, _, content = part
    if origin == token():
        return
    if kind == "source":
        _expect_source(module, content)
    elif module in sys.modules:
        _apply(part)
    else:
        _watch_imports()
        _pending.setdefault(module, []).append(part)


def _apply(part: tuple[Any, ...]) -> None:
    kind, origin, module, name, about, content = part
    space = _space(Home(origin, module, name, about, True, True))
    names, mine = space.names, space.names.get(name, MISSING)
    if kind == "value":
        key, pickled = content
        if name in names and space.received.get(name, MISSING) == key:
            return
        value = pickle.loads(pickled)
        if mine is not value and not same(mine, value):
            if not _patched(mine, value):
                put(names, name, value)
            changed()
        space.received[name] = key
        if type(value) is CACHED:
            _caches.add(value)
    elif kind == "module":
        if getattr(mine, "__name__", None) != content or not isinstance(mine, types.ModuleType):
            names[name] = importlib.import_module(content)
    elif kind == "large":
        if mine is MISSING or large_digest(mine) != content:
            raise CodeMismatch(
                f"{name!r} of module {module!r} is another value in this worker than in the caller, and too large to "
                "be sent with the code. Give it to the task as an argument.",
                module=module,
                name=name,
            )
    elif kind == "opaque" and type_name(mine) != content:
        here = "not defined" if mine is MISSING else f"a {type_name(mine)}"
        warnings.warn(
            f"{name!r} of module {module!r} is a {content} in the caller, which cannot be pickled, and {here} in this "
            "worker. Make it inside the task, or where the module is imported.",
            RuntimeWarning,
            stacklevel=2,
        )


def _patched(mine: Any, value: Any) -> bool:
    """Give a function of this process the code of the caller's, if it is that; others may refer to it."""
    if hasattr(type(mine), "__forgepar_named__") and type(mine) is type(value):
        return bool(mine.task_options == value.task_options) and _patched(mine.fn, value.fn)
    if (
        type(mine) is not types.FunctionType
        or type(value) is not types.FunctionType
        or mine.__globals__ is not value.__globals__
        or mine.__qualname__ != value.__qualname__
        or len(mine.__closure__ or ()) != len(value.__closure__ or ())
    ):
        return False
    mine.__code__ = value.__code__
    mine.__defaults__, mine.__kwdefaults__ = value.__defaults__, value.__kwdefaults__
    mine.__dict__.clear()
    mine.__dict__.update(value.__dict__)
    mine.__doc__, mine.__annotations__ = value.__doc__, value.__annotations__
    for cell, sent in zip(mine.__closure__ or (), value.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # it is empty
            cell.cell_contents = sent.cell_contents
    return True


def large_digest(value: Any) -> bytes:
    """Return a digest of a value's pickle; buffers are read where they are."""
    from hashlib import blake2b

    digest = blake2b(digest_size=16)
    buffers: list[pickle.PickleBuffer] = []
    digest.update(pickle.dumps(value, protocol=5, buffer_callback=buffers.append))
    for buffer in buffers:
        digest.update(buffer.raw())
    return digest.digest()


def type_name(value: Any) -> str:
    """Return the qualified name of a value's class."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


# Modules that this worker imports later

_pending: dict[str, list[tuple[Any, ...]]] = {}  # parts of modules that nothing has imported yet
_expected_sources: dict[str, bytes] = {}  # of modules that the caller has not imported
_loaded_sources: dict[str, bytes] = {}


def _expect_source(module: str, digest: bytes) -> None:
    """Have a module imported only from source of this digest; one that is here from other source is forgotten."""
    _watch_imports()
    _expected_sources[module] = digest
    if module in sys.modules and _loaded_sources.get(module) != digest:
        for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
            parent, _, last = name.rpartition(".")
            vars(sys.modules.get(parent, types.SimpleNamespace())).pop(last, None)
            del sys.modules[name]
        importlib.invalidate_caches()


def _watch_imports() -> None:
    """Look at what is imported from now on. This process is forgepar's own."""
    if not any(type(finder) is _Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the modules that the caller's parts, or an expected source, are for."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _pending and name not in _expected_sources:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)  # type: ignore[assignment]  # all that an import asks of one
                return spec
        if name in _pending:  # its file is gone since the caller imported it; what the caller has of it is here
            about = _pending[name][0][4]
            return ModuleSpec(name, _Loader(None), is_package="__path__" in about)  # type: ignore[arg-type]
        return None


class _Loader:
    """Loads a module by its own loader, and makes it what the caller has.

    Args:
        loader: the module's own.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec) if self._loader is not None else None

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        if name in _expected_sources:
            self._exec_source(module)
        elif self._loader is not None:
            module.__loader__ = self._loader
            if module.__spec__ is not None:
                module.__spec__.loader = self._loader
            try:
                self._loader.exec_module(module)
            except CodeMismatch:
                raise
            except Exception:
                if name not in _pending:
                    raise  # else it was broken since the caller imported it
        if name in _pending:
            for attribute, value in _pending[name][0][4].items():
                vars(module).setdefault(attribute, value)
        for part in _pending.pop(name, ()):
            _apply(part)

    def _exec_source(self, module: types.ModuleType) -> None:
        name, path = module.__name__, getattr(self._loader, "path", None)
        if path is None or not str(path).endswith(".py"):
            self._loader.exec_module(module)
            return
        source = self._loader.get_data(path)
        _loaded_sources[name] = source_digest(source)
        if _expected_sources[name] != _loaded_sources[name]:
            raise CodeMismatch(
                f"the source of module {name!r} was edited after the run began. Run the workflow again.", module=name
            )
        exec(compile(source, path, "exec", dont_inherit=True), vars(module))  # noqa: S102  (as an import does)


def source_digest(source: bytes) -> bytes:
    """Return the digest of a module's source."""
    from hashlib import blake2b

    return blake2b(source, digest_size=16).digest()


# Comparison


def same(one: Any, other: Any) -> bool:
    """Tell whether two values are the same by type and content, functions by code, defaults and closure."""
    try:
        return _same(one, other, set())
    except RecursionError:
        return False


def _same(one: Any, other: Any, seen: set[tuple[int, int]]) -> bool:
    kind = type(one)
    if one is other:
        return True
    if kind is not type(other):
        return False
    if kind in ATOMS:
        return bool(one == other) if kind not in (float, complex) else repr(one) == repr(other)
    pair = (id(one), id(other))
    if pair in seen:
        return True
    seen.add(pair)
    if kind in (list, tuple):
        return len(one) == len(other) and all(_same(a, b, seen) for a, b in zip(one, other, strict=True))
    if kind is dict:
        return _same(list(one), list(other), seen) and all(_same(one[key], other[key], seen) for key in one)
    if kind in (set, frozenset):
        return bool(one == other) and sorted(map(_typed, one)) == sorted(map(_typed, other))
    return _same_object(one, other, seen)


def _typed(value: Any) -> str:
    return f"{type(value).__name__} {value!r}" if type(value) in ATOMS else type(value).__name__


def _same_object(one: Any, other: Any, seen: set[tuple[int, int]]) -> bool:
    if isinstance(one, types.FunctionType):
        return (
            one.__code__ == other.__code__
            and one.__qualname__ == other.__qualname__
            and _same(one.__defaults__, other.__defaults__, seen)
            and _same(one.__kwdefaults__, other.__kwdefaults__, seen)
            and _same(cells_of(one), cells_of(other), seen)
            and _same(_without_wrapped(one), _without_wrapped(other), seen)
        )
    if isinstance(one, (classmethod, staticmethod)):
        return _same(one.__func__, other.__func__, seen)
    if isinstance(one, property):
        return all(_same(getattr(one, part), getattr(other, part), seen) for part in ("fget", "fset", "fdel"))
    if type(one) is CACHED:
        return bool(one.cache_parameters() == other.cache_parameters()) and _same(
            one.__wrapped__, other.__wrapped__, seen
        )
    if isinstance(one, functools.partial):
        return all(_same(getattr(one, part), getattr(other, part), seen) for part in ("func", "args", "keywords"))
    if isinstance(one, (type, types.ModuleType)):
        return False
    if hasattr(type(one), "__forgepar_named__"):  # a function with options
        return _same(one.fn, other.fn, seen) and bool(one.task_options == other.task_options)
    if is_plain_instance(one):
        return _same(vars(one), vars(other), seen)
    try:
        return pickle.dumps(one, protocol=5) == pickle.dumps(other, protocol=5)
    except Exception:
        return False


def is_plain_instance(value: Any) -> bool:
    """Tell whether an object is no more than what its `__dict__` holds."""
    kind: Any = type(value)
    return bool(
        kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and getattr(kind, "__getstate__", None) is getattr(object, "__getstate__", None)
        and not hasattr(kind, "__setstate__")
        and not hasattr(kind, "__getnewargs_ex__")
        and not hasattr(kind, "__getnewargs__")
        and hasattr(value, "__dict__")
        and all(not base.__dict__.get("__slots__") for base in kind.__mro__)
        and kind.__basicsize__ <= _PLAIN.__basicsize__
    )


class _PLAIN:
    """An instance of it has a `__dict__` and can be referred to weakly, and nothing else."""


def is_space(names: dict[str, Any]) -> bool:
    """Tell whether a dict is the namespace of a module that another process has."""
    return id(names) in _foreign_origin


def cells_of(fn: types.FunctionType) -> list[Any]:
    """Return what a function closes over, `MISSING` for an empty cell."""
    found_values = []
    for cell in fn.__closure__ or ():
        try:
            found_values.append(cell.cell_contents)
        except ValueError:
            found_values.append(MISSING)
    return found_values


def _without_wrapped(fn: types.FunctionType) -> dict[str, Any]:
    return {name: value for name, value in vars(fn).items() if name not in ("__wrapped__", _FRESH)}
