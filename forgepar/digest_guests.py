"""Takes apart what libraries make that are not asked for: pandas, numba, pydantic.

None of them is imported for this. pandas lays the same columns out in other ways, by how they came to be: frames count
by what is in them. What numba compiles and pydantic's models hold ids of their process, which differ each time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from forgepar.merkle import Walk


def taker_of(kind: type) -> Callable[[Walk, Any], None] | None:
    """Return what takes objects of this class apart, if it is derived from one of these libraries'."""
    for base in kind.__mro__:
        top = base.__module__.partition(".")[0] if isinstance(base.__module__, str) else ""
        if top == "pandas":
            return _taker_of_frames(kind)
        if top == "numba" and base.__name__ in ("Dispatcher", "DUFunc"):
            return _take_compiled if base.__name__ == "Dispatcher" else _take_universal
        if base.__name__ == "ValidateCallWrapper" and top == "pydantic":
            return _take_validating
    return None


def _take_compiled(walk: Walk, value: Any) -> None:
    """Take apart what numba compiles: the function, and how; what it is compiled for grows as it is called."""
    walk.put("compiled", type(value).__name__)
    walk.visit(value.py_func)
    walk.visit(getattr(value, "targetoptions", None), "its options")
    if not getattr(value, "_can_compile", True):
        walk.visit([str(signature) for signature in value.signatures])


def _take_universal(walk: Walk, value: Any) -> None:
    walk.put("vectorised")
    walk.visit((value.identity, value.signature))
    _take_compiled(walk, value._dispatcher)


def _take_validating(walk: Walk, value: Any) -> None:
    """Take apart a function whose arguments pydantic looks at."""
    walk.put("validating")
    walk.visit(value.function)
    walk.visit({name: repr(kind) for name, kind in value.function.__annotations__.items()})
    walk.visit(bool(value.validate_return))
    walk.visit(value.config_wrapper.config_dict)


def is_of_pydantic(name: str) -> bool:
    """Tell whether an attribute of a class is what pydantic keeps there for itself."""
    return name.startswith("__pydantic_") or name == "__signature__"


def take_fields(walk: Walk, cls: type) -> None:
    """Take apart what pydantic knows of a class of its own: the fields, and which functions look at them when."""
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


def _taker_of_frames(kind: type) -> Callable[[Walk, Any], None] | None:
    """Return what takes objects of a class apart that is derived from one of pandas."""
    pandas: Any = sys.modules["pandas"]
    takers: tuple[tuple[Any, Callable[[Walk, Any], None]], ...] = (
        (pandas.DataFrame, _take_frame),
        (pandas.Series, _take_series),
        (pandas.RangeIndex, _take_range),
        (pandas.MultiIndex, _take_levels),
        (pandas.Index, _take_index),
        (pandas.api.extensions.ExtensionArray, _take_values),
    )
    return next((take for base, take in takers if issubclass(kind, base)), None)


def _take_head(walk: Walk, value: Any, what: str) -> None:
    walk.put(what)
    walk.visit(type(value))
    for name in getattr(value, "_metadata", ()):  # what a class of somebody's keeps beside the columns
        walk.visit(getattr(value, name, None))


def _take_frame(walk: Walk, frame: Any) -> None:
    _take_head(walk, frame, "frame")
    walk.visit((frame.attrs, frame.flags.allows_duplicate_labels, frame.shape))
    walk.visit(frame.index, "its index")
    walk.visit(frame.columns, "its columns")
    kinds = list(frame.dtypes.unique())
    if len(kinds) == 1 and isinstance(kinds[0], np.dtype):
        walk.visit(frame.to_numpy())  # without a copy, most often
        return
    for place in range(frame.shape[1]):
        _take_values(walk, frame.iloc[:, place].array)


def _take_series(walk: Walk, series: Any) -> None:
    _take_head(walk, series, "series")
    walk.visit((series.name, series.attrs, series.flags.allows_duplicate_labels))
    walk.visit(series.index, "its index")
    _take_values(walk, series.array)


def _take_range(walk: Walk, index: Any) -> None:
    walk.put("index", "range")
    walk.visit((index.name, index.start, index.stop, index.step))


def _take_levels(walk: Walk, index: Any) -> None:
    walk.put("index", "levels")
    walk.visit(list(index.names))
    for level in range(index.nlevels):
        walk.visit(index.get_level_values(level))  # a slice keeps values at its levels that it has no more


def _take_index(walk: Walk, index: Any) -> None:
    _take_head(walk, index, "index")
    walk.visit((index.name, getattr(index, "freqstr", None)))
    _take_values(walk, index.array)


def _take_values(walk: Walk, values: Any) -> None:
    pd: Any = sys.modules["pandas"]

    walk.put("values", f"{type(values.dtype).__name__} {values.dtype}")
    if isinstance(values, pd.Categorical):
        walk.visit(values.codes)
        walk.visit(values.categories)
        walk.visit(values.ordered)
    elif isinstance(values, (pd.arrays.IntegerArray, pd.arrays.FloatingArray, pd.arrays.BooleanArray)):
        walk.visit(values.isna())
        walk.visit(values.to_numpy(dtype=values.dtype.numpy_dtype, na_value=0))  # what is missing holds anything
    elif hasattr(values, "asi8"):
        walk.visit(values.asi8)
    elif isinstance(values.dtype, np.dtype):
        walk.visit(np.asarray(values))
    else:
        walk.visit(list(values))
