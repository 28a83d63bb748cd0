"""Values that nobody should give, made anew for each use: what the fuzz of arguments draws from.

Workers import this module, so it loads neither hypothesis nor pytest.
"""

from __future__ import annotations

import decimal
import enum
import fractions
import functools
import io
import math
import threading
from collections import UserDict, UserList, UserString, deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

import forgepar as fp


class Fault(Exception):
    """What an odd object raises in a method of its own; nothing else raises it."""


def _fails(self, *_args, **_kwargs):
    raise Fault("a method of an odd object was called")


class FailingRepr:
    __repr__ = __str__ = _fails


class FailingEq:
    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = _fails
    __hash__ = None


class FailingHash:
    __hash__ = _fails


class FailingBool:
    __bool__ = _fails


class FailingLen:
    __len__ = _fails


class FailingIter:
    """Raises when it is gone through: that is passed on, as it is the user's own code."""

    __iter__ = _fails


class FailingAttributes:
    def __getattr__(self, name):
        raise Fault(f"the attribute {name}")


class FailingFloat:
    __float__ = __int__ = __index__ = _fails


class FailingPath:
    __fspath__ = _fails


class FailingPickle:
    __reduce_ex__ = _fails


class FailingAll:
    __repr__ = __str__ = __eq__ = __ne__ = __lt__ = __gt__ = __hash__ = __bool__ = __len__ = __format__ = _fails
    __contains__ = __float__ = __int__ = __index__ = _fails


class EmptyIndex:
    """Says that it is an integer, and of no use as one."""

    def __index__(self):
        return 10**30


class PathOfBytes:
    def __fspath__(self):
        return b"bytes"


class Word(enum.StrEnum):
    """Is text, and reads otherwise."""

    X = "x"


class Number(enum.IntEnum):
    THREE = 3


class Meta(type):
    __repr__ = _fails


class OddClass(metaclass=Meta):
    pass


def raises(*_args, **_kwargs):
    raise LookupError("as it is told to")


def identity(value=None, *_others, **_more):
    return value


def add(left, right=0):
    return left + right


async def coroutine(*_args):
    return 1


def generator(*_args):
    yield 1


def _closed_executor():
    executor = fp.WorkflowExecutor(backend="inline")
    executor.close()
    return executor


def _shut_pool():
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    return pool


def _used_iterator():
    used = iter([1])
    next(used)
    return used


def _foreign_handle():
    return fp.Workflow("another").add(abs, 1)


def _closed_file():
    stream = io.StringIO()
    stream.close()
    return stream


def _holds_itself():
    held = []
    held.append(held)
    return held


def _deep(n=3000):
    value = []
    for _ in range(n):
        value = [value]
    return value


def _cancelled_future():
    future = Future()
    future.cancel()
    return future


