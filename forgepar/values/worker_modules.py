"""The caller's parts of modules that workers can import, as a worker takes them in; modulestate.py makes them.

    take_part ──> module is here?  yes: compare, and take the caller's where it differs
                                   no:  wait for its import, and do so then

A module that the caller has not imported, but a task will, is imported only from the source that the caller saw.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import sys
import time
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

from forgepar.errors import CodeMismatch
from forgepar.values import namespaces
from forgepar.values.comparison import CACHED, MISSING, same
from forgepar.values.current import check_of, fields_of, large_digest
from forgepar.values.namespaces import Home, Kept, changed, check_kept, put, space_of, token, type_name

_confirmed: dict[int, Callable[[], bool]] = {}  # by the number of a part: whether its module still has what it brought
_number_of: dict[tuple[str, str], int] = {}
_NOTHING = object()  # in place of the key of a value, where the caller has none
NEW_RUN = -1  # the number of the part that has a worker forget what it was sent for earlier runs


def take_part(data: bytes, number: int = 0) -> None:
    """Make a name of a module in this worker what it is in the caller: now, or once something imports the module.

    Args:
        data: the part.
        number: its number, for `collect`.

    Raises:
        CodeMismatch: it cannot be made so.
        Exception: whatever unpickling the value raises.
    """
    known = _confirmed.get(number)
    if known is not None and known():
        return
    part = pickle.loads(data)
    kind, origin, module, name, _, content = part
    if origin == token():
        return
    if kind == "source":
        _expect_source(module, content)
    elif module in sys.modules:
        if _apply(part) and number < NEW_RUN:
            _confirm(number, module, name)
    else:
        _watch_imports()
        _pending.setdefault(module, {})[f"{kind} {name}" if kind == "names" else name] = (*part, number)


def _confirm(number: int, module: str, name: str) -> None:
    """Note that a module has what a part brought, so that the part need not be looked at while it has."""
    _confirmed.pop(_number_of.get((module, name), 0), None)
    _number_of[module, name] = number
    names = vars(sys.modules[module])
    if name in names:
        has_it = check_of(names, name, names[name])
        _confirmed[number] = lambda: vars(sys.modules.get(module, types)) is names and has_it()


def _apply(part: tuple[Any, ...]) -> bool:
    """Make a name of a module that is here what a part says; return whether `check_of` can tell if it still is."""
    kind, origin, module, name, about, content, *_ = part
    space = space_of(Home(origin, module, name, about, True, True))
    names, mine = space.names, space.names.get(name, MISSING)
    if kind == "value":
        key, pickled = content
        if name in names and space.received.get(name, MISSING) == key:
            return False
        value = _loaded(pickled, module, name)
        if mine is not value and (_is_of_another(mine, module, name) or not same(mine, value)):
            # Under another name it may be one that the caller's module of it has no more: it gets no code of that.
            is_at_home = getattr(value, "__module__", "") == module and getattr(value, "__qualname__", "") == name
            if not (is_at_home and _patched(mine, value)):
                put(names, name, value)
            changed()
        space.received[name] = key
        if type(value) is CACHED:
            namespaces.note_cache(value)
        return True
    if kind == "missing":
        _remove([name], space)
    elif kind == "names":
        extra = [n for n in names if n not in content and not n.startswith("__")]
        _remove([n for n in extra if not isinstance(names[n], types.ModuleType)], space)
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
    elif kind == "opaque":
        check_kept(mine, content, module, name)
    elif kind == "fields":
        _take_fields(mine, content, module, name)
    return False


def _take_fields(mine: Any, sent: tuple[str, dict[Any, bytes | Kept]], module: str, name: str) -> None:
    """Take in what of a dict or an instance could be pickled."""
    kind, fields = sent
    if type_name(mine) != kind:
        check_kept(mine, Kept(kind, ()), module, name)
        return
    own = fields_of(mine)
    for field, data in fields.items():
        value = own.get(field, MISSING)
        if isinstance(data, Kept):
            check_kept(value, data, module, f"{name}.{field}")
        elif not same(value, theirs := _loaded(data, module, name)):
            put(own, field, theirs)
            changed()
    for field in own.keys() - fields.keys():
        del own[field]
        changed()


def _is_of_another(mine: Any, module: str, name: str) -> bool:
    """Tell whether what a module has under a name is a function that it imported, and that may change where it is from.

    It is asked where the caller has another object: that module was reloaded, and this name still has the old one.
    """
    home = getattr(mine, "__module__", None)
    if type(mine) is not types.FunctionType or home not in sys.modules or (home, mine.__qualname__) == (module, name):
        return False
    return vars(sys.modules[home]).get(mine.__qualname__) is mine


def _loaded(pickled: bytes, module: str, name: str) -> Any:
    try:
        return pickle.loads(pickled)
    except CodeMismatch:
        raise
    except Exception as error:
        raise CodeMismatch(
            f"{name!r} of module {module!r} cannot be made in this worker what it is in the caller "
            f"({type(error).__name__}: {error}). Assign it inside the task, or give it as an argument.",
            module=module,
            name=name,
        ) from error


def _remove(gone: list[str], space: namespaces.Space) -> None:
    """Delete names that the caller does not have; what a task or initializer assigns to them later stays."""
    for name in gone:
        if space.received.get(name, MISSING) is not _NOTHING:
            space.received[name] = _NOTHING
            if name in space.names:
                del space.names[name]
                changed()


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


# Modules that this worker imports later

_failures: dict[int, BaseException] | None = None
_has_new_files = False
_BEGAN = time.time()  # seconds since the epoch; a fork server loads this module before any worker begins
_pending: dict[str, dict[str, tuple[Any, ...]]] = {}  # parts of modules that nothing has imported yet
_expected_sources: dict[str, bytes] = {}  # of modules that the caller has not imported
_loaded_sources: dict[str, bytes] = {}


def _expect_source(module: str, digest: bytes) -> None:
    """Have a module imported only from source of this digest; one that is here from other source is forgotten."""
    _watch_imports()
    _expected_sources[module] = digest
    if module in sys.modules and _loaded_sources.get(module) != digest and not _is_loaded_from(module, digest):
        for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
            parent, _, last = name.rpartition(".")
            vars(sys.modules.get(parent, types.SimpleNamespace())).pop(last, None)
            del sys.modules[name]
        importlib.invalidate_caches()


def _is_loaded_from(module: str, digest: bytes) -> bool:
    """Tell whether a module that was imported before anything was expected came from source of a digest.

    It did if its file has that source, and was last changed before this process began.
    """
    path = getattr(sys.modules[module], "__file__", None)
    if module in _loaded_sources or not isinstance(path, str):
        return False
    try:
        if os.stat(path).st_ctime >= _BEGAN:  # noqa: PTH116
            return False
        with open(path, "rb") as file:  # noqa: PTH123
            is_it = source_digest(file.read()) == digest
    except OSError:
        return False
    if is_it:
        _loaded_sources[module] = digest
    return is_it


def expect_new_files() -> None:
    """Have the next import look for modules anew: files may have been written since the last one.

    `importlib.invalidate_caches` does that at once, in 40 us at the begin of a run, and most runs import nothing.
    """
    global _has_new_files  # there is one process
    _has_new_files = True
    _watch_imports()


def _watch_imports() -> None:
    """Look at what is imported from now on. This process is forgepar's own."""
    if not any(type(finder) is _Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the modules that the caller's parts, or an expected source, are for."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        global _has_new_files  # there is one process
        if _has_new_files:
            _has_new_files = False
            importlib.invalidate_caches()
        if name not in _pending and name not in _expected_sources:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)  # type: ignore[assignment]  # all that an import asks of one
                return spec
        if name in _pending:  # its file is gone since the caller imported it; what the caller has of it is here
            about = next(iter(_pending[name].values()))[4]
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
            for attribute, value in next(iter(_pending[name].values()))[4].items():
                vars(module).setdefault(attribute, value)
        for part in list(_pending.get(name, {}).values()):
            try:
                _apply(part)
            except Exception as error:
                if _failures is None:
                    raise  # amid a task: the import fails, and each that follows
                _failures[part[-1]] = error
        _pending.pop(name, None)

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


def collect(failures: dict[int, BaseException] | None) -> None:
    """Note parts that cannot be taken in by their numbers from now on, and let the import succeed; None: no more."""
    global _failures  # there is one worker in its process
    _failures = failures


def begin_run() -> None:
    """Forget what the caller was known to have: what it sends next is compared with what is here."""
    namespaces.begin_run()
    _pending.clear()
    _expected_sources.clear()
