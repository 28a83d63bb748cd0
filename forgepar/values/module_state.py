"""State of the user's modules in the caller, in parts that workers compare with their own modules.

    dependencies of a pickle ──> names of modules ──> code, globals ──> names ──> ... ──> StatePart, StatePart, ...

A function of a module that workers can import is pickled by name. The worker may have another value under that name
than the caller: the module was reloaded, its file was edited, or a global was assigned. So each name that a task can
reach is sent along as a `StatePart`: a function or class by value, data by content. `worker_modules.take_part` compares
it with the worker's value, and replaces that if it differs.

Names are found in the bytecode, as for fingerprints: globals, attributes of modules, and imports in functions. A module
that is used in ways that cannot be followed (``getattr(module, name)``, ``eval``) is sent with all its names. Modules
of libraries are not sent: workers have the same release.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import functools
import itertools
import operator
import pickle
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from forgepar.values.bytecode import Reference, references_of
from forgepar.values.caller_values import KeptAsIs, Key, keep_as_is, type_name
from forgepar.values.comparison import CACHED, MISSING, is_plain_instance, names_in
from forgepar.values.context_variables import Sent, has_value, is_context_variable
from forgepar.values.modules import absolute_name, is_users, package_of, source_of
from forgepar.values.origins import about, token, travels_by_value
from forgepar.values.pickling import Dependencies, dumps_part
from forgepar.values.unchanged import check_of, fields_of, functions_in, large_digest
from forgepar.values.worker_modules import NEW_RUN, source_digest

_FIRST = NEW_RUN - 1
_LARGE = 1 << 20  # bytes; larger data is not looked into at each check, see `ModuleState`
_LARGEST = 16 << 20  # bytes; of larger data only a digest is sent
_ANY_NAME = frozenset(("eval", "exec", "globals", "locals", "vars"))
_BY_ITS_NAME = frozenset(("modules", "__name__"))  # ``sys.modules[__name__]``
_WHOLE = ""  # in place of a name: the whole module

GlobalName = tuple[str, str]  # module and name


@dataclass(slots=True, eq=False)
class StatePart:
    """Value of a name of a module, as it is sent to workers.

    Attributes:
        number: identifier below `NEW_RUN`; it changes when the value changes.
        key: module and name.
        pickled: for `worker_modules.take_part`; empty if nothing has to be sent.
        uses: other names that the value refers to.
        needs: those of ``uses`` that must exist when it is unpickled.
        rank: above the ranks of the parts that it needs, except in cycles.
        is_current: returns whether the name still has the same value.
    """

    number: int
    key: GlobalName
    pickled: bytes
    uses: tuple[GlobalName, ...]
    is_current: Callable[[], bool]
    needs: tuple[GlobalName, ...] = ()
    rank: int = -1


class ModuleState:
    """State parts of one caller, each made when it is first needed.

    Args:
        looks_into_large: whether to detect data of more than 1 MiB that was changed in place, which takes 1 ms per MiB
            at each check. If not, such data counts as unchanged while the name has the same object.

    Example:
        >>> state = ModuleState()
        >>> state.parts_for(roots_of(Dependencies()))
        []
    """

    def __init__(self, *, looks_into_large: bool = True) -> None:
        self._looks_into_large = looks_into_large
        self._parts: dict[GlobalName, StatePart] = {}
        self._numbers = itertools.count(_FIRST, -1)

    def parts_for(self, roots: Iterable[GlobalName], *, renew: bool = False) -> list[StatePart]:
        """Return the parts that have to be sent for some names, and for all names that these refer to.

        Args:
            roots: modules and names.
            renew: make those parts again that are not current.
        """
        return [part for part in self.reached_from(roots, renew=renew) if part.pickled]

    def reached_from(self, roots: Iterable[GlobalName], *, renew: bool = False) -> list[StatePart]:
        """Return the parts for some names and all that these refer to, each after those that it needs."""
        seen: dict[GlobalName, StatePart] = {}
        has_new = False
        left = list(dict.fromkeys(roots))
        while left:
            key = left.pop()
            if key in seen:
                continue
            part = self._parts.get(key)
            if part is None or (renew and not part.is_current()):
                before, part = part, _make(next(self._numbers), key, self._looks_into_large)
                if before is not None and before.pickled == part.pickled:
                    part.number = before.number
                self._parts[key] = part
                has_new = True
            seen[key] = part
            left += part.uses
        if has_new:
            _rank(seen)
        return sorted(seen.values(), key=_rank_of)


_rank_of = operator.attrgetter("rank")


def _rank(parts: Mapping[GlobalName, StatePart]) -> None:
    """Set the rank of each part: the length of the longest chain of parts that it needs."""
    for part in parts.values():
        part.rank = -1
    left = list(parts.values())
    while left:
        part = left[-1]
        needs = [parts[key] for key in part.needs if key in parts]
        new = [need for need in needs if need.rank < 0] if part.rank < 0 else []
        part.rank = max(part.rank, 0)
        if new:
            left += new
        else:
            part.rank = max((need.rank + 1 for need in needs), default=0)
            left.pop()


def pickled_parts(found: Dependencies) -> list[bytes]:
    """Return the parts for the dependencies of a pickle, for `worker_modules.take_part`."""
    return [part.pickled for part in ModuleState().parts_for(roots_of(found))]


def roots_of(found: Dependencies) -> tuple[GlobalName, ...]:
    """Return the names of the user's modules that the dependencies of a pickle refer to."""
    followed: set[str] = set()
    return tuple(dict.fromkeys(itertools.chain(_used_by(found, followed), _named_by(found, followed))))


