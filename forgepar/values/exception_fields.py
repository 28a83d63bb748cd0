"""Parts of exceptions, read and written without calling code of their classes, which may raise or do anything.

args, attributes, fields (slots, and what builtin exceptions keep in C)      fields_of, create, furnish
cause, context, message and members of a group                               the descriptors in capitals
class, as another process finds it                                           names_of, place_of, class_at
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import BuiltinFunctionType, GetSetDescriptorType, MemberDescriptorType
from typing import Any

from forgepar.errors import text_of

ARGS: Any = vars(BaseException)["args"]
CAUSE: Any = vars(BaseException)["__cause__"]
CONTEXT: Any = vars(BaseException)["__context__"]
IS_SUPPRESSED: Any = vars(BaseException)["__suppress_context__"]
ATTRIBUTES: Any = vars(BaseException)["__dict__"]
MESSAGE: Any = vars(BaseExceptionGroup)["message"]
MEMBERS: Any = vars(BaseExceptionGroup)["exceptions"]

_WITHOUT_FIELDS = frozenset((object, BaseException, Exception, BaseExceptionGroup, ExceptionGroup))
_PLAIN = frozenset((type(None), bool, int, float, str))
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that is not builtin
_OWN_PICKLING = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__")
_BY_VALUE = ""  # in place of a module: the name is the mark of a class that was pickled by value
_REAL_CLASS = "__forgepar_class__"


class NotSent:
    """Placeholder for an attribute or argument of an exception that could not be pickled in the worker.

    It has those attributes of the object that are numbers or text, and its ``str``.

    Args:
        what: the object.
    """

    def __init__(self, what: object) -> None:
        try:
            plain = {name: value for name, value in vars(what).items() if type(value) in _PLAIN}
        except Exception:
            plain = {}
        self.__dict__ |= {**plain, "_type_not_sent": name_of(type(what)), "_text_not_sent": text_of(what)}

    def __getattr__(self, name: str) -> Any:
        kind = self.__dict__.get("_type_not_sent", "")
        raise AttributeError(f"{name!r} of a {kind} was not sent from the worker", name=name, obj=self)

    def __repr__(self) -> str:
        return f"<not sent: {self._type_not_sent}>"

    def __str__(self) -> str:
        return str(self._text_not_sent)


# The object


def fields_of(error: BaseException) -> dict[str, Any]:
    """Return the slots and C fields of an exception that are set, except those that every exception has."""
    fields = dict[str, Any]()
    for base in type(error).__mro__:
        for name, descriptor in vars(base).items() if base not in _WITHOUT_FIELDS else ():
            if isinstance(descriptor, (MemberDescriptorType, GetSetDescriptorType)) and name not in fields:
                try:
                    fields[name] = descriptor.__get__(error)
                except Exception:  # noqa: S112  (the field is not set)
                    continue
    fields.pop("__dict__", None)
    fields.pop("__weakref__", None)
    return fields


def notes_of(error: BaseException) -> Iterator[str]:
    """Yield an exception's notes as text, whatever the type of its ``__notes__``."""
    notes = ATTRIBUTES.__get__(error).get("__notes__", ())
    yield from map(text_of, notes if type(notes) in (list, tuple) else (notes,))


def create(kind: type[BaseException], message: str, members: Sequence[BaseException]) -> BaseException:
    """Make an exception without calling its constructor: empty, except for the members of a group."""
    new = _new_of(kind)
    error: BaseException = new(kind, message, list(members)) if issubclass(kind, BaseExceptionGroup) else new(kind)
    return error


def furnish(
    error: BaseException, args: tuple[Any, ...], attributes: Mapping[str, Any], fields: Mapping[str, Any]
) -> None:
    """Set the args, attributes and fields of an exception."""
    ARGS.__set__(error, args)
    ATTRIBUTES.__get__(error).update(attributes)
    found = fields_of(error)
    for name, value in fields.items():
        descriptor = _field(type(error), name)
        # An unset C field reads as None, but differs from one that was set to None.
        if descriptor is not None and found.get(name, error) is not value:
            with suppress(AttributeError, TypeError):  # read-only, so it is derived from another field
                descriptor.__set__(error, value)


