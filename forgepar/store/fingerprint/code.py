"""Handlers that digest callables and modules.

    function ──> its bytecode and constants, defaults, closure, and the globals that it refers to, recursively
    module   ──> its compiled source, and the user's modules that it imports, if all of it may be used

Callables and modules of a library are digested by name and release.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any

from forgepar.store.fingerprint.merkle import DIGEST_BYTES, NoDigest, Walk
from forgepar.store.fingerprint.names import name_in_library
from forgepar.store.fingerprint.source import unexplained
from forgepar.values.bytecode import Reference, references_of, steps_of
from forgepar.values.comparison import names_in
from forgepar.values.modules import absolute_name, is_users, package_of, source_of
from forgepar.workflow import context as contexts
from forgepar.workflow.tasks import Task

_OF_MODULE = frozenset(
    ("__builtins__", "__cached__", "__doc__", "__file__", "__loader__", "__name__", "__package__", "__spec__")
)  # globals that describe where a module is and how it was loaded
_ANY_GLOBAL = frozenset(("eval", "exec", "globals"))
_BY_ITS_NAME = frozenset(("modules", "__name__"))  # ``sys.modules[__name__]``
_CODE = (types.FunctionType, types.MethodType, functools.partial, Task, type, classmethod, staticmethod, property)


# Functions


def digest_function(walk: Walk, fn: types.FunctionType) -> None:
    """Digest a function."""
    home = fn.__globals__.get("__name__")  # its __module__ may be that of the function that it wraps
    if home == contexts.__name__:
        walk.ask_context()
    if not is_users(home):
        _digest_from_library(walk, fn, home or "")
        return
    walk.put("function")
    walk.visit(fn.__code__)
    names = names_in(fn.__code__)
    if "__subclasses__" in names or names >= _BY_ITS_NAME:
        walk.visit(whole(str(home)), "its whole module, in which __subclasses__() may find classes")
    walk.visit(fn.__defaults__, "its defaults")
    walk.visit(fn.__kwdefaults__, "its defaults")
    _digest_closure(walk, fn, is_vouched=False)
    for name, value in vars(fn).items():
        if not name.startswith("__"):  # without those of decorators, such as __wrapped__
            walk.put("attribute", name)
            walk.visit(value, f"its attribute {name!r}", is_vouched=True)
    for reference in references_of(fn.__code__):
        if reference.is_import:
            _digest_import(walk, reference, package_of(fn.__globals__))
        else:
            _digest_global(walk, reference.names, fn.__globals__)


def _digest_from_library(walk: Walk, fn: types.FunctionType, home: str) -> None:
    """Digest a library's function by its name; one created within another function also by code and closure."""
    name = fn.__code__.co_qualname
    walk.put("function", name_in_library(home, name))
    if "<" not in name:
        return
    if home == "functools" and name.startswith("singledispatch."):
        registry: Mapping[Any, Any] = fn.registry  # type: ignore[attr-defined]
        for pair in registry.items():  # its closure also has a cache, which changes
            walk.visit(pair)
        return
    walk.visit(fn.__code__)
    walk.visit(fn.__defaults__, is_vouched=True)
    walk.visit(fn.__kwdefaults__, is_vouched=True)
    _digest_closure(walk, fn, is_vouched=True)


def _digest_closure(walk: Walk, fn: types.FunctionType, *, is_vouched: bool) -> None:
    """Digest the closure of a function.

    Args:
        walk: receives the parts.
        fn: the function.
        is_vouched: leave out values that are not code and cannot be compared.
    """
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:
            walk.put("empty cell")
            continue
        is_left = is_vouched and not issubclass(type(value), _CODE)
        walk.visit(value, f"its closure variable {name!r}", is_vouched=is_left)


def _digest_global(walk: Walk, names: tuple[str, ...], scope: Mapping[str, Any]) -> None:
    """Digest what a function refers to by a global name and attributes of it."""
    name, *attributes = names
    if name in _OF_MODULE:
        return
    if name not in scope:  # a builtin, which the bytecode names; or not defined yet
        if name in _ANY_GLOBAL:
            walk.visit(whole(str(scope.get("__name__"))), f"its whole module, which {name}() may use")
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
    """Return the library module that has an object under a name, if the library also has its class: a singleton."""
    module = type(value).__module__
    if not isinstance(module, str) or module in ("builtins", "forgepar") or is_users(module):
        return None
    parts = module.split(".")
    homes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((home for home in homes if getattr(sys.modules.get(home), "__dict__", {}).get(name) is value), None)


def _is_looked_into(module: str) -> bool:
    return module.partition(".")[0] == "forgepar" or is_users(module)


def digest_code(walk: Walk, code: types.CodeType) -> None:
    """Digest code: its steps, and the constants that it loads."""
    steps = steps_of(code)
    walk.put("code", steps.text)
    for constant in steps.constants:
        walk.visit(constant)


