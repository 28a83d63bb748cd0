"""What tasks refer to in the user's modules, as the caller has it, in parts that workers compare with their own.

    what a pickler found ──> names of modules ──> code, globals ──> names ──> ... ──> Part, Part, ...

A function of a module that workers can import travels by its name. What the worker has under that name may differ from
what the caller has: the module was reloaded, its file was edited, a global was assigned. So each name that a task can
reach goes along as a `Part`: a function or class by value, data by content. `worker_modules.take_part` compares, and
takes the caller's where there is a difference.

Names are found in the bytecode, as fingerprints find them: globals, attributes of modules, imports within functions. A
module used in ways that cannot be followed (``getattr(module, name)``, ``eval``) goes along with all its names. Modules
of libraries do not: their release is the same.
"""

from __future__ import annotations

import builtins
import dis
import functools
import itertools
import operator
import pickle
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from forgepar.bytecode import Reference, references_of
from forgepar.libraries import absolute_name, is_users, package_of, source_of
from forgepar.pickling import Found, dumps_part
from forgepar.values import namespaces
from forgepar.values.comparison import CACHED, MISSING, is_plain_instance
from forgepar.values.current import check_of, fields_of, functions_in, large_digest
from forgepar.values.namespaces import Kept, kept, type_name
from forgepar.values.worker_modules import NEW_RUN, source_digest

_FIRST = NEW_RUN - 1
_LARGE = 1 << 20  # bytes of a value that not every look goes into; see `ModuleState`
_LARGEST = 16 << 20  # bytes of a value that goes along; of a larger one its digest does
_ANY_NAME = frozenset(("eval", "exec", "globals", "locals", "vars"))
_WHOLE = ""  # in place of a name: all of the module

Key = tuple[str, str]


class Part:
    """A name of a module.

    Attributes:
        number: below `NEW_RUN`; another one whenever the value has changed.
        key: module and name.
        pickled: for `worker_modules.take_part`; empty where nothing need be sent.
        uses: other names that it refers to.
        needs: those of them that must be there for it to be unpickled.
        rank: above that of each part it needs, but for needs in a circle.
        is_current: tells whether the module has the same under the name as when this was made.
    """

    __slots__ = ("is_current", "key", "needs", "number", "pickled", "rank", "uses")

    def __init__(
        self,
        number: int,
        key: Key,
        value: Any,
        pickled: bytes,
        uses: tuple[Key, ...],
        needs: tuple[Key, ...] = (),
        *,
        check: Callable[..., Callable[[], bool]] = check_of,
    ) -> None:
        self.number = number
        self.key = key
        self.pickled = pickled
        self.uses = uses
        self.needs = needs
        self.rank = -1
        self.is_current = _check_of(key, value, uses, check)


class ModuleState:
    """The parts of one caller; each is made when it is first needed.

    Args:
        looks_into_large: whether to see that data of more than 1 MiB was changed in place, which takes 1 ms per MiB at
            each look. Without, such data is taken to be the same as long as the name has the same object.

    Example:
        >>> state = ModuleState()
        >>> state.parts_for(roots_of(Found()))
        []
    """

    def __init__(self, *, looks_into_large: bool = True) -> None:
        self._looks_into_large = looks_into_large
        self._parts: dict[Key, Part] = {}
        self._numbers = itertools.count(_FIRST, -1)

    def parts_for(self, roots: Iterable[Key], *, anew: bool = False) -> list[Part]:
        """Return the parts of some names and of all that these refer to, of which something has to be sent.

        Args:
            roots: modules and names.
            anew: make those again that are not current.
        """
        return [part for part in self.reached_from(roots, anew=anew) if part.pickled]

    def reached_from(self, roots: Iterable[Key], *, anew: bool = False) -> list[Part]:
        """Return the parts of some names and of all that these refer to, each after what it needs; see `parts_for`."""
        seen: dict[Key, Part] = {}
        has_new = False
        left = list(dict.fromkeys(roots))
        while left:
            key = left.pop()
            if key in seen:
                continue
            part = self._parts.get(key)
            if part is None or (anew and not part.is_current()):
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