ODD = {
    "0": lambda: 0,
    "-1": lambda: -1,
    "1": lambda: 1,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "-0.0": lambda: -0.0,
    "1e308": lambda: 1e308,
    "5e-324": lambda: 5e-324,
    "2**31": lambda: 2**31,
    "2**63-1": lambda: 2**63 - 1,
    "2**63": lambda: 2**63,
    "2**64": lambda: 2**64,
    "-2**63": lambda: -(2**63),
    "10**400": lambda: 10**400,  # no float
    "10**5000": lambda: 10**5000,  # nor a text: its repr raises ValueError
    "True": lambda: True,
    "False": lambda: False,
    "complex": lambda: 1j,
    "Decimal": lambda: decimal.Decimal("1.5"),
    "Decimal nan": lambda: decimal.Decimal("nan"),
    "Decimal signalling nan": lambda: decimal.Decimal("snan"),
    "Decimal 1e999": lambda: decimal.Decimal("1e999"),
    "Fraction": lambda: fractions.Fraction(1, 3),
    "int8": lambda: np.int8(3),
    "uint64": lambda: np.uint64(2**64 - 1),
    "float16": lambda: np.float16("inf"),
    "float32": lambda: np.float32(0.5),
    "longdouble": lambda: np.longdouble("1e4000"),
    "numpy bool": lambda: np.True_,
    "numpy text": lambda: np.str_("x"),
    "datetime64": lambda: np.datetime64("NaT"),
    "0-d array": lambda: np.array(3),
    "empty array": lambda: np.zeros(0),
    "array of objects": lambda: np.array([None, "x"], object),
    "array 2-d": lambda: np.ones((2, 2)),
    "masked": lambda: np.ma.masked,
    "bytes": lambda: b"x\0",
    "bytearray": lambda: bytearray(b"ab"),
    "memoryview": lambda: memoryview(b"ab"),
    "empty text": lambda: "",
    "blank": lambda: " \t",
    "surrogate": lambda: "a\udcff",
    "NUL": lambda: "a\0b",
    "newline": lambda: "a\nb",
    "escape": lambda: "\x1b[2Jx",
    "slash": lambda: "a/b",
    "braces": lambda: "{a} {0} {",
    "percent": lambda: "%s %(x)d %",
    "glob": lambda: "[*?",
    "long text": lambda: "x" * 70_000,
    "size": lambda: "1e400GiB",
    "huge size": lambda: "9" * 400,
    "digits": lambda: "9" * 5000,
    "none text": lambda: "None",
    "text of an enum": lambda: Word.X,
    "number of an enum": lambda: Number.THREE,
    "UserString": lambda: UserString("x"),
    "UserList": lambda: UserList([1]),
    "UserDict": lambda: UserDict(a=1),
    "missing path": lambda: Path("no") / "such" / "file",
    "folder": lambda: Path(),
    "folder text": lambda: ".",
    "below a device": lambda: Path("/dev/null/x"),
    "in proc": lambda: "/proc/nobody/x",
    "full": lambda: "/dev/full",
    "long name": lambda: "n" * 300,
    "deep path": lambda: "d/" * 3000,
    "path of bytes": PathOfBytes,
    "None": lambda: None,
    "Ellipsis": lambda: ...,
    "NotImplemented": lambda: NotImplemented,
    "object": object,
    "list": list,
    "list of None": lambda: [None],
    "list of lists": lambda: [[1, 2], [3]],
    "list of text": lambda: ["a", "a"],
    "tuple": tuple,
    "set": lambda: {1, 2},
    "frozenset": frozenset,
    "dict": dict,
    "dict of wrong keys": lambda: {1: 2, None: 3, (): 4},
    "dict of wrong values": lambda: {"a": object()},
    "dict of nan": lambda: {math.nan: math.nan},
    "deque": lambda: deque([1]),
    "range": lambda: range(3),
    "empty range": lambda: range(0),
    "generator": lambda: (i for i in range(2)),
    "generator function": lambda: generator,
    "used iterator": _used_iterator,
    "failing generator": lambda: (1 // 0 for _ in range(2)),
    "holds itself": _holds_itself,
    "deep": _deep,
    "slice": lambda: slice(None),
    "slice of text": lambda: slice("a", "b"),
    "lambda": lambda: lambda: None,
    "lambda of five": lambda: lambda a, b, c, d, e: None,
    "lambda of keyword": lambda: lambda *, needed: None,
    "raising": lambda: raises,
    "coroutine function": lambda: coroutine,
    "partial": lambda: functools.partial(add, 1, 2, 3),
    "partial of class": lambda: functools.partial(int, base="x"),
    "partialmethod": lambda: functools.partialmethod(add, 1),
    "staticmethod": lambda: staticmethod(identity),
    "property": lambda: property(identity),
    "bound method": lambda: [].append,
    "builtin": lambda: print,
    "ufunc": lambda: np.add,
    "class": lambda: int,
    "exception class": lambda: KeyError,
    "exceptions": lambda: (KeyError, OSError),
    "exception": lambda: KeyError("x"),
    "BaseException class": lambda: KeyboardInterrupt,
    "odd class": lambda: OddClass,
    "module": lambda: math,
    "lock": threading.Lock,
    "event": threading.Event,
    "closed file": _closed_file,
    "text stream": io.StringIO,
    "future": Future,
    "cancelled future": _cancelled_future,
    "foreign handle": _foreign_handle,
    "foreign handles": lambda: fp.Workflow("another").map(abs, [1, 2]),
    "workflow": lambda: fp.Workflow("another"),
    "Workflow class": lambda: fp.Workflow,
    "closed executor": _closed_executor,
    "shut pool": _shut_pool,
    "task": lambda: fp.task(identity),
    "task with options": lambda: fp.task(identity).options(retries=2, name="named"),
    "command": lambda: fp.shell("true"),
    "command with a field": lambda: fp.shell("echo {field}"),
    "options": fp.Options,
    "backoff": lambda: fp.Backoff(1.0),
    "token": fp.CancellationToken,
    "resume": fp.Resume,
    "fallback": fp.SkipFallback,
    "subflow class": lambda: fp.Subflow,
    "graph": lambda: fp.Adjacency.from_edges(2, [0], [1]),
    "failing repr": FailingRepr,
    "failing eq": FailingEq,
    "failing hash": FailingHash,
    "failing bool": FailingBool,
    "failing len": FailingLen,
    "failing iter": FailingIter,
    "failing attributes": FailingAttributes,
    "failing float": FailingFloat,
    "failing path": FailingPath,
    "failing pickle": FailingPickle,
    "failing all": FailingAll,
    "empty index": EmptyIndex,
}
