"""What the caller's process is to its tasks, beside code and arguments: environment, folder, search path, settings.

    caller:  here(), Lookout.look() ──Surroundings──> Batch.facts ──> worker:  Follower.follow

The rule: a task sees what its caller saw when it called `run` or `submit`. Each worker process begins as the caller is
at that moment (`begin_as`). The first batch of each run then sets all of it, as tasks of earlier runs may have changed
the worker's process. Between jobs of a pool only what the caller changed meanwhile is changed in the worker.
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

from forgepar.backends.output import UNRULED, Rules, follow_rules, rules_here
from forgepar.errors import WorkingFolderGone
from forgepar.forking import fork_safe
from forgepar.values import worker_modules

_MOST_REMEMBERED = 64  # surroundings that a `Lookout` finds again: a block that patches a variable makes two
_MOST_PATH = 4097  # bytes, the closing zero included
_STANDARD_DECIMAL = (28, "ROUND_HALF_EVEN", -999999, 999999, 1, 0, ("DivisionByZero", "InvalidOperation", "Overflow"))

Rule: TypeAlias = Callable[[Rules, Rules], None]  # what `output.follow_rules` is


class Settings(NamedTuple):
    """Plain settings that hold for a whole process, or in the case of `decimal` for a thread."""

    recursion_limit: int
    int_max_str_digits: int
    dont_write_bytecode: bool
    pycache_prefix: str | None
    socket_timeout: float | None
    temporary_folder: str | None
    locale: str
    decimal: tuple[Any, ...] | None  # the fields of the context; None: as Python sets them


class Process(NamedTuple):
    """The state of a process.

    Attributes:
        environment: its variables, as bytes: they need not be text.
        folder: its working directory; empty where that was deleted.
        path: `sys.path`.
        argv: `sys.argv`.
        settings: the rest.
    """

    environment: dict[bytes, bytes]
    folder: str
    path: list[str]
    argv: list[str]
    settings: Settings


class Surroundings(NamedTuple):
    """What tasks find around them.

    Attributes:
        rules: how they log and warn.
        process: all else; None where the workers' processes are not the caller's affair.
    """

    rules: Rules
    process: Process | None = None


UNKNOWN = Surroundings(UNRULED)


def here(*, is_strict: bool = True) -> Surroundings:
    """Return the surroundings of this process.

    Args:
        is_strict: whether to refuse where the working directory was deleted.

    Raises:
        WorkingFolderGone: it was.
    """
    process = Process(_variables().copy(), _folder(is_strict), _text(sys.path), _text(sys.argv), _settings())
    return Surroundings(rules_here(), process)


def pack(surroundings: Surroundings) -> bytes:
    """Return surroundings as they travel."""
    global _last_packed  # there is one process, and it seldom changes
    known, packed = _last_packed
    if surroundings != known:
        packed = pickle.dumps(surroundings, protocol=5)
        _last_packed = surroundings, packed
    return packed


@functools.lru_cache(maxsize=4)  # the same come with run after run
def unpack(packed: bytes) -> Surroundings:
    """Return surroundings that have travelled; they are not to be changed."""
    surroundings: Surroundings = pickle.loads(packed)
    return surroundings


_last_packed = (UNKNOWN, pickle.dumps(UNKNOWN, protocol=5))


def _variables() -> dict[bytes, bytes]:
    """Return the environment, not to be changed: `os.environ` is 20 times as slow to copy or compare."""
    found = getattr(os.environ, "_data", None)
    if type(found) is dict:
        return found
    return {os.fsencode(name): os.fsencode(value) for name, value in os.environ.items()}  # a program has replaced it


def _folder(is_strict: bool) -> str:
    try:
        return os.getcwd()  # noqa: PTH109  (pathlib takes longer to load than all else here)
    except FileNotFoundError:
        if not is_strict:
            return ""
        raise WorkingFolderGone(
            "The working directory of this process was deleted, so tasks cannot run in it. "
            "Change to one that exists, by os.chdir, before tasks are run or submitted."
        ) from None


def _folder_reader() -> Callable[[], object]:
    """Return what reads the working directory without giving up the interpreter's lock.

    `os.getcwd` does, so that a thread that submits jobs waits for the one that ships them, 10 us each time. What is
    returned is for comparing alone; of a deleted folder it is None, or another text than before.
    """
    ctypes = sys.modules.get("ctypes")  # numpy has loaded it
    try:
        read = ctypes.PyDLL(None).getcwd  # type: ignore[union-attr]
    except (AttributeError, OSError):
        return partial(_folder, is_strict=True)
    buffer = ctypes.create_string_buffer(_MOST_PATH)  # type: ignore[union-attr]
    read.restype = ctypes.c_char_p  # type: ignore[union-attr]
    return partial(read, ctypes.cast(buffer, ctypes.c_void_p), ctypes.c_size_t(_MOST_PATH))  # type: ignore[union-attr]


def _text(entries: list[Any]) -> list[str]:
    """Copy a list of text; what else users put there is turned into text, as it could not be unpickled everywhere."""
    if {str}.issuperset(map(type, entries)):
        return entries[:]
    return [str(entry) for entry in entries]


def _settings() -> Settings:
    return Settings._make((*_cheap_settings(), locale.setlocale(locale.LC_ALL), _decimal()))


def _cheap_settings() -> tuple[Any, ...]:
    """Return what costs next to nothing to look at: all but the last two."""
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


class Moment(NamedTuple):
    """Surroundings as they are, or were, in this process.

    Attributes:
        number: tells them from others of one `Lookout`.
        packed: they themselves.
    """

    number: int
    packed: bytes


class Lookout:
    """Tells the surroundings of this process again and again, at 2 us where they have not changed.

    All is looked at each time but this: the locale, other fields of the `decimal` context than precision and rounding,
    and ``disabled`` of loggers. A change of these alone is seen once anything else has changed. Levels of loggers are
    known to be the same until `Logger.setLevel` or `logging.disable` is called.
    """

    def __init__(self) -> None:
        self._lock = fork_safe(threading.RLock())  # reentrant: a signal handler may look
        self._numbers = itertools.count(1)
        self._known: OrderedDict[bytes, Moment] = OrderedDict()
        self._read_folder = _folder_reader()
        self._levels_mark = object()
        self._seen: tuple[Any, ...] = ()
        self._last = Moment(0, b"")

    def look(self) -> Moment:
        """Return the surroundings; the same object as before where nothing has changed.

        Raises:
            WorkingFolderGone: the working directory was deleted.
        """
        # `setLevel` and `disable` clear these caches, of all loggers.
        is_level = self._levels_mark in logging.root._cache  # type: ignore[attr-defined]
        if is_level and self._seen == _at_a_glance(self._read_folder()):
            return self._last
        with self._lock:
            return self._look_closely()

    def _look_closely(self) -> Moment:
        cache = logging.root._cache  # type: ignore[attr-defined]
        cache.pop(self._levels_mark, None)
        mark = object()
        cache[mark] = True  # before levels are read: who changes one meanwhile removes it
        variables, path, argv, filters, *others = _at_a_glance(self._read_folder())
        seen = (variables.copy(), path[:], argv[:], filters[:], *others)
        packed = pack(here())
        known = self._known.get(packed)
        if known is None:
            known = self._known[packed] = Moment(next(self._numbers), packed)
            if len(self._known) > _MOST_REMEMBERED:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(packed)
        self._last, self._seen, self._levels_mark = known, seen, mark
        return known


def _at_a_glance(folder: object) -> tuple[Any, ...]:
    """Return what is quick to look at, beside the folder; the first four are not copies."""
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


_defaults: dict[bytes, bytes] = {}  # variables that this process has where its caller does not
_begun = UNKNOWN


def begin_as(surroundings: Surroundings, defaults: Mapping[str, str], *, with_rules: bool = True) -> None:
    """Have this process, which is to be a worker, begin as its caller is.

    Args:
        surroundings: the caller's.
        defaults: variables that this process is to have where its caller does not.
        with_rules: whether to log and warn as the caller does from now on, or from the first batch on: classes of
            warnings may be of modules that take long to import.
    """
    global _begun  # there is one process
    _defaults.update((os.fsencode(name), os.fsencode(value)) for name, value in defaults.items())
    for name, value in defaults.items():  # numpy, which classes of warnings may load, reads them then
        os.environ.setdefault(name, value)
    _begun = here(is_strict=False)
    with suppress(Exception):  # the first batch comes to the same end, and has tasks that can tell of it
        _follow(surroundings, _begun, follow_rules if with_rules else None)
        _begun = surroundings if with_rules else surroundings._replace(rules=_begun.rules)


class Follower:
    """Makes this process what the caller's was when it called `run` or `submit`."""

    def __init__(self) -> None:
        self._run: str | None = None
        self._followed = _begun
        self._is_exact = False  # whether this process is what was followed, and nothing has run since
        self._made_exact: tuple[Surroundings, Surroundings] | None = None  # what was followed, and what it made here
        self._n_modules = 0
        self._due: bytes | None = None
        self._due_run = ""

    def hear(self, run: str, packed: bytes) -> None:
        """Note what a batch brings, for `follow`.

        Args:
            run: which run it is.
            packed: the caller's surroundings.
        """
        self._due, self._due_run = packed, run

    @property
    def is_behind(self) -> bool:
        """Whether something was heard that this has not followed."""
        return self._due is not None

    def follow(self, rule: Rule | None) -> None:
        """Follow what was heard last: at the first batch of a run in all things, later in what the caller changed.

        What the executor's initializer did before the very first batch stays.

        Args:
            rule: has this process log and warn by rules; None where it does so as it is, as in the caller's own.

        Raises:
            WorkingFolderGone: the caller's working directory is gone. It is tried again, and fails again, next time.
        """
        assert self._due is not None, "there is nothing to follow"
        due, since = unpack(self._due), self._followed
        begins = due.process is not None and self._run not in (None, self._due_run)
        if begins:
            since = here(is_strict=False)
            worker_modules.expect_new_files()
        if not begins or self._made_exact != (due, since):
            _follow(due, since, rule)
            self._made_exact = (due, here(is_strict=False)) if begins else None
        self._run, self._followed, self._due, self._is_exact = self._due_run, due, None, begins

    def before_imports(self) -> Surroundings | None:
        """Return what `after_imports` needs to undo what modules do to the surroundings while they are imported.

        The caller imported them before it was looked at, and may have changed what they did.
        """
        if self._followed.process is None:
            return None
        before = self._followed if self._is_exact else here(is_strict=False)
        self._n_modules, self._is_exact = len(sys.modules), False
        return before

    def after_imports(self, before: Surroundings | None, rule: Rule | None) -> None:
        """Make the surroundings again what they were at `before_imports`, where something was imported since."""
        if before is not None and len(sys.modules) != self._n_modules:
            _follow(before, here(is_strict=False), rule)


def _follow(wanted: Surroundings, since: Surroundings, rule: Rule | None) -> None:
    """Change in this process what differs between two surroundings; the folder last, as that may fail."""
    to, before = wanted.process, since.process
    if to is not None and before is not None:
        _follow_process(to, before)
    if rule is not None:
        rule(wanted.rules, since.rules)
    if to is not None and before is not None and to.folder != before.folder:
        _change_folder(to.folder)
        importlib.invalidate_caches()


def _follow_process(wanted: Process, since: Process) -> None:
    """Change all but the folder."""
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
            f"The task cannot run in {folder!r}, the working directory of its caller when it called `run` or "
            f"`submit`: {error.strerror}. Keep that folder until its tasks are done.",
            folder=folder,
        ) from None


def _set_decimal(fields: tuple[Any, ...] | None) -> None:
    import decimal  # 2 ms, for programs that have changed its context

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
