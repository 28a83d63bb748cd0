"""Takes callables and modules apart, for their digests.

    function ──> its steps and constants, defaults, closure, and what of its module it refers to ──> and so on
    module   ──> its source as compiled, and the modules of the user's that it imports, where all of it may be used

Of a library the names count, and its release.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any

from forgepar.bytecode import Reference, references_of, steps_of
from forgepar.digest_source import unexplained
from forgepar.libraries import absolute_name, is_users, name_in_library, package_of, source_of
from forgepar.merkle import DIGEST_BYTES, NoDigest, Walk
from forgepar.tasks import Task

_OF_MODULE = frozenset(
    ("__builtins__", "__cached__", "__doc__", "__file__", "__loader__", "__name__", "__package__", "__spec__")
)  # globals that tell where a module is and how it was loaded
_ANY_GLOBAL = frozenset(("eval", "exec", "globals"))
_CODE = (types.FunctionType, types.MethodType, functools.partial, Task, type, classmethod, staticmethod, property)


# Functions


def take_function(walk: Walk, fn: types.FunctionType) -> None:
    """Take a function apart."""
    home = fn.__globals__.get("__name__")  # what it says of itself may be what it wraps
    if home == "forgepar.contexts":
        walk.ask_context()
    if not is_users(home):
        _take_from_library(walk, fn, home or "")
        return
    walk.put("function")
    walk.visit(fn.__code__)
    if "__subclasses__" in fn.__code__.co_names:
        walk.visit(whole(str(home)), "all of its module, whose classes __subclasses__() may find")
    walk.visit(fn.__defaults__, "its defaults")
    walk.visit(fn.__kwdefaults__, "its defaults")
    _take_closure(walk, fn, is_vouched=False)
    for reference in references_of(fn.__code__):
        if reference.is_import:
            _take_import(walk, reference, package_of(fn.__globals__))
        else:
            _take_global(walk, reference.names, fn.__globals__)


def _take_from_library(walk: Walk, fn: types.FunctionType, home: str) -> None:
    """Count a library's function by its name; one that was made within another counts with what that gave it."""
    name = fn.__code__.co_qualname
    walk.put("function", name_in_library(home, name))
    if "<" not in name:
        return
    if home == "functools" and name.startswith("singledispatch."):
        registry: Mapping[Any, Any] = fn.registry  # type: ignore[attr-defined]
        for pair in registry.items():  # beside it there is a cache, which changes
            walk.visit(pair)
        return
    walk.visit(fn.__code__)
    walk.visit(fn.__defaults__, is_vouched=True)
    walk.visit(fn.__kwdefaults__, is_vouched=True)
    _take_closure(walk, fn, is_vouched=True)


def _take_closure(walk: Walk, fn: types.FunctionType, *, is_vouched: bool) -> None:
    """Visit what a function closes over; ``is_vouched``: what is not code and cannot be compared does not count."""
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:
            walk.put("empty cell")
            continue
        is_left = is_vouched and not issubclass(type(value), _CODE)
        walk.visit(value, f"{name!r}, which it closes over", is_vouched=is_left)


def _take_global(walk: Walk, names: tuple[str, ...], scope: Mapping[str, Any]) -> None:
    """Visit what a function refers to by a global name, and the attributes taken of it."""
    name, *attributes = names
    if name in _OF_MODULE:
        return
    if name not in scope:  # a builtin, whose name is among the steps; or nothing yet
        if name in _ANY_GLOBAL:
            walk.visit(whole(str(scope.get("__name__"))), f"all of its module, which {name}() may use")
        return
    value = scope[name]
    while attributes and issubclass(type(value), types.ModuleType) and _is_looked_into(value.__name__):
        try:
            value = getattr(value, attributes[0])
        except AttributeError:
            break
        del attributes[0]
    what = f"its global {name!r}"
    home = _library_with(value, name)
    if home is not None:
        walk.put("global", name_in_library(home, name))
        return
    walk.visit(value, what)
    if attributes and type(value) is types.FunctionType and attributes[0] in vars(value):
        walk.visit(vars(value)[attributes[0]], f"{attributes[0]!r} of {what}")


def _library_with(value: Any, name: str) -> str | None:
    """Return the library's module that has an object of a class of its own under a name: one that all share."""
    module = type(value).__module__
    if not isinstance(module, str) or module in ("builtins", "forgepar") or is_users(module):
        return None
    parts = module.split(".")
    homes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((home for home in homes if getattr(sys.modules.get(home), "__dict__", {}).get(name) is value), None)


def _is_looked_into(module: str) -> bool:
    return module.partition(".")[0] == "forgepar" or is_users(module)


def take_code(walk: Walk, code: types.CodeType) -> None:
    """Take code apart: what it does, and the constants that it loads."""
    steps = steps_of(code)
    walk.put("code", steps.text)
    for constant in steps.constants:
        walk.visit(constant)


def take_partial(walk: Walk, value: functools.partial[Any]) -> None:
    """Take a partial call apart."""
    walk.put("partial")
    walk.visit(value.func)
    walk.visit(value.args, "its arguments")
    walk.visit(value.keywords, "its arguments")


def take_method(walk: Walk, value: types.MethodType) -> None:
    """Take a bound method apart."""
    walk.put("method")
    walk.visit(value.__func__)
    walk.visit(value.__self__, "the object that it is a method of")


