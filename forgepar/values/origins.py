"""Where functions and classes come from, and the namespace that stands for their module in this process.

All functions of one module share one dict of globals per process, whichever message brought them, so that a name that
one assigns is read by another, as in the caller. Which dict that is depends on the process:

- The process that the pickle comes from has the module itself.
- A worker of forgepar gets a module object in `sys.modules` for a script, or for a module that cannot be imported.
- Any other process (a Dask worker, a program that reads a run store) gets a dict that only this module knows.
"""

from __future__ import annotations

import builtins
import importlib
import os
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from forgepar.values.comparison import MISSING

_ABOUT = ("__name__", "__package__", "__path__", "__file__")  # for relative imports, and code that reads `__file__`
_RANDOM = os.urandom(8).hex()


class Home(NamedTuple):
    """Origin of a function or class. Stores have pickles of it, so its fields stay as they are.

    Attributes:
        origin: `token` of the process that has the module itself.
        module: the module's name.
        name: qualified name within the module; "" if the module does not have the object under that name.
        about: ``__name__``, ``__file__`` and the like of the module.
        is_importable: whether other processes can import the module.
        is_origins: whether the process that pickled the object is the origin, so that its state is the caller's.
    """

    origin: str
    module: str
    name: str
    about: Mapping[str, Any]
    is_importable: bool
    is_origins: bool


class Namespace:
    """The names of a module, and which values the caller is known to have in it.

    Attributes:
        module: the module.
        names: its ``__dict__``.
        received: by name, the key of the value that the caller sent last in this run.
        sent: all names that the caller ever sent.
        identities: by name, the id that the object had in the caller when it was last sent.
    """

    def __init__(self, module: types.ModuleType) -> None:
        self.module = module
        self.names = vars(module)
        self.received: dict[str, Any] = {}
        self.sent: set[str] = set()
        self.identities: dict[str, int] = {}


is_worker = False  # whether this process is a worker of forgepar; `become_worker` sets it
_namespaces: dict[tuple[str, str], Namespace] = {}
_foreign_origin: dict[int, str] = {}  # by id of a namespace's dict
_hidden: list[types.ModuleType] = []  # modules replaced in `sys.modules`; kept alive, as others may refer to them
_by_value: set[str] = set()


def token() -> str:
    """Return an identifier of this process among all that pickles may come from; a forked child has another one."""
    return f"{_RANDOM}-{os.getpid()}"


def become_worker() -> None:
    """Mark this process as a worker of forgepar, so that scripts of the caller get a module in `sys.modules`."""
    global is_worker  # there is one worker per process
    is_worker = True
    _namespaces.clear()
    _foreign_origin.clear()


def forget_received() -> None:
    """Forget which values the caller sent, so that the next ones are compared with those of this process."""
    for namespace in _namespaces.values():
        namespace.received.clear()


def origin_of(names: dict[str, Any]) -> str:
    """Return the `token` of the process that has the module of a namespace; this one's own for its own modules."""
    return _foreign_origin.get(id(names)) or token()


def about(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a module's namespace that describe the module itself."""
    entries = {name: names[name] for name in _ABOUT if name in names}
    if "__path__" in entries:
        entries["__path__"] = list(entries["__path__"])  # that of a namespace package cannot be pickled
    return entries


def send_by_value(module: str) -> None:
    """Pickle the functions and classes of a module by value, so that other processes do not import it."""
    _by_value.add(module)


def travels_by_value(module: str) -> bool:
    """Return whether functions and classes of a module are pickled by value: other processes cannot import it."""
    if module in ("__main__", "__mp_main__") or module in _by_value:
        return True
    loaded = sys.modules.get(module)
    return loaded is not None and getattr(loaded, "__spec__", None) is None and not hasattr(loaded, "__file__")


def namespace_of(home: Home) -> Namespace:
    """Return the namespace that stands for a module of another process; make it on first use."""
    key = (home.origin if not is_worker else "", home.module)
    namespace = _namespaces.get(key)
    is_replaced = (
        namespace is not None
        and is_worker
        and home.is_importable
        and sys.modules.get(home.module) not in (namespace.module, None)  # the module was imported again
    )
    if namespace is None or is_replaced:
        namespace = _namespaces[key] = Namespace(sys.modules[home.module] if is_replaced else _module(home))
        _foreign_origin[id(namespace.names)] = home.origin
    return namespace


def is_namespace(names: dict[str, Any]) -> bool:
    """Return whether a dict is the namespace of a module of another process."""
    return id(names) in _foreign_origin


def _module(home: Home) -> types.ModuleType:
    """Import the module of a namespace if that is possible, or make it."""
    if home.is_importable:
        return importlib.import_module(home.module)
    module = types.ModuleType(home.module)
    vars(module).update(home.about, __builtins__=builtins)
    _by_value.add(home.module)
    if is_worker:
        before = sys.modules.get(home.module)
        if before is not None:
            _hidden.append(before)
        sys.modules[home.module] = module
    return module


def is_native(home: Home) -> bool:
    """Return whether this process is the origin and so has the module itself."""
    return home.origin == token() and home.module in sys.modules


def globals_for(home: Home, wanted: Iterable[str] = ()) -> dict[str, Any]:
    """Return the globals for a function.

    Args:
        home: where the function comes from.
        wanted: names that it refers to. If this process has the module itself but lacks one of these names, the
            function gets globals of its own: reading a value must not assign names in the caller's module.
    """
    if is_native(home):
        names = vars(sys.modules[home.module])
        return names if names.keys() >= set(wanted) else {**home.about, "__builtins__": builtins}
    if home.is_importable and not home.name and not wanted:
        return {**home.about, "__builtins__": builtins}
    return namespace_of(home).names


def existing(home: Home) -> Any:
    """Return the object that this process has under the name in the module, or `MISSING`."""
    if not home.name:
        return MISSING
    module = sys.modules.get(home.module)
    if is_native(home):
        names = vars(module)
    elif is_worker or module is None or not (home.is_importable or _has_same_file(module, home)):
        names = namespace_of(home).names
    else:  # a program that reads values of another one
        names = vars(module)
    first, *rest = home.name.split(".")
    value = names.get(first, MISSING)
    for part in rest:
        value = MISSING if value is MISSING else getattr(value, part, MISSING)
    return value


def _has_same_file(module: types.ModuleType, home: Home) -> bool:
    """Return whether a script that runs here has the file that the object comes from."""
    here, there = getattr(module, "__file__", None), home.about.get("__file__")
    return here is not None and there is not None and os.path.abspath(here) == os.path.abspath(there)  # noqa: PTH100
