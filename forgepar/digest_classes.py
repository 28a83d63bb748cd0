"""Takes classes apart, for their digests: what they derive from, and all that their body holds.

Of a library's class the name counts, and the release. One that a library makes for the user may bear the library's
name; it is taken apart like any other.
"""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from forgepar.digest_guests import is_of_pydantic, take_fields
from forgepar.libraries import is_users, name_in_library
from forgepar.merkle import Walk

_HEAP_TYPE = 1 << 9  # a class that is made when the program runs
_NO_CONTENT = frozenset(
    (
        "__abstractmethods__",
        "__annotate__",
        "__annotate_func__",
        "__annotations__",
        "__annotations_cache__",
        "__dataclass_fields__",  # the methods made from them tell; the rest of them is looked at apart
        "__dataclass_params__",
        "__dict__",
        "__doc__",
        "__firstlineno__",
        "__module__",
        "__orig_bases__",
        "__parameters__",
        "__qualname__",
        "__slotnames__",  # of which pickle keeps note there
        "__slots__",
        "__static_attributes__",
        "__type_params__",
        "__weakref__",
        "_abc_impl",
    )
)
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_CODE = (types.FunctionType, type, classmethod, staticmethod, property)


def take_class(walk: Walk, cls: type) -> None:
    """Take a class apart."""
    if _is_librarys(cls):
        module = cls.__module__ if isinstance(cls.__module__, str) else ""
        walk.put("class", name_in_library(module, cls.__qualname__))
        return
    walk.put("class", cls.__name__)
    walk.visit(type(cls))
    for base in cls.__bases__:
        walk.visit(base)
    is_enum = issubclass(type(cls), enum.EnumMeta)
    if is_enum:
        members: Mapping[str, enum.Enum] = cls.__members__  # type: ignore[attr-defined]
        walk.visit([(name, member.value) for name, member in members.items()], "its members")
    for name, field in getattr(cls, "__dataclass_fields__", {}).items():
        walk.put("field", f"{name} {_annotation_text(field.type)}")
        walk.visit(field.metadata, f"the metadata of field {name!r}")
    take_fields(walk, cls)
    for name, value in sorted(vars(cls).items()):
        if name in _NO_CONTENT or type(value) in _SLOTS or is_of_pydantic(name):
            continue
        if is_enum and _is_made_by_enum(cls, name, value):
            continue
        walk.put("attribute", name)
        walk.visit(value, f"the attribute {name!r} of class {cls.__qualname__}")


def _is_librarys(cls: type) -> bool:
    """Tell whether a class is what a library has under its name; one that is made for the user may only say so."""
    if not cls.__flags__ & _HEAP_TYPE or not isinstance(cls.__module__, str):  # it is made in C
        return True
    if is_users(cls.__module__):
        return False
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is cls


def _is_made_by_enum(cls: Any, name: str, value: Any) -> bool:
    if name in cls.__members__:
        return True
    return name.startswith("_") and name.endswith("_") and not issubclass(type(value), _CODE)


def _annotation_text(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    return annotation.__qualname__ if type(annotation) is type else repr(annotation).partition(" at 0x")[0]


TAKERS: dict[type, Callable[[Walk, Any], None]] = {type: take_class}