def take_builtin(walk: Walk, value: types.BuiltinFunctionType) -> None:
    """Take apart a function that is written in C, or a method of something that is."""
    owner = value.__self__
    if owner is not None and not isinstance(owner, types.ModuleType):
        walk.put("method", value.__name__)
        walk.visit(owner, "the object that it is a method of")
        return
    module = value.__module__ or getattr(owner, "__name__", None) or "builtins"
    if is_users(module):
        walk.put("builtin", value.__qualname__)
        walk.visit(whole(module), "its module")
    else:
        walk.put("builtin", name_in_library(module, value.__qualname__))


def take_task(walk: Walk, value: Task[..., Any]) -> None:
    """Take a function apart that has options; of these its version counts."""
    version = value.task_options.version
    walk.put("task")
    walk.visit(version)
    walk.visit(value.fn, is_vouched=version is not None)


def take_wrapped(walk: Walk, value: Any) -> None:
    """Take a class method, a static method or a function with a cache apart."""
    walk.put("wrapper", type(value).__name__)
    walk.visit(value.__wrapped__)


def take_property(walk: Walk, value: property | types.DynamicClassAttribute) -> None:
    """Take a property apart."""
    walk.put("property")
    for part in (value.fget, value.fset, value.fdel):
        walk.visit(part)


def take_cached_property(walk: Walk, value: functools.cached_property[Any]) -> None:
    """Take a property apart that is computed once."""
    walk.put("property")
    walk.visit(value.func)


# Modules


class Whole:
    """Stands for a module as a whole, whether it is imported or not; made by `whole`."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


@functools.cache
def whole(name: str) -> Whole:
    """Return what stands for a module as a whole: one object a name."""
    return Whole(name)


def take_module(walk: Walk, module: types.ModuleType) -> None:
    """Take a module apart of which it is not told what is used."""
    name = module.__name__
    if name.partition(".")[0] == "forgepar":
        walk.ask_context()
    if is_users(name):
        walk.put("module")
        walk.visit(whole(name))
    else:
        walk.put("module", name_in_library(name, ""))


def take_whole(walk: Walk, module: Whole) -> None:
    """Take a module of the user's apart by its source, and so all of the user's that it imports.

    One that is loaded counts by what it has in memory as well, as far as its source does not explain that.
    """
    path = source_of(module.name)
    loaded = sys.modules.get(module.name)
    if path is None:
        if loaded is not None and not hasattr(loaded, "__path__"):
            raise NoDigest(f"the module {module.name!r} has no file")
        walk.put("no source")
        return
    try:
        source = path.read_bytes()
    except OSError as error:
        raise NoDigest(f"the module {module.name!r} cannot be read ({error.strerror})") from None
    code = _compiled(source) if path.suffix == ".py" else None
    if code is None:
        walk.put("source", blake2b(source, digest_size=DIGEST_BYTES).digest())
        return
    walk.put("source")
    walk.visit(code)
    if loaded is not None:
        for name, value in unexplained(loaded, source, code):
            walk.put("name", name)
            walk.visit(value, is_vouched=True)  # what cannot be compared does not count
    package = module.name if path.name == "__init__.py" else module.name.rpartition(".")[0]
    for reference in references_of(code):
        if reference.is_import:
            _take_import(walk, reference, package)


def _compiled(source: bytes) -> types.CodeType | None:
    try:
        return compile(source, "<module>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None


def _take_import(walk: Walk, reference: Reference, package: str) -> None:
    """Count what an import executes: modules of the user's as a whole, as it is not told what of them is used."""
    short, *taken = reference.names
    name = absolute_name(short, reference.level, package)
    if name is None:
        return
    if name.partition(".")[0] == "forgepar":
        walk.ask_context()
    if not is_users(name):
        walk.put("import", name_in_library(name, ""))
        return
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        walk.visit(whole(".".join(parts[:n])))
    for submodule in (f"{name}.{part}" for part in taken):
        if source_of(submodule) is not None:
            walk.visit(whole(submodule))


TAKERS: dict[type, Callable[[Walk, Any], None]] = {
    types.FunctionType: take_function,
    types.BuiltinFunctionType: take_builtin,
    types.MethodType: take_method,
    types.ModuleType: take_module,
    types.CodeType: take_code,
    types.DynamicClassAttribute: take_property,
    functools.partial: take_partial,
    functools.cached_property: take_cached_property,
    type(functools.lru_cache(lambda: None)): take_wrapped,
    classmethod: take_wrapped,
    staticmethod: take_wrapped,
    property: take_property,
    Task: take_task,
    Whole: take_whole,
}


def _with_attributes(take: Callable[[Walk, Any], None]) -> Callable[[Walk, Any], None]:
    """Return what also takes the attributes that an object of a derived class has."""

    def take_both(walk: Walk, value: Any) -> None:
        take(walk, value)
        attributes = getattr(value, "__dict__", {})
        walk.visit({name: part for name, part in attributes.items() if not name.startswith("__")})

    return take_both


BASES: tuple[tuple[type, Callable[[Walk, Any], None]], ...] = (
    (types.ModuleType, take_module),
    (types.DynamicClassAttribute, take_property),
    (functools.cached_property, take_cached_property),
    (Task, take_task),
    *((kind, _with_attributes(TAKERS[kind])) for kind in (functools.partial, classmethod, staticmethod, property)),
)
