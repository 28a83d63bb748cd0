"""Handlers that digest objects of pandas, numba and pydantic, without importing these libraries.

pandas may lay out equal frames differently in memory, so frames are digested by content. Pickles of numba's compiled
functions and of pydantic's models contain ids of the process, so these are digested by what defines them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from forgepar.store.fingerprint.merkle import Walk


def handler_of(kind: type) -> Callable[[Walk, Any], None] | None:
    """Return the handler of a class that derives from a class of these libraries; None: there is none."""
    for base in kind.__mro__:
        top = base.__module__.partition(".")[0] if isinstance(base.__module__, str) else ""
        if top == "pandas":
            return _handler_of_frames(kind)
        if top == "numba" and base.__name__ in ("Dispatcher", "DUFunc"):
            return _digest_compiled if base.__name__ == "Dispatcher" else _digest_universal
        if base.__name__ == "ValidateCallWrapper" and top == "pydantic":
            return _digest_validating
    return None


def _digest_compiled(walk: Walk, value: Any) -> None:
    """Digest a function compiled by numba: its Python function and options; its signatures grow with calls."""
    walk.put("compiled", type(value).__name__)
    walk.visit(value.py_func)
    walk.visit(getattr(value, "targetoptions", None), "its options")
    if not getattr(value, "_can_compile", True):
        walk.visit([str(signature) for signature in value.signatures])


def _digest_universal(walk: Walk, value: Any) -> None:
    walk.put("vectorised")
    walk.visit((value.identity, value.signature))
    _digest_compiled(walk, value._dispatcher)


def _digest_validating(walk: Walk, value: Any) -> None:
    """Digest a function with arguments that pydantic validates."""
    walk.put("validating")
    walk.visit(value.function)
    walk.visit({name: repr(kind) for name, kind in value.function.__annotations__.items()})
    walk.visit(bool(value.validate_return))
    walk.visit(value.config_wrapper.config_dict)


def is_of_pydantic(name: str) -> bool:
    """Return whether pydantic generates the class attribute of this name."""
    return name.startswith("__pydantic_") or name == "__signature__"


def digest_fields(walk: Walk, cls: type) -> None:
    """Digest the fields and validators of a pydantic model."""
    fields = vars(cls).get("__pydantic_fields__")
    decorators = vars(cls).get("__pydantic_decorators__")
    if fields is not None:
        walk.put("fields")
        walk.visit({name: repr(field) for name, field in fields.items()})
        walk.visit([(field.default, field.default_factory, field.metadata) for field in fields.values()])
    for group in sorted(getattr(decorators, "__dataclass_fields__", ())):
        for name, decorator in getattr(decorators, group).items():
            walk.put("decorated", f"{group} {name}")
            walk.visit(decorator.info)


# Frames


def _handler_of_frames(kind: type) -> Callable[[Walk, Any], None] | None:
    """Return the handler of a class that derives from a class of pandas."""
    pandas: Any = sys.modules["pandas"]
    handlers: tuple[tuple[Any, Callable[[Walk, Any], None]], ...] = (
        (pandas.DataFrame, _digest_frame),
        (pandas.Series, _digest_series),
        (pandas.RangeIndex, _digest_range),
        (pandas.MultiIndex, _digest_levels),
        (pandas.Index, _digest_index),
        (pandas.api.extensions.ExtensionArray, _digest_values),
    )
    return next((handler for base, handler in handlers if issubclass(kind, base)), None)


def _digest_head(walk: Walk, value: Any, what: str) -> None:
    walk.put(what)
    walk.visit(type(value))
    for name in getattr(value, "_metadata", ()):  # attributes that subclasses declare
        walk.visit(getattr(value, name, None))


def _digest_frame(walk: Walk, frame: Any) -> None:
    _digest_head(walk, frame, "frame")
    walk.visit((frame.attrs, frame.flags.allows_duplicate_labels, frame.shape))
    walk.visit(frame.index, "its index")
    walk.visit(frame.columns, "its columns")
    kinds = list(frame.dtypes.unique())
    if len(kinds) == 1 and isinstance(kinds[0], np.dtype):
        walk.visit(frame.to_numpy())  # usually without a copy
        return
    for place in range(frame.shape[1]):
        _digest_values(walk, frame.iloc[:, place].array)


def _digest_series(walk: Walk, series: Any) -> None:
    _digest_head(walk, series, "series")
    walk.visit((series.name, series.attrs, series.flags.allows_duplicate_labels))
    walk.visit(series.index, "its index")
    _digest_values(walk, series.array)


def _digest_range(walk: Walk, index: Any) -> None:
    walk.put("index", "range")
    walk.visit((index.name, index.start, index.stop, index.step))


def _digest_levels(walk: Walk, index: Any) -> None:
    walk.put("index", "levels")
    walk.visit(list(index.names))
    for level in range(index.nlevels):
        walk.visit(index.get_level_values(level))  # the levels of a slice still have values that it lacks


def _digest_index(walk: Walk, index: Any) -> None:
    _digest_head(walk, index, "index")
    walk.visit((index.name, getattr(index, "freqstr", None)))
    _digest_values(walk, index.array)


def _digest_values(walk: Walk, values: Any) -> None:
    pd: Any = sys.modules["pandas"]

    walk.put("values", f"{type(values.dtype).__name__} {values.dtype}")
    if isinstance(values, pd.Categorical):
        walk.visit(values.codes)
        walk.visit(values.categories)
        walk.visit(values.ordered)
    elif isinstance(values, (pd.arrays.IntegerArray, pd.arrays.FloatingArray, pd.arrays.BooleanArray)):
        walk.visit(values.isna())
        walk.visit(values.to_numpy(dtype=values.dtype.numpy_dtype, na_value=0))  # missing items have arbitrary values
    elif hasattr(values, "asi8"):
        walk.visit(values.asi8)
    elif isinstance(values.dtype, np.dtype):
        walk.visit(np.asarray(values))
    else:
        walk.visit(list(values))