def is_same(made: Any, error: BaseException) -> bool:
    """Return whether an exception equals the one that it was made from; notes, cause and context are ignored."""
    if type(made) is not type(error) or str(made) != str(error):
        return False
    attributes = [dict(ATTRIBUTES.__get__(one)) for one in (made, error)]
    for names in attributes:
        names.pop("__notes__", None)
    parts = [(ARGS.__get__(made), ARGS.__get__(error)), attributes, (fields_of(made), fields_of(error))]
    return all(type(one) is type(other) and bool(one == other) for one, other in parts)


def has_text(error: BaseException) -> bool:
    """Return whether an exception's ``str`` does not raise."""
    try:
        str(error)
    except BaseException:
        return False
    return True


def pickles_itself(kind: type) -> bool:
    """Return whether a class, or a base that is not builtin, defines its own pickling."""
    own = [vars(base) for base in kind.__mro__ if base.__flags__ & _HEAP_TYPE]
    return any(name in names for names in own for name in _OWN_PICKLING)


def refuses(error: BaseException) -> bool:
    """Return whether an exception refuses to be pickled: its own method for that raises."""
    try:
        error.__reduce_ex__(5)
    except BaseException:
        return True
    return False


def _new_of(kind: type) -> Callable[..., Any]:
    """Return the first ``__new__`` of a class that is written in C, which only allocates the object."""
    found = (vars(base).get("__new__") for base in kind.__mro__)
    return next(new for new in found if isinstance(new, BuiltinFunctionType))


def _field(kind: type, name: str) -> Any:
    """Return the descriptor of a slot or C field."""
    for base in kind.__mro__:
        descriptor = vars(base).get(name)
        if base not in _WITHOUT_FIELDS and isinstance(descriptor, (MemberDescriptorType, GetSetDescriptorType)):
            return descriptor
    return None


# The class


def name_of(kind: type) -> str:
    """Return the qualified name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def names_of(kind: type) -> tuple[str, ...]:
    """Return the qualified names of a class and of its bases."""
    return tuple(map(name_of, kind.__mro__[:-1]))


def is_importable(kind: type) -> bool:
    """Return whether a class is found under its own name in a module that any process can import."""
    found: Any = None if kind.__module__ == "__main__" else sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


def place_of(kind: type) -> tuple[str, str] | None:
    """Return where another process may have a class, for `class_at`; None if only under its name.

    A class that a factory made may have another name in its module. A class that was pickled by value has a mark.
    """
    if is_importable(kind):
        return None
    module = sys.modules.get(kind.__module__)
    if module is not None and kind.__module__ != "__main__":
        for name, value in list(vars(module).items()):
            if value is kind:
                return kind.__module__, name
    mark = _tracker("_DYNAMIC_CLASS_TRACKER_BY_CLASS").get(kind)
    return None if mark is None else (_BY_VALUE, mark)


def class_at(place: tuple[str, str]) -> Any:
    """Return the class at a place, or None.

    Raises:
        BaseException: whatever importing its module raises.
    """
    module, name = place
    if module == _BY_VALUE:
        return _tracker("_DYNAMIC_CLASS_TRACKER_BY_ID").get(name)
    return getattr(importlib.import_module(module), name, None)


def _tracker(name: str) -> Mapping[Any, Any]:
    """Return cloudpickle's table of the classes that were pickled or unpickled by value in this process."""
    pickled = sys.modules.get("cloudpickle.cloudpickle")
    found: Mapping[Any, Any] = getattr(pickled, name, {})
    return found


def with_text(kind: type[BaseException], text: str) -> type[BaseException]:
    """Return a subclass with a fixed ``__str__``, for an exception that has lost what its text is made from.

    It is the class itself if its bases or metaclass would notice a subclass.
    """
    has_hook = any("__init_subclass__" in vars(base) for base in kind.__mro__[:-1])
    if has_hook or type(kind) is not type:
        return kind
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(
        kind.__name__,
        (kind,),
        {**names, "__slots__": (), "__str__": lambda _: text, _REAL_CLASS: kind},
    )


def real_class(kind: type[BaseException]) -> type[BaseException]:
    """Return the class that `with_text` was called with, or the class itself."""
    found: type[BaseException] = vars(kind).get(_REAL_CLASS, kind)
    return found