# Names


def _can_import(module: Any) -> bool:
    return isinstance(module, str) and not travels_by_value(module) and is_users(module)


def _is_made(module: str) -> bool:
    """Return whether a program made a module and put it into `sys.modules`, so that nothing else can import it."""
    return module in sys.modules and module not in ("__main__", "__mp_main__") and travels_by_value(module)


def _used_by(found: Dependencies, followed: set[str]) -> Iterator[GlobalName]:
    """Yield the names that the code of functions refers to."""
    for fn in found.functions:
        for reference in references_of(fn.__code__):
            yield from _of_reference(reference, fn.__globals__, followed)
        home = fn.__globals__.get("__name__")
        if _can_import(home) and vars(sys.modules.get(str(home), types)) is fn.__globals__:
            yield from ((str(home), name) for name in _assigned_in(fn.__code__))
            names = names_in(fn.__code__)
            if "__subclasses__" in names or names >= _BY_ITS_NAME:
                yield str(home), _WHOLE


def _named_by(found: Dependencies, followed: set[str]) -> Iterator[GlobalName]:
    """Yield the names of objects that are pickled by name, except modules that code refers to by attributes."""
    for value in found.named:
        if isinstance(value, types.ModuleType):
            if value.__name__ not in followed and _can_import(value.__name__):
                yield value.__name__, _WHOLE
        else:
            module = str(getattr(value, "__module__", None))
            name = str(getattr(value, "__qualname__", "")).partition(".")[0]
            if name and _can_import(module) and name in vars(sys.modules.get(module, types)):
                yield module, name


