"""The state of the caller's process that tasks see: environment, working directory, search path, settings.

    caller:  here(), SurroundingsTracker.current() ──> Batch.facts ──> worker:  SurroundingsApplier.apply

A task sees the state that its caller had when it called `run` or `submit`. Each worker process starts with the caller's
state (`begin_as`). The first batch of each run sets all of it again, because tasks of earlier runs may have changed the
worker's process. Between jobs of a pool, only what the caller has changed is set in the worker.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import locale
import logging
import os
import pickle
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from forgepar.backends.output_capture import NO_RULES, LoggingRules, apply_rules, rules_here
from forgepar.errors import WorkingFolderGone
from forgepar.system.forking import fork_safe
from forgepar.values import worker_modules

_MOST_REMEMBERED = 64  # packed surroundings that a tracker reuses: a block that patches a variable makes two
_MOST_PATH = 4097  # bytes, with the terminating zero
_STANDARD_DECIMAL = (28, "ROUND_HALF_EVEN", -999999, 999999, 1, 0, ("DivisionByZero", "InvalidOperation", "Overflow"))

RuleSetter: TypeAlias = Callable[[LoggingRules, LoggingRules], None]  # as `output_capture.apply_rules`


class ProcessSettings(NamedTuple):
    """Settings of the process; that of `decimal` belongs to the thread."""

    recursion_limit: int
    int_max_str_digits: int
    dont_write_bytecode: bool
    pycache_prefix: str | None
    socket_timeout: float | None
    temporary_folder: str | None
    locale: str
    decimal: tuple[Any, ...] | None  # fields of the context; None: Python's defaults


class ProcessState(NamedTuple):
    """The state of a process.

    Attributes:
        environment: environment variables, as bytes: they need not be text.
        folder: the working directory; empty if it was deleted.
        path: `sys.path`.
        argv: `sys.argv`.
        settings: all other settings.
    """

    environment: dict[bytes, bytes]
    folder: str
    path: list[str]
    argv: list[str]
    settings: ProcessSettings


class Surroundings(NamedTuple):
    """The state of the caller's process that tasks see.

    Attributes:
        rules: how to log and warn.
        process: all other state; None if the workers' processes keep their own.
    """

    rules: LoggingRules
    process: ProcessState | None = None


UNKNOWN = Surroundings(NO_RULES)


def here(*, is_strict: bool = True) -> Surroundings:
    """Return the surroundings of this process.

    Args:
        is_strict: whether to raise if the working directory was deleted.

    Raises:
        WorkingFolderGone: the working directory was deleted.
    """
    process = ProcessState(_variables().copy(), _folder(is_strict), _text(sys.path), _text(sys.argv), _settings())
    return Surroundings(rules_here(), process)


def pack(surroundings: Surroundings) -> bytes:
    """Pickle surroundings."""
    global _last_packed  # the surroundings of this process seldom change
    known, packed = _last_packed
    if surroundings != known:
        packed = pickle.dumps(surroundings, protocol=5)
        _last_packed = surroundings, packed
    return packed


@functools.lru_cache(maxsize=4)  # most runs bring the same ones
def unpack(packed: bytes) -> Surroundings:
    """Unpickle surroundings; callers must not change them."""
    surroundings: Surroundings = pickle.loads(packed)
    return surroundings


_last_packed = (UNKNOWN, pickle.dumps(UNKNOWN, protocol=5))


def _variables() -> dict[bytes, bytes]:
    """Return the environment, which callers must not change: `os.environ` is 20 times slower to copy or compare."""
    found = getattr(os.environ, "_data", None)
    if type(found) is dict:
        return found
    # A program has replaced `os.environ`.
    return {os.fsencode(name): os.fsencode(value) for name, value in os.environ.items()}


def _folder(is_strict: bool) -> str:
    try:
        return os.getcwd()  # noqa: PTH109  (loading pathlib takes longer than all else here)
    except FileNotFoundError:
        if not is_strict:
            return ""
        raise WorkingFolderGone(
            "The working directory of this process was deleted, so tasks cannot run in it. "
            "Change to an existing directory with os.chdir before tasks are run or submitted."
        ) from None


def _folder_reader() -> Callable[[], object]:
    """Return a function that reads the working directory without releasing the GIL.

    `os.getcwd` releases it, so that a thread that submits jobs waits 10 us each time for the thread that sends them.
    Only compare what the function returns; for a deleted directory it is None, or a text that was not returned before.
    """
    ctypes = sys.modules.get("ctypes")  # numpy loads it
    try:
        read = ctypes.PyDLL(None).getcwd  # type: ignore[union-attr]
    except (AttributeError, OSError):
        return partial(_folder, is_strict=True)
    buffer = ctypes.create_string_buffer(_MOST_PATH)  # type: ignore[union-attr]
    read.restype = ctypes.c_char_p  # type: ignore[union-attr]
    return partial(read, ctypes.cast(buffer, ctypes.c_void_p), ctypes.c_size_t(_MOST_PATH))  # type: ignore[union-attr]


def _text(entries: list[Any]) -> list[str]:
    """Copy a list of strings; other entries become strings, as not every process could unpickle them."""
    if {str}.issuperset(map(type, entries)):
        return entries[:]
    return [str(entry) for entry in entries]


def _settings() -> ProcessSettings:
    return ProcessSettings._make((*_cheap_settings(), locale.setlocale(locale.LC_ALL), _decimal()))


def _cheap_settings() -> tuple[Any, ...]:
    """Return the settings that are cheap to read: all except the last two."""
    return (
        sys.getrecursionlimit(),
        sys.get_int_max_str_digits(),
        sys.dont_write_bytecode,
        sys.pycache_prefix,
        socket.getdefaulttimeout(),
        tempfile.tempdir,
    )


def _decimal() -> tuple[Any, ...] | None:
    decimal = sys.modules.get("decimal")
    if decimal is None:
        return None
    now = decimal.getcontext()
    traps = tuple(sorted(signal.__name__ for signal, is_on in now.traps.items() if is_on))
    fields = (now.prec, now.rounding, now.Emin, now.Emax, now.capitals, now.clamp, traps)
    return None if fields == _STANDARD_DECIMAL else fields


class PackedSurroundings(NamedTuple):
    """Surroundings of this process at one time.

    Attributes:
        number: identifies them among those of one `SurroundingsTracker`.
        packed: the pickled `Surroundings`.
    """

    number: int
    packed: bytes


class SurroundingsTracker:
    """Reads the surroundings of this process repeatedly, in 2 us if they have not changed.

    Each call checks everything except the locale, fields of the `decimal` context other than precision and rounding,
    and ``disabled`` of loggers. A change of these alone is seen when something else has changed. Levels of loggers are
    known to be the same until `Logger.setLevel` or `logging.disable` is called.
    """

    def __init__(self) -> None:
        self._lock = fork_safe(threading.RLock())  # reentrant: a signal handler may call `current`
        self._numbers = itertools.count(1)
        self._known: OrderedDict[bytes, PackedSurroundings] = OrderedDict()
        self._read_folder = _folder_reader()
        self._levels_mark = object()
        self._seen: tuple[Any, ...] = ()
        self._last = PackedSurroundings(0, b"")

    def current(self) -> PackedSurroundings:
        """Return the surroundings; the same object as before if nothing has changed.

        Raises:
            WorkingFolderGone: the working directory was deleted.
        """
        # `setLevel` and `disable` clear these caches of all loggers.
        is_level = self._levels_mark in logging.root._cache  # type: ignore[attr-defined]
        if is_level and self._seen == _cheap_state(self._read_folder()):
            return self._last
        with self._lock:
            return self._read()

    def _read(self) -> PackedSurroundings:
        cache = logging.root._cache  # type: ignore[attr-defined]
        cache.pop(self._levels_mark, None)
        mark = object()
        cache[mark] = True  # before levels are read: a thread that changes one meanwhile removes it
        variables, path, argv, filters, *others = _cheap_state(self._read_folder())
        seen = (variables.copy(), path[:], argv[:], filters[:], *others)
        packed = pack(here())
        known = self._known.get(packed)
        if known is None:
            known = self._known[packed] = PackedSurroundings(next(self._numbers), packed)
            if len(self._known) > _MOST_REMEMBERED:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(packed)
        self._last, self._seen, self._levels_mark = known, seen, mark
        return known


def _cheap_state(folder: object) -> tuple[Any, ...]:
    """Return the state that is cheap to read, and the folder; the first four items are not copies."""
    return (
        _variables(),
        sys.path,
        sys.argv,
        warnings.filters,
        folder,
        _cheap_settings(),
        _cheap_decimal(),
    )


def _cheap_decimal() -> tuple[int, str] | None:
    decimal = sys.modules.get("decimal")
    if decimal is None:
        return None
    now = decimal.getcontext()
    return now.prec, now.rounding


# In workers


_defaults: dict[bytes, bytes] = {}  # variables that this process has if its caller has not
_begun = UNKNOWN


def begin_as(surroundings: Surroundings, defaults: Mapping[str, str], *, with_rules: bool = True) -> None:
    """Give a new worker process the surroundings of its caller.

    Args:
        surroundings: the caller's surroundings.
        defaults: variables that this process has if the caller has not.
        with_rules: whether to apply rules for logging and warnings now, instead of at the first batch: classes of
            warnings may be from modules that take long to import.
    """
    global _begun
    _defaults.update((os.fsencode(name), os.fsencode(value)) for name, value in defaults.items())
    for name, value in defaults.items():  # unpickling classes of warnings may load numpy, which reads them
        os.environ.setdefault(name, value)
    _begun = here(is_strict=False)
    with suppress(Exception):  # the first batch fails in the same way, and has tasks that can report it
        _apply(surroundings, _begun, apply_rules if with_rules else None)
        _begun = surroundings if with_rules else surroundings._replace(rules=_begun.rules)


class SurroundingsApplier:
    """Gives a worker's process the surroundings that the caller had when it called `run` or `submit`."""

    def __init__(self) -> None:
        self._run: str | None = None
        self._applied = _begun
        self._is_exact = False  # whether all surroundings were applied, and nothing has run since
        self._made_exact: tuple[Surroundings, Surroundings] | None = None  # what was applied, and the state it led to
        self._n_modules = 0
        self._pending: bytes | None = None
        self._pending_run = ""

    def receive(self, run: str, packed: bytes) -> None:
        """Note what a batch brings, for `apply`.

        Args:
            run: the id of the batch's run.
            packed: the caller's surroundings.
        """
        self._pending, self._pending_run = packed, run

    @property
    def is_pending(self) -> bool:
        """Whether `apply` has not yet applied what was received."""
        return self._pending is not None

    def apply(self, set_rules: RuleSetter | None) -> None:
        """Apply what was received last: at the first batch of a run everything, later what the caller has changed.

        What the executor's initializer did before the first batch of all stays.

        Args:
            set_rules: makes this process log and warn by rules; None: it already does so, as the caller's own process.

        Raises:
            WorkingFolderGone: the caller's working directory is gone. The next call tries and fails again.
        """
        assert self._pending is not None, "nothing was received"
        wanted, since = unpack(self._pending), self._applied
        begins = wanted.process is not None and self._run not in (None, self._pending_run)
        if begins:
            since = here(is_strict=False)
            worker_modules.expect_new_files()
        if not begins or self._made_exact != (wanted, since):
            _apply(wanted, since, set_rules)
            self._made_exact = (wanted, here(is_strict=False)) if begins else None
        self._run, self._applied, self._pending, self._is_exact = self._pending_run, wanted, None, begins

    def before_imports(self) -> Surroundings | None:
        """Return the state with which `after_imports` undoes what modules change while they are imported.

        The caller imported them before its surroundings were read, and may have changed what the imports did.
        """
        if self._applied.process is None:
            return None
        before = self._applied if self._is_exact else here(is_strict=False)
        self._n_modules, self._is_exact = len(sys.modules), False
        return before

    def after_imports(self, before: Surroundings | None, set_rules: RuleSetter | None) -> None:
        """Restore the surroundings of `before_imports` if any module was imported since."""
        if before is not None and len(sys.modules) != self._n_modules:
            _apply(before, here(is_strict=False), set_rules)


