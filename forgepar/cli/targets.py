"""Loading the workflow that a TARGET names: ``package.module:attr`` or ``path/to/file.py:attr``."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from forgepar.values.origins import send_by_value
from forgepar.workflow.workflow import Workflow

DEFAULT_ATTRIBUTE = "workflow"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class TargetError(Exception):
    """The target cannot be found, or is not a workflow."""


def load_workflow(target: str, parameters: Mapping[str, str]) -> Workflow:
    """Import a target and return its workflow.

    Args:
        target: a module or a Python file, then a colon and an attribute: a `Workflow`, or a function that returns one
            (default: ``workflow``).
        parameters: arguments for the function, as text; they are converted to the types that it declares.

    Raises:
        TargetError: the target cannot be found, or is not a workflow.
    """
    place, _, attribute = target.rpartition(":") if ":" in target else (target, "", DEFAULT_ATTRIBUTE)
    if not place or (place.startswith(".") and not place.endswith(".py")):
        raise TargetError(f"TARGET must be package.module:attr or path/to/file.py:attr, got {target!r}.")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise TargetError(f"{place} has no attribute {attribute!r}.{_did_you_mean(attribute, module)}")
        found = getattr(found, part)
    if isinstance(found, Workflow):
        if parameters:
            raise TargetError(f"{target} is a Workflow, not a function: it takes no -p {next(iter(parameters))}=...")
        return found
    if not callable(found):
        raise TargetError(f"{target} must be a Workflow or a function that returns one, got {type(found).__name__}.")
    made = found(**_convert(found, target, parameters))
    if not isinstance(made, Workflow):
        raise TargetError(f"{target}() returned a {type(made).__name__}, not a Workflow.")
    return made


def _import_module(name: str) -> types.ModuleType:
    _prepend(os.getcwd())  # noqa: PTH109  (sys.path holds text)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists, and imports another that does not
        raise TargetError(
            f"there is no module {name!r} in the current folder or among installed packages. "
            "Give package.module:attr, or path/to/file.py:attr."
        ) from None


def _import_file(path: Path) -> types.ModuleType:
    """Import a file by its stem, from its folder. Its body runs only here, not in workers, as for a script."""
    path = path.resolve()
    if not path.is_file():
        raise TargetError(f"there is no file {path}. Give path/to/file.py:attr.")
    if "." in path.stem:
        raise TargetError(f"{path.name} cannot be imported: its name contains a dot. Rename the file.")
    _prepend(str(path.parent))
    if path.stem not in sys.modules:
        send_by_value(path.stem)  # before its body runs: that may run workflows
    module = importlib.import_module(path.stem)
    if module.__file__ is None or Path(module.__file__).resolve() != path:
        raise TargetError(
            f"{path.name} has the name of another module, {module.__file__ or 'a built-in one'}. Rename the file."
        )
    return module


def _prepend(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _did_you_mean(attribute: str, module: types.ModuleType) -> str:
    public = [name for name, value in vars(module).items() if isinstance(value, Workflow) or inspect.isfunction(value)]
    near = difflib.get_close_matches(attribute, public, n=1)
    if near:
        return f" Did you mean {near[0]!r}?"
    workflows = [name for name, value in vars(module).items() if isinstance(value, Workflow)]
    return f" It has the workflows {', '.join(workflows)}." if workflows else " Add its name after a colon."


def _convert(function: Callable[..., Any], target: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    """Convert texts to the arguments that a function declares."""
    declared = inspect.signature(function).parameters
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # without annotations, texts are parsed as literals
        hints = {}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in declared.values())
    for name in parameters:
        if name not in declared and not open_ended:
            raise TargetError(f"{target} has no parameter {name!r}. Its parameters: {', '.join(declared) or 'none'}.")
    missing = [
        name
        for name, p in declared.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name not in parameters
    ]
    if missing:
        raise TargetError(f"{target} needs {', '.join(missing)}. Give {' '.join(f'-p {n}=...' for n in missing)}.")
    return {name: _read(name, text, hints.get(name)) for name, text in parameters.items()}


def _read(name: str, text: str, hint: Any) -> Any:
    """Parse a value as its declared type, or the first type of a union that accepts it; else as a literal or text."""
    kinds = _alternatives(hint)
    for kind in kinds:
        try:
            return _as_kind(text, kind)
        except ValueError:
            continue
    if kinds:
        wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise TargetError(f"-p {name} must be {wanted}, got {text}.")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _alternatives(hint: Any) -> Sequence[Any]:
    if hint is None or hint is Any:
        return ()
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return (hint,)


def _as_kind(text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
        raise ValueError(text)
    if kind in (int, float, str, Path):
        return kind(text)
    try:
        return ast.literal_eval(text)
    except SyntaxError as error:
        raise ValueError(text) from error
