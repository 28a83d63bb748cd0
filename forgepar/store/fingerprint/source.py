"""Which names of a loaded module are not explained by its source, so that their values must be digested as well.

A module that a function imports is digested by its source, whether or not the caller has loaded it. A loaded module may
differ from its source: the file was edited, or names were assigned. The source explains functions with the code that it
compiles to, classes of such functions, and literals.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Iterator, Mapping
from typing import Any

from forgepar.values.comparison import MISSING, same
from forgepar.values.origins import travels_by_value

_OF_CLASS = frozenset(
    (
        "__annotate_func__",
        "__annotations__",
        "__annotations_cache__",
        "__dict__",
        "__doc__",
        "__firstlineno__",  # this and `__static_attributes__` since Python 3.13
        "__module__",
        "__qualname__",
        "__slotnames__",  # written by pickle
        "__static_attributes__",
        "__weakref__",
    )
)


def unexplained(module: types.ModuleType, source: bytes, code: types.CodeType) -> Iterator[tuple[str, Any]]:
    """Yield the module's own names that its source does not explain, sorted, with their values.

    Args:
        module: a loaded module.
        source: of its file.
        code: the compiled source.
    """
    try:
        body = _body(ast.parse(source).body)
    except (SyntaxError, ValueError):
        body = {}
    codes = {inner.co_qualname: inner for inner in _inner(code)}
    for name, value in sorted(vars(module).items()):
        if name.startswith("__") or isinstance(value, types.ModuleType):
            continue
        is_code = isinstance(value, (types.FunctionType, type))
        is_own = (
            not is_code or name in body or value.__module__ == module.__name__ or travels_by_value(value.__module__)
        )
        if is_own and not _is_explained(value, body.get(name), codes):
            yield name, value


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _inner(constant)


def _body(statements: list[ast.stmt]) -> dict[str, ast.AST]:
    """Return the node that binds each name: its definition, or the assigned value."""
    found: dict[str, ast.AST] = {}
    for statement in statements:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            found.update({target.id: statement.value for target in statement.targets if isinstance(target, ast.Name)})
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            found[statement.target.id] = statement.value
    return found


def _is_explained(value: Any, node: ast.AST | None, codes: Mapping[str, types.CodeType]) -> bool:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return type(value) is types.FunctionType and not value.__closure__ and _has_code(value, node, codes)
    if isinstance(node, ast.ClassDef):
        if type(value) is not type or node.decorator_list or node.keywords:
            return False
        body = _body(node.body)
        own = {name: part for name, part in vars(value).items() if name not in _OF_CLASS and not _is_slot(part)}
        return all(_is_explained(part, body.get(name), codes) for name, part in own.items())
    return node is not None and same(_literal(node), value)


def _has_code(fn: types.FunctionType, node: ast.FunctionDef | ast.AsyncFunctionDef, codes: Mapping[str, Any]) -> bool:
    if node.decorator_list or codes.get(fn.__qualname__) != fn.__code__ or fn.__dict__:
        return False
    defaults = tuple(map(_literal, node.args.defaults))
    by_name = [*zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    keywords = {argument.arg: _literal(default) for argument, default in by_name if default is not None}
    return same(fn.__defaults__ or (), defaults) and same(fn.__kwdefaults__ or {}, keywords)


def _is_slot(part: Any) -> bool:
    return isinstance(part, (types.MemberDescriptorType, types.GetSetDescriptorType))


def _literal(node: Any) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return MISSING
