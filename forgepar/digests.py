"""Digests of values by their content and of callables by what they do; the same in every process.

    value ──> its parts, each behind a mark of its kind ──> BLAKE2b ──> 16 bytes

An object is taken apart as pickle would (``__reduce_ex__``), a callable into its bytecode, constants, defaults and the
values that it closes over. What a function of the user's own modules refers to by global names counts as well, and so
on through all that it calls; of a library only the names count. Comments, line numbers, docstrings, annotations and the
names of local variables do not. Cost: O(size).

BLAKE2: J.-P. Aumasson, S. Neves, Z. Wilcox-O'Hearn, C. Winnerlein (2013).
"""

from __future__ import annotations

import copyreg
import dis
import enum
import functools
import importlib.util
import marshal
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from inspect import CO_NEWLOCALS, CO_OPTIMIZED
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from forgepar.tasks import Task

DIGEST_BYTES = 16  # two of 10^12 tasks have the same one with a probability of 10^-15
ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes))
_MARSHAL_FORMAT = 0  # later ones tell whether a string is interned, and whether a value is shared
_CHUNK_BYTES = 1 << 20
_NO_CONTENT = frozenset(("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__slots__"))
_MADE_BY_CLASS = frozenset(
    (
        "__dataclass_fields__",  # the methods made from them tell
        "__dataclass_params__",
        "__match_args__",
        "__firstlineno__",
        "__static_attributes__",
        "__annotate__",
        "__annotate_func__",
        "__annotations_cache__",
        "__abstractmethods__",
        "__parameters__",
        "__orig_bases__",
        "_abc_impl",
    )
)


class NoDigest(Exception):
    """Something cannot be compared with what it was in another process; the message says what, and why."""