def _rank(parts: Mapping[Key, Part]) -> None:
    """Rank parts by the longest chain of needs below each."""
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


def pickled_parts(found: Found) -> list[bytes]:
    """Return the parts of what a pickler found, for `worker_modules.take_part`."""
    return [part.pickled for part in ModuleState().parts_for(roots_of(found))]


def roots_of(found: Found) -> tuple[Key, ...]:
    """Return the names of the user's modules that what a pickler found refers to."""
    followed: set[str] = set()
    return tuple(dict.fromkeys(itertools.chain(_used_by(found, followed), _named_by(found, followed))))


def _check_of(
    key: Key, value: Any, uses: tuple[Key, ...], check: Callable[..., Callable[[], bool]]
) -> Callable[[], bool]:
    """Return what tells whether a module still has a value under a name; it is called at each submission."""
    module, name = key
    loaded = sys.modules.get(module)
    if loaded is None:
        return lambda: False  # its source may have been edited
    if name == _WHOLE:
        return lambda: sys.modules.get(module) is loaded and uses == _uses_of_whole(loaded)
    return check(vars(loaded), name, value)


# Names


def _can_import(module: Any) -> bool:
    return isinstance(module, str) and not namespaces.travels_by_value(module) and is_users(module)


def _used_by(found: Found, followed: set[str]) -> Iterator[Key]:
    """Yield the names that the code of functions refers to."""
    for fn in found.functions:
        for reference in references_of(fn.__code__):
            yield from _of_reference(reference, fn.__globals__, followed)
        home = fn.__globals__.get("__name__")
        if _can_import(home) and vars(sys.modules.get(str(home), types)) is fn.__globals__:
            yield from ((str(home), name) for name in _assigned_in(fn.__code__))


