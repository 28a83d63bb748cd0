"""What a code object does, independent of how its source is written: steps, constants and references to global names.

Left out are lines, comments, docstrings, names of local variables, debugging information, and what the interpreter
writes into code that runs often. Names of arguments stay, as calls may use them.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

_KEPT_FLAGS = (
    inspect.CO_VARARGS
    | inspect.CO_VARKEYWORDS
    | inspect.CO_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ITERABLE_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
)
_NO_STEPS = frozenset(("CACHE", "EXTENDED_ARG", "NOP", "NOT_TAKEN"))
# A class's body stores metadata of the class; Python 3.13.0 stores it in the order of a set.
_CLASS_METADATA = frozenset(("__doc__", "__firstlineno__", "__qualname__", "__static_attributes__"))
_FLAG_BITS = {
    "LOAD_GLOBAL": 1,
    "LOAD_ATTR": 1,
    "LOAD_SUPER_ATTR": 3,
}  # low bits of the operand, below the index of the name
_HAS_FLAG_IN_ATTR = "LOAD_METHOD" not in dis.opmap
_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))
_GLOBALS = frozenset(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"))
_ATTRIBUTES = frozenset(("LOAD_ATTR", "LOAD_METHOD"))
_READ_NAMES = frozenset(("eval", "exec", "locals", "vars"))


class Reference(NamedTuple):
    """Global name with the attributes taken from it, or an import with the names taken from the module."""

    names: tuple[str, ...]
    is_import: bool = False
    level: int = 0


class CodeSteps(NamedTuple):
    """Steps of a code object.

    Attributes:
        text: the steps, one per line.
        constants: the constants that they load, in order.
    """

    text: str
    constants: tuple[Any, ...]


def steps_of(code: types.CodeType) -> CodeSteps:
    """Return the steps of a code object; two that are equal do the same."""
    steps = _relevant_steps(code)
    offsets = [step.offset for step in steps]
    n_arguments = code.co_argcount + code.co_kwonlyargcount
    shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & _KEPT_FLAGS)
    lines = [repr((shape, code.co_varnames[:n_arguments]))]
    constants = []
    for step in steps:
        if step.opcode in dis.hasconst:
            constants.append(step.argval)
        lines.append(f"{step.opname} {_operand(step, offsets)}")
    for entry in dis.Bytecode(code).exception_entries:  # type: ignore[attr-defined]
        places = [bisect_left(offsets, at) for at in (entry.start, entry.end, entry.target)]
        lines.append(repr((*places, entry.depth, entry.lasti)))
    if _READ_NAMES.intersection(code.co_names):
        lines.append(repr((code.co_varnames, code.co_cellvars, code.co_freevars)))
    return CodeSteps("\n".join(lines), tuple(constants))


def _relevant_steps(code: types.CodeType) -> Sequence[dis.Instruction]:
    steps = [step for step in dis.get_instructions(code) if step.opname not in _NO_STEPS]
    if code.co_flags & inspect.CO_OPTIMIZED:
        return steps
    metadata: set[int] = set()
    for place, (load, store) in enumerate(pairwise(steps)):
        is_metadata = store.opname == "STORE_NAME" and store.argval in _CLASS_METADATA
        if is_metadata and load.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            metadata |= {place, place + 1}
    return [step for place, step in enumerate(steps) if place not in metadata]


def _operand(step: dis.Instruction, offsets: Sequence[int]) -> str:
    if step.arg is None or step.opcode in dis.hasconst:
        return ""
    if step.opcode in _JUMPS:
        return f"to {bisect_left(offsets, step.argval)}"
    if step.opcode in dis.hasname:
        bits = 0 if step.opname == "LOAD_ATTR" and not _HAS_FLAG_IN_ATTR else _FLAG_BITS.get(step.opname, 0)
        return f"{step.argval} {step.arg & bits}"
    return str(step.arg)


@functools.lru_cache(maxsize=4096)
def references_of(code: types.CodeType) -> tuple[Reference, ...]:
    """Return the references of a code object and of the code within it, each once, in order."""
    found: dict[Reference, None] = {}
    for part in _nested(code):
        found.update(dict.fromkeys(_references(part)))
    return tuple(found)


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _references(code: types.CodeType) -> Iterator[Reference]:
    chain: tuple[str, ...] = ()
    loaded: tuple[Any, Any] = (0, None)
    for step in dis.get_instructions(code):
        if step.opname in _NO_STEPS:
            continue
        if chain and step.opname in _ATTRIBUTES:
            chain = (*chain, step.argval)
            continue
        if chain:
            yield Reference(chain)
        chain = (step.argval,) if step.opname in _GLOBALS else ()
        if step.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            loaded = (loaded[1], step.argval)
        elif step.opname == "IMPORT_NAME":
            level, names = loaded
            taken = names if isinstance(names, tuple) else ()
            yield Reference((step.argval, *taken), True, level if isinstance(level, int) else 0)
    if chain:
        yield Reference(chain)
