"""How a worker takes over the state of the caller's modules, which module_state.py makes.

    take_part ──> is the module loaded?  yes: compare, and take the caller's value if it differs
                                         no:  do so when the module is imported

A module that a task will import but the caller has not is imported only from the source that the caller saw.
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

from forgepar.errors import CodeMismatch, text_of
from forgepar.values import namespaces
from forgepar.values.caller_values import KeptAsIs, check_kept, clear_caches, register_cache, take_over, type_name
from forgepar.values.comparison import CACHED, MISSING, same
from forgepar.values.context_variables import Sent, is_context_variable, take_value
from forgepar.values.origins import Home, Namespace, namespace_of, token
from forgepar.values.unchanged import check_of, fields_of, large_digest

_confirmed: dict[int, Callable[[], bool]] = {}  # by number of a part: whether its module still has its value
_number_of: dict[tuple[str, str], int] = {}
_CODE = (types.FunctionType, type, CACHED)
_NOTHING = object()  # in place of a key, if the caller does not have the name
NEW_RUN = -1  # number of the part that makes a worker forget the parts of earlier runs


def take_part(data: bytes, number: int = 0) -> None:
    """Give a name of a module the caller's value, now or when the module is imported.

    Args:
        data: a pickled part.
        number: its number, for `collect`.

    Raises:
        CodeMismatch: the caller's value cannot be made here.
        Exception: whatever unpickling the value raises.
    """
    known = _confirmed.get(number)
    if known is not None and known():
        return
    part = pickle.loads(data)
    kind, origin, module, name, _, content = part
    if origin == token():
        return
    if kind == "made":
        _take_made(part)
    elif kind == "source":
        _expect_source(module, content)
    elif module in sys.modules:
        if _apply(part) and number < NEW_RUN:
            _confirm(number, module, name)
    else:
        _watch_imports()
        _pending.setdefault(module, {})[f"{kind} {name}" if kind == "names" else name] = (*part, number)


def _confirm(number: int, module: str, name: str) -> None:
    """Note that a module has the value of a part, so that the part can be skipped while that is so."""
    _confirmed.pop(_number_of.get((module, name), 0), None)
    _number_of[module, name] = number
    names = vars(sys.modules[module])
    if name in names:
        has_it = check_of(names, name, names[name])
        _confirmed[number] = lambda: vars(sys.modules.get(module, types)) is names and has_it()


def _apply(part: tuple[Any, ...]) -> bool:
    """Apply a part to a loaded module; return whether `check_of` can check that it stays applied."""
    kind, origin, module, name, about, content, *_ = part
    namespace = namespace_of(Home(origin, module, name, about, True, True))
    names, mine = namespace.names, namespace.names.get(name, MISSING)
    if kind == "value":
        key, pickled = content
        if name in names and namespace.received.get(name, MISSING) == key:
            return False
        value = _loaded(pickled, module, name)
        if mine is MISSING or _is_of_another(mine, module, name):
            names[name] = value
            clear_caches()
        elif isinstance(value, _CODE) or hasattr(type(value), "__forgepar_named__"):
            # Patch the code only under the object's own name: under others, the caller may have an older version.
            is_own_name = getattr(value, "__module__", "") == module and getattr(value, "__qualname__", "") == name
            if mine is not value and not same(mine, value):
                if not (is_own_name and _patched(mine, value)):
                    names[name] = value
                clear_caches()
        elif mine is not value:
            take_over(namespace, name, value, key.identity)
        namespace.received[name], namespace.identities[name] = key, key.identity
        if type(value) is CACHED:
            register_cache(value)
        return True
    if kind == "missing":
        _remove([name], namespace)
    elif kind == "names":
        extra = [n for n in names if n not in content and not n.startswith("__")]
        _remove([n for n in extra if not isinstance(names[n], types.ModuleType)], namespace)
    elif kind == "module":
        if getattr(mine, "__name__", None) != content or not isinstance(mine, types.ModuleType):
            names[name] = importlib.import_module(content)
    elif kind == "large":
        if mine is MISSING or large_digest(mine) != content:
            raise CodeMismatch(
                f"{name!r} of module {module!r} has different values in the caller and in this worker, and is too "
                "large to be sent with the code. Pass it to the task as an argument.",
                module=module,
                name=name,
            )
    elif kind == "context":
        _take_context(mine, content, namespace, (module, name))
    elif kind == "opaque":
        check_kept(mine, content, module, name)
    elif kind == "fields":
        _take_fields(mine, content, module, name)
    return False


def _take_context(mine: Any, sent: Sent, namespace: Namespace, key: tuple[str, str]) -> None:
    """Take over the value of a context variable."""
    module, name = key
    if not is_context_variable(mine):
        check_kept(mine, KeptAsIs("_contextvars.ContextVar", ()), module, name)
        return
    is_new = namespace.received.get(name, MISSING) != sent
    take_value(mine, sent, key, lambda pickled: _loaded(pickled, module, name), is_new=is_new)
    namespace.received[name] = sent


def _take_made(part: tuple[Any, ...]) -> None:
    """Put a module that the caller's program made into `sys.modules`, or update the existing one."""
    _, origin, module, _, about, (digest, pickled) = part
    namespace = namespace_of(Home(origin, module, "", about, False, True))
    values = _loaded(pickled, module, "")
    if namespace.received.get("", MISSING) == digest:
        return  # changes that tasks have made since stay
    namespace.received[""] = digest
    for name, value in values.items():
        if not same(namespace.names.get(name, MISSING), value):
            namespace.names[name] = value
            clear_caches()
    for name in [name for name in namespace.names if name not in values and not name.startswith("__")]:
        del namespace.names[name]
        clear_caches()