@functools.lru_cache(maxsize=4096)
def _assigned_in(code: types.CodeType) -> tuple[str, ...]:
    """Return the globals that code assigns: a worker must get the caller's value before a task assigns its own."""
    names = [step.argval for step in dis.get_instructions(code) if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")]
    inner = [_assigned_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return tuple(dict.fromkeys(itertools.chain(names, *inner)))


def _of_reference(reference: Reference, scope: Mapping[str, Any], followed: set[str]) -> Iterator[GlobalName]:
    """Yield the names that a reference within a function means."""
    if reference.is_import:
        yield from _of_import(reference, package_of(scope))
        return
    home = scope.get("__name__")
    name, *attributes = reference.names
    if name not in scope:
        if _can_import(home) and vars(sys.modules.get(str(home), types)) is scope and not hasattr(builtins, name):
            yield str(home), name  # the caller has deleted it, or a task assigns it
        elif name in _ANY_NAME and _can_import(home):
            yield str(home), _WHOLE
        return
    if _can_import(home) and vars(sys.modules.get(str(home), types)) is scope:
        yield str(home), name
    value = scope[name]
    while isinstance(value, types.ModuleType):
        module = value.__name__
        followed.add(module)
        if not _can_import(module):
            return
        if not attributes or attributes[0] not in vars(value):
            yield module, _WHOLE
            return
        yield module, attributes[0]
        value = vars(value)[attributes.pop(0)]


def _of_import(reference: Reference, package: str) -> Iterator[GlobalName]:
    short, *taken = reference.names
    name = absolute_name(short, reference.level, package)
    if name is None:
        return
    if not _can_import(name):
        if _is_made(name):
            yield name, _WHOLE
        return
    module = sys.modules.get(name)
    if module is None or not taken:
        yield name, _WHOLE
        return
    for part in taken:
        if part in vars(module) and not isinstance(vars(module)[part], types.ModuleType):
            yield name, part
        elif part == "*":
            yield name, _WHOLE
        elif _can_import(f"{name}.{part}") and (f"{name}.{part}" in sys.modules or source_of(f"{name}.{part}")):
            yield f"{name}.{part}", _WHOLE


# Parts


def _part(
    number: int,
    key: GlobalName,
    value: Any,
    pickled: bytes,
    uses: tuple[GlobalName, ...],
    needs: tuple[GlobalName, ...] = (),
    *,
    check: Callable[..., Callable[[], bool]] = check_of,
) -> StatePart:
    """Return the part of a value; ``check`` makes its `StatePart.is_current`, which is called at each submission."""
    module, name = key
    loaded = sys.modules.get(module)
    if loaded is not None and name != _WHOLE:
        has_value, find = check(vars(loaded), name, value), sys.modules.get
        # The module may be removed and imported again: the former one still has the value.
        return StatePart(number, key, pickled, uses, lambda: find(module) is loaded and has_value(), needs)

    def is_current() -> bool:  # never for a module that is not loaded: its source may have been edited
        return loaded is not None and sys.modules.get(module) is loaded and uses == _uses_of_whole(loaded)

    return StatePart(number, key, pickled, uses, is_current, needs)


def _make(number: int, key: GlobalName, looks_into_large: bool) -> StatePart:
    module, name = key
    loaded = sys.modules.get(module)
    if loaded is None:
        return _of_source(number, module)
    if name == _WHOLE and _is_made(module):
        return _make_made(number, key, loaded)
    if name == _WHOLE:
        names = tuple(vars(loaded))
        return _part(number, key, loaded, _pickled("names", loaded, name, names), _uses_of_whole(loaded))
    value = vars(loaded).get(name, MISSING)
    if value is MISSING:
        return _part(number, key, value, _pickled("missing", loaded, name, None), ())
    if isinstance(value, types.ModuleType):
        is_there = value.__name__ in sys.modules and not travels_by_value(value.__name__)
        content = _pickled("module", loaded, name, value.__name__) if is_there else b""
        return _part(number, key, value, content, ())
    if is_context_variable(value):
        return _make_context_variable(number, key, value, loaded)
    found, pickled = _dumps(value, loaded)
    if pickled is None:
        return _make_opaque(number, key, value, loaded)
    followed: set[str] = set()
    used = tuple(_used_by(found, followed))
    needs = tuple(use for use in dict.fromkeys(_named_by(found, followed)) if use != key)
    uses = tuple(use for use in dict.fromkeys(used + needs) if use != key)
    check = functools.partial(
        check_of,
        looks_into=looks_into_large or len(pickled) <= _LARGE,
        without=found.left_out,
        within=found.functions,
    )
    if len(pickled) > _LARGEST:
        try:
            content = _pickled("large", loaded, name, large_digest(value))
        except Exception:
            content = _pickled("opaque", loaded, name, keep_as_is(value))
        return _part(number, key, value, content, uses, needs, check=check)
    content = _pickled("value", loaded, name, (Key(id(value), source_digest(pickled)), pickled))
    return _part(number, key, value, content, uses, needs, check=check)


def _make_context_variable(
    number: int, key: GlobalName, variable: ContextVar[Any], module: types.ModuleType
) -> StatePart:
    """Return the part of a context variable: the value that it has in the context of this thread."""
    value, found = variable.get(MISSING), Dependencies()
    sent: Sent = None
    if value is not MISSING:
        try:
            sent = dumps_part(value, vars(module), found)
        except Exception:
            sent = keep_as_is(value)
    followed: set[str] = set()
    uses = tuple(dict.fromkeys((*_used_by(found, followed), *_named_by(found, followed))))
    has_content = check_of({"": value}, "", value, without=found.left_out, within=found.functions)

    def check(names: Mapping[str, Any], name: str, _value: Any) -> Callable[[], bool]:
        return lambda: names.get(name) is variable and has_value(variable, value) and has_content()

    return _part(number, key, variable, _pickled("context", module, key[1], sent), uses, check=check)


def _make_made(number: int, key: GlobalName, module: types.ModuleType) -> StatePart:
    """Return the part of a module that a program made: all of it, or nothing if some of it cannot be pickled."""
    names = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    found, followed, sent = Dependencies(), set[str](), b""
    with contextlib.suppress(Exception):  # importing it in the worker raises
        pickled = dumps_part(names, vars(module), found)
        sent = _pickled("made", module, _WHOLE, (source_digest(pickled), pickled))
    uses = dict.fromkeys((*_used_by(found, followed), *_named_by(found, followed)))
    # It is never current: any of its names may have changed.
    return StatePart(number, key, sent, tuple([use for use in uses if use != key]), lambda: False)


def _make_opaque(number: int, key: GlobalName, value: Any, module: types.ModuleType) -> StatePart:
    """Return the part of a value that cannot be pickled: the picklable fields of a dict or plain instance, else none.

    The names that its code refers to are compared all the same.
    """
    found = Dependencies()
    found.functions += functions_in(value)
    found.named.append(type(value))
    by_fields = type(value) is dict or is_plain_instance(value)
    if by_fields:
        fields: dict[Any, bytes | KeptAsIs] = {}
        for name, field in fields_of(value).items():
            try:
                fields[name] = dumps_part(field, vars(module), found)
            except Exception:
                found.left_out.append(field)
                fields[name] = keep_as_is(field)
        sent: Any = ("fields", module, key[1], (type_name(value), fields))
    else:
        sent = ("opaque", module, key[1], keep_as_is(value))
    followed: set[str] = set()
    uses = tuple(dict.fromkeys((*_used_by(found, followed), *_named_by(found, followed))))
    try:
        content = _pickled(*sent)
    except Exception:  # the keys of the dict cannot be pickled
        content, by_fields = _pickled("opaque", module, key[1], keep_as_is(value)), False
    check = functools.partial(
        check_of, without=found.left_out, within=found.functions, by_fields=by_fields, looks_into=by_fields
    )
    return _part(number, key, value, content, uses, check=check)


def _dumps(value: Any, module: types.ModuleType) -> tuple[Dependencies, bytes | None]:
    """Pickle a value; a class if necessary without what cannot be pickled in it. None if it cannot be pickled."""
    for leaves_out in (False, True):
        found = Dependencies()
        try:
            pickled = dumps_part(value, vars(module), found, leaves_out=leaves_out)
            found.functions += [fn for part in found.left_out for fn in functions_in(part)]
            return found, pickled
        except Exception:
            if not isinstance(value, type):
                break
    return found, None


def _pickled(kind: str, module: types.ModuleType, name: str, content: Any) -> bytes:
    described = about(vars(module))
    return pickle.dumps((kind, token(), module.__name__, name, described, content), protocol=5)


def _uses_of_whole(module: types.ModuleType) -> tuple[GlobalName, ...]:
    return tuple((module.__name__, name) for name in _own_names(module))


def _own_names(module: types.ModuleType) -> Iterator[str]:
    """Yield the names of a module, except other modules and objects of libraries."""
    for name, value in list(vars(module).items()):
        if name.startswith("__") or isinstance(value, types.ModuleType):
            continue
        is_code = isinstance(value, (types.FunctionType, type)) or type(value) is CACHED
        home = getattr(value, "__module__", None)
        if not is_code or home == module.__name__ or (isinstance(home, str) and is_users(home)):
            yield name


def _of_source(number: int, module: str) -> StatePart:
    """Return the part of a module that the caller has not imported: its source, and the modules that it imports."""
    path = source_of(module)
    key = (module, _WHOLE)
    if path is None or path.suffix != ".py":
        return _part(number, key, None, b"", ())
    try:
        source = path.read_bytes()
    except OSError:
        return _part(number, key, None, b"", ())
    sent: Any = ("source", token(), module, _WHOLE, {}, source_digest(source))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    uses: list[GlobalName] = []
    try:
        code = compile(source, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        code = None
    if code is not None:
        for reference in references_of(code):
            if reference.is_import:
                uses += _of_import(reference, package)
    return _part(number, key, None, pickle.dumps(sent, protocol=5), tuple(dict.fromkeys(uses)))