def _apply(wanted: Surroundings, since: Surroundings, set_rules: RuleSetter | None) -> None:
    """Change what differs between two surroundings in this process; the folder last, as that may fail."""
    to, before = wanted.process, since.process
    if to is not None and before is not None:
        _apply_state(to, before)
    if set_rules is not None:
        set_rules(wanted.rules, since.rules)
    if to is not None and before is not None and to.folder != before.folder:
        _change_folder(to.folder)
        importlib.invalidate_caches()


def _apply_state(wanted: ProcessState, since: ProcessState) -> None:
    """Change everything except the folder."""
    variables, before = {**_defaults, **wanted.environment}, {**_defaults, **since.environment}
    if variables != before:
        _set_variables(variables, before)
    if wanted.argv != since.argv:
        sys.argv[:] = wanted.argv
    if wanted.settings != since.settings:
        for name, value in wanted.settings._asdict().items():
            if value != getattr(since.settings, name):
                _SETTERS[name](value)
    if wanted.path != since.path:
        sys.path[:] = wanted.path
        importlib.invalidate_caches()


def _set_variables(wanted: Mapping[bytes, bytes], since: Mapping[bytes, bytes]) -> None:
    changed = {name for name in wanted.keys() | since.keys() if wanted.get(name) != since.get(name)}
    for name in changed:
        if name in wanted:
            os.environb[name] = wanted[name]
        else:
            os.environb.pop(name, None)
    if b"TZ" in changed:
        time.tzset()