def _named_by(found: Found, followed: set[str]) -> Iterator[Key]:
    """Yield the names that a pickle holds in place of objects; modules that code follows are left to that."""
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
    """Return the globals that code assigns: a worker is to have the caller's before a task or initializer does."""
    names = [step.argval for step in dis.get_instructions(code) if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")]
    inner = [_assigned_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return tuple(dict.fromkeys(itertools.chain(names, *inner)))


def _of_reference(reference: Reference, scope: Mapping[str, Any], followed: set[str]) -> Iterator[Key]:
    """Yield the names that a reference within a function means."""
    if reference.is_import:
        yield from _of_import(reference, package_of(scope))
        return
    home = scope.get("__name__")
    name, *attributes = reference.names
    if name not in scope:
        if _can_import(home) and vars(sys.modules.get(str(home), types)) is scope and not hasattr(builtins, name):
            yield str(home), name  # the caller has deleted it, or a task is to assign it
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


def _of_import(reference: Reference, package: str) -> Iterator[Key]:
    short, *taken = reference.names
    name = absolute_name(short, reference.level, package)
    if name is None:
        return
    if not _can_import(name):
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


def _make(number: int, key: Key, looks_into_large: bool) -> Part:
    module, name = key
    loaded = sys.modules.get(module)
    if loaded is None:
        return _of_source(number, module)
    if name == _WHOLE:
        names = tuple(vars(loaded))
        return Part(number, key, loaded, _pickled("names", loaded, name, names), _uses_of_whole(loaded))
    value = vars(loaded).get(name, MISSING)
    if value is MISSING:
        return Part(number, key, value, _pickled("missing", loaded, name, None), ())
    if isinstance(value, types.ModuleType):
        is_there = value.__name__ in sys.modules and not namespaces.travels_by_value(value.__name__)
        content = _pickled("module", loaded, name, value.__name__) if is_there else b""
        return Part(number, key, value, content, ())
    found, pickled = _dumps(value, loaded)
    if pickled is None:
        return _make_opaque(number, key, value, loaded)
    followed: set[str] = set()
    used = tuple(_used_by(found, followed))
    needs = tuple(use for use in dict.fromkeys(_named_by(found, followed)) if use != key)
    uses = tuple(use for use in dict.fromkeys(used + needs) if use != key)
    check = functools.partial(check_of, looks_into=looks_into_large or len(pickled) <= _LARGE, without=found.left_out)
    if len(pickled) > _LARGEST:
        try:
            content = _pickled("large", loaded, name, large_digest(value))
        except Exception:
            content = _pickled("opaque", loaded, name, kept(value))
        return Part(number, key, value, content, uses, needs, check=check)
    content = _pickled("value", loaded, name, (source_digest(pickled), pickled))
    return Part(number, key, value, content, uses, needs, check=check)


def _make_opaque(number: int, key: Key, value: Any, module: types.ModuleType) -> Part:
    """Return the part of what cannot be pickled: of a dict or plain instance all in it that can, of other things none.

    What its code refers to is compared all the same.
    """
    found = Found()
    found.functions += functions_in(value)
    found.named.append(type(value))
    by_fields = type(value) is dict or is_plain_instance(value)
    if by_fields:
        fields: dict[Any, bytes | Kept] = {}
        for name, field in fields_of(value).items():
            try:
                fields[name] = dumps_part(field, vars(module), found)
            except Exception:
                found.left_out.append(field)
                fields[name] = kept(field)
        sent: Any = ("fields", module, key[1], (type_name(value), fields))
    else:
        sent = ("opaque", module, key[1], kept(value))
    followed: set[str] = set()
    uses = tuple(dict.fromkeys((*_used_by(found, followed), *_named_by(found, followed))))
    try:
        content = _pickled(*sent)
    except Exception:  # the keys of the dict
        content, by_fields = _pickled("opaque", module, key[1], kept(value)), False
    check = functools.partial(check_of, without=found.left_out, by_fields=by_fields, looks_into=by_fields)
    return Part(number, key, value, content, uses, check=check)


def _dumps(value: Any, module: types.ModuleType) -> tuple[Found, bytes | None]:
    """Pickle a value, a class if need be without what in it cannot be; None: it cannot be sent."""
    for leaves_out in (False, True):
        found = Found()
        try:
            pickled = dumps_part(value, vars(module), found, leaves_out=leaves_out)
            found.functions += [fn for part in found.left_out for fn in functions_in(part)]
            return found, pickled
        except Exception:
            if not isinstance(value, type):
                break
    return found, None


def _pickled(kind: str, module: types.ModuleType, name: str, content: Any) -> bytes:
    about = namespaces.about(vars(module))
    return pickle.dumps((kind, namespaces.token(), module.__name__, name, about, content), protocol=5)


def _uses_of_whole(module: types.ModuleType) -> tuple[Key, ...]:
    return tuple((module.__name__, name) for name in _own_names(module))


def _own_names(module: types.ModuleType) -> Iterator[str]:
    """Yield the names of a module that are its own: data, and what it defines."""
    for name, value in list(vars(module).items()):
        if name.startswith("__") or isinstance(value, types.ModuleType):
            continue
        is_code = isinstance(value, (types.FunctionType, type)) or type(value) is CACHED
        if not is_code or getattr(value, "__module__", None) == module.__name__:
            yield name


def _of_source(number: int, module: str) -> Part:
    """Return the part of a module that the caller has not imported: its source, and modules that this imports."""
    path = source_of(module)
    key = (module, _WHOLE)
    if path is None or path.suffix != ".py":
        return Part(number, key, None, b"", ())
    try:
        source = path.read_bytes()
    except OSError:
        return Part(number, key, None, b"", ())
    sent: Any = ("source", namespaces.token(), module, _WHOLE, {}, source_digest(source))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    uses: list[Key] = []
    try:
        code = compile(source, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        code = None
    if code is not None:
        for reference in references_of(code):
            if reference.is_import:
                uses += _of_import(reference, package)
    return Part(number, key, None, pickle.dumps(sent, protocol=5), tuple(dict.fromkeys(uses)))