def _take_fields(mine: Any, sent: tuple[str, dict[Any, bytes | KeptAsIs]], module: str, name: str) -> None:
    """Take over the fields of a dict or an instance that could be pickled."""
    kind, fields = sent
    if type_name(mine) != kind:
        check_kept(mine, KeptAsIs(kind, ()), module, name)
        return
    own = fields_of(mine)
    for field, data in fields.items():
        value = own.get(field, MISSING)
        if isinstance(data, KeptAsIs):
            check_kept(value, data, module, f"{name}.{field}")
        elif not same(value, theirs := _loaded(data, module, name)):
            own[field] = theirs
            clear_caches()
    for field in own.keys() - fields.keys():
        del own[field]
        clear_caches()


def _is_of_another(mine: Any, module: str, name: str) -> bool:
    """Return whether a name of a module refers to an imported function that may change in its own module.

    It is called if the caller has another object: the other module was reloaded, and this name has the old function.
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
            f"{name!r} of module {module!r} cannot be unpickled in this worker "
            f"({type(error).__name__}: {text_of(error)}). Assign it inside the task, or pass it as an argument.",
            module=module,
            name=name,
        ) from error


def _remove(gone: list[str], namespace: Namespace) -> None:
    """Delete names that the caller does not have; a value that a task or initializer assigns later stays."""
    for name in gone:
        if namespace.received.get(name, MISSING) is not _NOTHING:
            namespace.received[name] = _NOTHING
            if name in namespace.names:
                del namespace.names[name]
                clear_caches()


def _patched(mine: Any, value: Any) -> bool:
    """Give a function of this process the caller's code in place, as others may refer to it; False if impossible."""
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
        with contextlib.suppress(ValueError):  # the cell is empty
            cell.cell_contents = mine if sent.cell_contents is value else sent.cell_contents
    return True


# Modules that this worker imports later

_failures: dict[int, BaseException] | None = None
_has_new_files = False
_BEGAN = time.time()  # seconds since the epoch; a fork server loads this module before it forks workers
_pending: dict[str, dict[str, tuple[Any, ...]]] = {}  # parts by module and name, for modules not yet imported
_expected_sources: dict[str, bytes] = {}  # of modules that the caller has not imported
_loaded_sources: dict[str, bytes] = {}


def _expect_source(module: str, digest: bytes) -> None:
    """Import a module only from source of this digest; forget a module that came from other source."""
    _watch_imports()
    _expected_sources[module] = digest
    if module in sys.modules and _loaded_sources.get(module) != digest and not _is_loaded_from(module, digest):
        for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
            parent, _, last = name.rpartition(".")
            vars(sys.modules.get(parent, types.SimpleNamespace())).pop(last, None)
            del sys.modules[name]
        importlib.invalidate_caches()


def _is_loaded_from(module: str, digest: bytes) -> bool:
    """Return whether a module that was imported before `_expect_source` came from source of a digest.

    It did if its file has that source and has not changed since this process began.
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
    """Make the next import look for new files.

    `importlib.invalidate_caches` takes 40 us at the beginning of a run, and most runs import nothing.
    """
    global _has_new_files  # one per process
    _has_new_files = True
    _watch_imports()


def _watch_imports() -> None:
    """Install the finder for imports from now on. This process belongs to forgepar."""
    if not any(type(finder) is _Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finder of the modules that parts or expected sources are waiting for."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        global _has_new_files  # one per process
        if _has_new_files:
            _has_new_files = False
            importlib.invalidate_caches()
        if name not in _pending and name not in _expected_sources:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)  # type: ignore[assignment]  # it has the methods that an import calls
                return spec
        if name in _pending:  # its file was removed after the caller imported it; the parts contain all
            about = next(iter(_pending[name].values()))[4]
            return ModuleSpec(name, _Loader(None), is_package="__path__" in about)  # type: ignore[arg-type]
        return None


class _Loader:
    """Loader that runs a module's own loader and then applies the caller's parts.

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
                    raise  # otherwise it was broken after the caller imported it
        if name in _pending:
            for attribute, value in next(iter(_pending[name].values()))[4].items():
                vars(module).setdefault(attribute, value)
        for part in list(_pending.get(name, {}).values()):
            try:
                _apply(part)
            except Exception as error:
                if _failures is None:
                    raise  # during a task: this import fails, and each later one
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
                f"The source of module {name!r} was edited after the run began. Run the workflow again.", module=name
            )
        exec(compile(source, path, "exec", dont_inherit=True), vars(module))  # noqa: S102  (as an import does)


def source_digest(source: bytes) -> bytes:
    """Return the digest of a module's source."""
    from hashlib import blake2b

    return blake2b(source, digest_size=16).digest()


def collect(failures: dict[int, BaseException] | None) -> None:
    """From now on, put errors of parts into a dict by number and let the import succeed; None to raise them."""
    global _failures  # one worker per process
    _failures = failures


def begin_run() -> None:
    """Forget what the caller sent, so that the next parts are compared with the modules of this process."""
    namespaces.begin_run()
    _pending.clear()
    _expected_sources.clear()