def _change_folder(folder: str) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        raise WorkingFolderGone(
            f"The task cannot run in {folder!r}, the working directory when `run` or `submit` was called: "
            f"{error.strerror}. Keep that directory until the tasks are done.",
            folder=folder,
        ) from None


def _set_decimal(fields: tuple[Any, ...] | None) -> None:
    import decimal  # takes 2 ms, and only programs that change its context need it

    precision, rounding, least, most, capitals, clamp, names = _STANDARD_DECIMAL if fields is None else fields
    traps = [getattr(decimal, name) for name in names]
    decimal.setcontext(decimal.Context(precision, rounding, least, most, capitals, clamp, [], traps))


def _setter(owner: Any, name: str) -> Callable[[Any], None]:
    return lambda value: setattr(owner, name, value)


_SETTERS: dict[str, Callable[[Any], object]] = {
    "recursion_limit": sys.setrecursionlimit,
    "int_max_str_digits": sys.set_int_max_str_digits,
    "dont_write_bytecode": _setter(sys, "dont_write_bytecode"),
    "pycache_prefix": _setter(sys, "pycache_prefix"),
    "socket_timeout": socket.setdefaulttimeout,
    "temporary_folder": _setter(tempfile, "tempdir"),
    "locale": lambda value: locale.setlocale(locale.LC_ALL, value),
    "decimal": _set_decimal,
}