class File(os.PathLike[str]):
    """A path that counts by what is in the file: a resumed run runs a task again when its input file has changed.

    The file's content and name count, not the folder it is in. A plain path counts by its text alone. The file must be
    there when the run begins; one that a task makes is better returned by that task, as a plain path.

    Args:
        path: of a file.

    Example:
        >>> os.fspath(File("data/in.csv"))
        'data/in.csv'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)

    def __fspath__(self) -> str:
        return self.path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, File) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __str__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        return f"File({self.path!r})"


class Digest(NamedTuple):
    """What came out.

    Attributes:
        data: 16 bytes.
        asks_context: whether a function in it may ask for the task that it runs in, and so for its name and seed.
    """

    data: bytes
    asks_context: bool


def digest_of(value: Any, *, is_vouched: bool = False) -> Digest:
    """Return the digest of a value or callable.

    Args:
        value: anything.
        is_vouched: leave out the values that functions refer to and that cannot be compared; a version stands for them.

    Raises:
        NoDigest: something in it cannot be compared.

    Example:
        >>> digest_of({"a": [1, 2]}) == digest_of({"a": [1, 2]}), digest_of(1) == digest_of(1.0)
        (True, False)
    """
    walk = _Walk(is_vouched)
    try:
        walk.visit(value)
    except RecursionError:
        raise NoDigest(f"a {type(value).__name__} is nested too deeply to be compared") from None
    return Digest(walk.hash.digest(), walk.asks_context)


def atoms_data(values: tuple[Any, ...]) -> bytes:
    """Return the bytes that stand for values of the types in `ATOMS`: others for other values or other types."""
    return marshal.dumps(values, _MARSHAL_FORMAT)


class _Walk:
    """One way through a value and all that it refers to; what is met again is told by the number of its first time."""

    def __init__(self, is_vouched: bool) -> None:
        self.hash = blake2b(digest_size=DIGEST_BYTES)
        self.asks_context = False
        self._is_vouched = is_vouched
        self._met: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no other object gets the id of one that was met

    def put(self, mark: str, data: bytes | str = b"") -> None:
        raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
        self.hash.update(b"%s %d " % (mark.encode(), len(raw)))
        self.hash.update(raw)

    def visit(self, value: Any) -> None:
        kind = type(value)
        if kind in ATOMS:
            self.put("atom", marshal.dumps(value, _MARSHAL_FORMAT))
        elif kind in (tuple, list) and ATOMS.issuperset(map(type, value)):
            self.put(kind.__name__, marshal.dumps(value, _MARSHAL_FORMAT))
        elif (place := self._met.get(id(value))) is not None:
            self.put("again", str(place))
        else:
            self._met[id(value)] = len(self._met)
            self._alive.append(value)
            self._take_apart(value)

    def _take_apart(self, value: Any) -> None:
        kind = type(value)
        if (known := _PARTS.get(kind)) is not None:
            known(self, value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, enum.Enum):
            self.visit(kind)
            self.put("member", value.name or str(value.value))
        elif isinstance(value, np.generic):
            self._array(np.asarray(value))
        elif isinstance(value, np.dtype):
            self.put("dtype", repr(np.lib.format.dtype_to_descr(value)))
        elif (own := getattr(kind, "__forgepar_fingerprint__", None)) is not None:
            self.visit(kind)
            self.visit(own(value))
        else:
            self._reduced(value)

    # Data

    def _sequence(self, value: tuple[Any, ...] | list[Any]) -> None:
        self.put(type(value).__name__, str(len(value)))
        for part in value:
            self.visit(part)

    def _mapping(self, value: Mapping[Any, Any]) -> None:
        self.put("dict", str(len(value)))
        for key, part in value.items():
            self.visit(key)
            self.visit(part)

    def _set(self, value: set[Any] | frozenset[Any]) -> None:
        self.put(type(value).__name__, str(len(value)))
        for data in sorted(self._apart(part) for part in value):
            self.put("part", data)

    def _apart(self, value: Any) -> bytes:
        found = digest_of(value, is_vouched=self._is_vouched)
        self.asks_context |= found.asks_context
        return found.data

    def _array(self, array: np.ndarray[Any, Any]) -> None:
        self.put("array", f"{np.lib.format.dtype_to_descr(array.dtype)!r} {array.shape}")
        if array.dtype.hasobject:
            self._sequence(array.ravel().tolist())
        else:
            raw = np.ascontiguousarray(array)
            self.put("data")
            if raw.size:
                self.hash.update(raw.view(np.uint8).data if raw.ndim else raw.tobytes())

    def _file(self, value: File) -> None:
        self.put("file", Path(value.path).name)
        try:
            with Path(value.path).open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    self.hash.update(chunk)
        except OSError as error:
            raise NoDigest(f"the file {value.path!r} cannot be read ({error.strerror})") from None

    def _reduced(self, value: Any) -> None:
        """Take an object apart as pickle does."""
        kind = type(value)
        registered = copyreg.dispatch_table.get(kind)
        try:
            reduced: Any = value.__reduce_ex__(4) if registered is None else registered(value)
        except Exception as error:
            raise NoDigest(f"a {kind.__module__}.{kind.__qualname__} cannot be compared ({error})") from None
        if isinstance(reduced, str):
            self.put("global", f"{kind.__module__} {reduced}")
            return
        maker, arguments, *rest = reduced
        self.put("object")
        self.visit(maker)
        self.visit(arguments)
        state, items, pairs = (*rest, None, None, None)[:3]
        self.visit(state)
        for part in items or ():
            self.visit(part)
        for pair in pairs or ():
            self.visit(tuple(pair))

    # Callables

    def _function(self, fn: types.FunctionType) -> None:
        if fn.__module__ == "forgepar.contexts":
            self.asks_context = True
        # A function within a library's function is made there for the user: by its name it would be any of them.
        if not is_users(fn.__module__) and "<locals>" not in fn.__qualname__:
            self.put("function", f"{fn.__module__} {fn.__qualname__}")
            return
        self.put("function")
        self._code(fn.__code__)
        self.visit(fn.__defaults__)
        self.visit(fn.__kwdefaults__)
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            self._cell(name, cell)
        for reference in _references(fn.__code__):
            self._reference(reference, fn)

    def _cell(self, name: str, cell: types.CellType) -> None:
        try:
            value = cell.cell_contents
        except ValueError:
            self.put("empty cell")
            return
        self._visit_referred(value, f"{name!r}, which it closes over")

    def _code(self, code: types.CodeType) -> None:
        n_arguments = code.co_argcount + code.co_kwonlyargcount
        flags = code.co_flags & ~_HAS_DOCSTRING
        shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, flags, len(code.co_cellvars))
        self.put("code", code.co_code)
        self.put("shape", repr((shape, code.co_varnames[:n_arguments], code.co_names)))
        self.put("exceptions", code.co_exceptiontable)
        for place, constant in enumerate(code.co_consts):
            if isinstance(constant, types.CodeType):
                self._code(constant)
            else:
                self.visit(constant if place or not _has_docstring(code) else None)

    def _reference(self, reference: _Reference, fn: types.FunctionType) -> None:
        """Visit what a function refers to by a global name, or imports."""
        if reference.is_import:
            self._import(reference, fn)
            return
        name, *attributes = reference.names
        if name not in fn.__globals__:
            return  # a builtin, whose name is in the code; or nothing yet
        value = fn.__globals__[name]
        while attributes and isinstance(value, types.ModuleType):
            if not (is_users(value.__name__) or value.__name__ == "forgepar") or not hasattr(value, attributes[0]):
                break
            value = getattr(value, attributes.pop(0))
        self.put("name", ".".join(reference.names))
        self._visit_referred(value, f"its global {name!r}")

    def _visit_referred(self, value: Any, what: str) -> None:
        if not self._is_vouched:
            try:
                self.visit(value)
            except NoDigest as error:
                raise NoDigest(f"{what}: {error}") from None
            return
        try:
            self.put("vouched", self._apart(value))
        except (NoDigest, RecursionError):
            self.put("vouched")

    def _import(self, reference: _Reference, fn: types.FunctionType) -> None:
        name = "." * reference.level + reference.names[0]
        if reference.level:
            try:
                name = importlib.util.resolve_name(name, fn.__globals__.get("__package__"))
            except ImportError:
                return
        self.asks_context |= name.partition(".")[0] == "forgepar"
        if is_users(name):
            self._module_file(name)

    def _module(self, module: types.ModuleType) -> None:
        self.put("module", module.__name__)
        self.asks_context |= module.__name__ == "forgepar"
        if is_users(module.__name__):
            self._module_file(module.__name__)

    def _module_file(self, name: str) -> None:
        """Count a module as a whole, by its source: it is not told what of it is used."""
        path = _source_of(name)
        if path is not None:
            try:
                self.put("source", path.read_bytes())
            except OSError as error:
                raise NoDigest(f"the module {name!r} cannot be read ({error.strerror})") from None

    def _partial(self, value: functools.partial[Any]) -> None:
        self.put("partial")
        self.visit((value.func, value.args, value.keywords))

    def _method(self, value: types.MethodType) -> None:
        self.put("method")
        self.visit((value.__func__, value.__self__))

    def _builtin(self, value: types.BuiltinFunctionType) -> None:
        owner = value.__self__
        if owner is None or isinstance(owner, types.ModuleType):
            self.put("builtin", f"{value.__module__} {value.__qualname__}")
        else:
            self.put("method", value.__name__)
            self.visit(owner)

    def _wrapped(self, value: Any) -> None:
        self.put("wrapper", type(value).__name__)
        self.visit(value.__wrapped__)

    def _cached_property(self, value: functools.cached_property[Any]) -> None:
        self.put("property")
        self.visit(value.func)

    def _task(self, value: Task[..., Any]) -> None:
        self.visit(value.fn)

    def _property(self, value: property) -> None:
        self.put("property")
        for part in (value.fget, value.fset, value.fdel):
            self.visit(part)

    def _class(self, cls: type) -> None:
        self.put("class", f"{cls.__module__} {cls.__qualname__}")
        if not is_users(cls.__module__):
            return
        for base in cls.__bases__:
            self.visit(base)
        is_enum = isinstance(cls, enum.EnumMeta)
        if isinstance(cls, enum.EnumMeta):
            members: Mapping[str, enum.Enum] = cls.__members__
            self.visit([(name, member.value) for name, member in members.items()])
        for name, value in sorted(vars(cls).items()):
            if name in _NO_CONTENT or name in _MADE_BY_CLASS or type(value) in _SLOTS:
                continue
            if is_enum and (not isinstance(value, _CLASS_CODE) or name in vars(enum.Enum)):
                continue
            self.put("attribute", name)
            self._visit_referred(value, f"the attribute {name!r} of class {cls.__qualname__}")


class _Reference(NamedTuple):
    """What bytecode refers to: a global name with the attributes taken of it, or an import."""

    names: tuple[str, ...]
    is_import: bool = False
    level: int = 0


@functools.lru_cache(maxsize=4096)
def _references(code: types.CodeType) -> tuple[_Reference, ...]:
    found: dict[_Reference, None] = {}
    for part in _nested(code):
        found.update(dict.fromkeys(_references_of_one(part)))
    return tuple(found)


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _references_of_one(code: types.CodeType) -> Iterator[_Reference]:
    chain: tuple[str, ...] = ()
    constants: list[Any] = [0, 0]
    for step in dis.get_instructions(code):
        if chain and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain = (*chain, step.argval)
            continue
        if step.opname == "EXTENDED_ARG":
            continue
        if chain:
            yield _Reference(chain)
            chain = ()
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            chain = (step.argval,)
        elif step.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            constants = [constants[-1], step.argval]
        elif step.opname == "IMPORT_NAME":
            yield _Reference((step.argval,), True, constants[0] if isinstance(constants[0], int) else 0)
    if chain:
        yield _Reference(chain)


_HAS_DOCSTRING = 0x4000000 if sys.version_info >= (3, 13) else 0


def _has_docstring(code: types.CodeType) -> bool:
    """Tell whether the first constant is a docstring."""
    if _HAS_DOCSTRING:
        return bool(code.co_flags & _HAS_DOCSTRING)
    is_function = code.co_flags & CO_OPTIMIZED and code.co_flags & CO_NEWLOCALS and not code.co_name.startswith("<")
    return bool(is_function and code.co_consts and isinstance(code.co_consts[0], str))


def is_users(module: str | None) -> bool:
    """Tell whether a module is the user's own: not of Python, not installed as a library, not of forgepar."""
    return module is None or _is_users(module)