def digest_partial(walk: Walk, value: functools.partial[Any]) -> None:
    """Digest a `functools.partial`."""
    walk.put("partial")
    walk.visit(value.func)
    walk.visit(value.args, "its arguments")
    walk.visit(value.keywords, "its arguments")


def digest_method(walk: Walk, value: types.MethodType) -> None:
    """Digest a bound method."""
    walk.put("method")
    walk.visit(value.__func__)
    walk.visit(value.__self__, "its __self__")


def digest_builtin(walk: Walk, value: types.BuiltinFunctionType) -> None:
    """Digest a function that is written in C, or a bound method of an object of a class written in C."""
    owner = value.__self__
    if owner is not None and not isinstance(owner, types.ModuleType):
        walk.put("method", value.__name__)
        walk.visit(owner, "its __self__")
        return
    module = value.__module__ or getattr(owner, "__name__", None) or "builtins"
    if is_users(module):
        walk.put("builtin", value.__qualname__)
        walk.visit(whole(module), "its module")
    else:
        walk.put("builtin", name_in_library(module, value.__qualname__))


def digest_task(walk: Walk, value: Task[..., Any]) -> None:
    """Digest a function with task options; of the options only the version counts."""
    version = value.task_options.version
    walk.put("task")
    walk.visit(version)
    walk.visit(value.fn, is_vouched=version is not None)


def digest_wrapped(walk: Walk, value: Any) -> None:
    """Digest a class method, a static method, or a function with an ``lru_cache``."""
    walk.put("wrapper", type(value).__name__)
    walk.visit(value.__wrapped__)


def digest_property(walk: Walk, value: property | types.DynamicClassAttribute) -> None:
    """Digest a property."""
    walk.put("property")
    for part in (value.fget, value.fset, value.fdel):
        walk.visit(part)


def digest_cached_property(walk: Walk, value: functools.cached_property[Any]) -> None:
    """Digest a `functools.cached_property`."""
    walk.put("property")
    walk.visit(value.func)


# Modules


class Whole:
    """Represents a module as a whole, imported or not; see `whole`."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


@functools.cache
def whole(name: str) -> Whole:
    """Return the `Whole` of a module: one object per name."""
    return Whole(name)


def digest_module(walk: Walk, module: types.ModuleType) -> None:
    """Digest a module of which any part may be used."""
    name = module.__name__
    if name.partition(".")[0] == "forgepar":
        walk.ask_context()
    if is_users(name):
        walk.put("module")
        walk.visit(whole(name))
    else:
        walk.put("module", name_in_library(name, ""))


def digest_whole(walk: Walk, module: Whole) -> None:
    """Digest a user's module by its source, and likewise the user's modules that it imports.

    If the module is loaded, the digest also covers the values in memory that its source does not explain.
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
            walk.visit(value, is_vouched=True)  # without what cannot be compared
    package = module.name if path.name == "__init__.py" else module.name.rpartition(".")[0]
    for reference in references_of(code):
        if reference.is_import:
            _digest_import(walk, reference, package)


def _compiled(source: bytes) -> types.CodeType | None:
    try:
        return compile(source, "<module>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None


def _digest_import(walk: Walk, reference: Reference, package: str) -> None:
    """Digest what an import executes: user modules as a whole, because any part of them may be used."""
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


HANDLERS: dict[type, Callable[[Walk, Any], None]] = {
    types.FunctionType: digest_function,
    types.BuiltinFunctionType: digest_builtin,
    types.MethodType: digest_method,
    types.ModuleType: digest_module,
    types.CodeType: digest_code,
    types.DynamicClassAttribute: digest_property,
    functools.partial: digest_partial,
    functools.cached_property: digest_cached_property,
    type(functools.lru_cache(lambda: None)): digest_wrapped,
    classmethod: digest_wrapped,
    staticmethod: digest_wrapped,
    property: digest_property,
    Task: digest_task,
    Whole: digest_whole,
}


def _with_attributes(handler: Callable[[Walk, Any], None]) -> Callable[[Walk, Any], None]:
    """Return a handler that also digests the attributes of an object of a derived class."""

    def digest_both(walk: Walk, value: Any) -> None:
        handler(walk, value)
        attributes = getattr(value, "__dict__", {})
        walk.visit({name: part for name, part in attributes.items() if not name.startswith("__")})

    return digest_both


BASES: tuple[tuple[type, Callable[[Walk, Any], None]], ...] = (
    (types.ModuleType, digest_module),
    (types.DynamicClassAttribute, digest_property),
    (functools.cached_property, digest_cached_property),
    (Task, digest_task),
    *((kind, _with_attributes(HANDLERS[kind])) for kind in (functools.partial, classmethod, staticmethod, property)),
)
