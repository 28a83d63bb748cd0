"""Handler that digests classes: their bases, and the contents of their bodies.

A library's class is digested by name and release. A class that a library creates for the user may have the library as
its ``__module__``; it is digested as a user's class.
"""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from forgepar.store.fingerprint.merkle import Walk
from forgepar.store.fingerprint.names import name_in_library
from forgepar.store.fingerprint.third_party import digest_fields, is_of_pydantic
from forgepar.values.modules import is_users
from forgepar.values.unchanged import attributes_of_members, registered_with

_HEAP_TYPE = 1 << 9  # flag of classes that are created at run time
_NO_CONTENT = frozenset(
    (
        "__abstractmethods__",
        "__annotate__",
        "__annotate_func__",
        "__annotations__",
        "__annotations_cache__",
        "__dataclass_fields__",  # generated methods and `digest_class` cover them
        "__dataclass_params__",
        "__dict__",
        "__doc__",
        "__firstlineno__",
        "__module__",
        "__orig_bases__",
        "__parameters__",
        "__qualname__",
        "__slotnames__",  # written by pickle
        "__slots__",
        "__static_attributes__",
        "__type_params__",
        "__weakref__",
        "_abc_impl",
    )
)
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_CODE = (types.FunctionType, type, classmethod, staticmethod, property)


def digest_class(walk: Walk, cls: type) -> None:
    """Digest a class."""
    if _is_of_library(cls):
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
        attributes = {name: own for name, own in attributes_of_members(cls).items() if own}
        if attributes:
            walk.visit(attributes, "attributes of its members", is_vouched=True)
    for name, field in getattr(cls, "__dataclass_fields__", {}).items():
        walk.put("field", f"{name} {_annotation_text(field.type)}")
        walk.visit(field.metadata, f"the metadata of field {name!r}")
    registered = registered_with(cls)
    if registered:
        walk.visit(registered, "its registered subclasses", is_vouched=True)
    digest_fields(walk, cls)
    for name, value in sorted(vars(cls).items()):
        if name in _NO_CONTENT or type(value) in _SLOTS or is_of_pydantic(name):
            continue
        if is_enum and _is_made_by_enum(cls, name, value):
            continue
        walk.put("attribute", name)
        walk.visit(value, f"the attribute {name!r} of class {cls.__qualname__}")


def _is_of_library(cls: type) -> bool:
    """Return whether a library has this class under its name; ``__module__`` alone may be misleading."""
    if not cls.__flags__ & _HEAP_TYPE or not isinstance(cls.__module__, str):  # written in C
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


HANDLERS: dict[type, Callable[[Walk, Any], None]] = {type: digest_class}