@functools.lru_cache(maxsize=4096)
def _is_users(name: str) -> bool:
    top = name.partition(".")[0]
    if top == "__main__":
        return True
    if top == "forgepar":
        return name.startswith("forgepar.examples")
    if top in sys.stdlib_module_names:
        return False
    path = _source_of(name)
    if path is None:
        return name not in sys.modules  # it came by value from where it is one; what has no source is a library's
    return not ({"site-packages", "dist-packages"} & set(path.parts) or any(map(path.is_relative_to, _LIBRARIES)))


_LIBRARIES = tuple({sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")})


def _source_of(name: str) -> Path | None:
    """Return the file of a module, which is not imported for it."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if module is None:
        try:
            spec = importlib.util.find_spec(name) if "." not in name or name.rpartition(".")[0] in sys.modules else None
        except (ImportError, ValueError, AttributeError):
            spec = None
        file = spec.origin if spec is not None and spec.has_location else None
    return Path(file) if file else None


_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_CLASS_CODE = (types.FunctionType, property, classmethod, staticmethod)
_PARTS: dict[type, Callable[[_Walk, Any], None]] = {
    tuple: _Walk._sequence,
    list: _Walk._sequence,
    dict: _Walk._mapping,
    types.MappingProxyType: _Walk._mapping,
    set: _Walk._set,
    frozenset: _Walk._set,
    np.ndarray: _Walk._array,
    File: _Walk._file,
    types.FunctionType: _Walk._function,
    types.BuiltinFunctionType: _Walk._builtin,
    types.MethodType: _Walk._method,
    types.ModuleType: _Walk._module,
    types.CodeType: _Walk._code,
    functools.partial: _Walk._partial,
    type(functools.lru_cache(lambda: None)): _Walk._wrapped,
    classmethod: _Walk._wrapped,
    staticmethod: _Walk._wrapped,
    property: _Walk._property,
    functools.cached_property: _Walk._cached_property,
    Task: _Walk._task,
}
