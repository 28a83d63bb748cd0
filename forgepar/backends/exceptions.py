"""How an exception travels: with its type, its data, and the exceptions that it refers to.

    worker:  exception ──dumps──> a part for each exception that it refers to ──> bytes
    parent:  bytes ──pickle.loads──> put_together ──> exception

Plain pickling makes an exception by calling its class with ``args``. It fails for constructors that take anything
else, and drops ``__cause__``, ``__context__`` and most fields that are kept in C. Here the constructor is not called:
the object is made empty, and then gets ``args``, attributes and fields as they were. A class that defines pickling of
its own keeps it where that restores the exception exactly.

What cannot travel is left out as narrowly as possible: an attribute becomes a `NotSent`; an exception that refuses to
be pickled, that cannot be put together in the other process, or whose class cannot be sent, becomes a `RemoteError`.
That has the names of the classes which the exception is an instance of, so that `is_kind` can tell.

`put_together` raises nothing, whatever the code of the exception's classes does.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from forgepar.backends.exception_fields import (
    ARGS,
    ATTRIBUTES,
    CAUSE,
    CONTEXT,
    IS_SUPPRESSED,
    MEMBERS,
    MESSAGE,
    NotSent,
    class_at,
    create,
    fields_of,
    furnish,
    is_importable,
    is_same,
    name_of,
    names_of,
    notes_of,
    pickles_itself,
    place_of,
    real_class,
    refuses,
    speaks,
    with_text,
)
from forgepar.errors import RemoteError, TaskExited, add_note, text_of
from forgepar.pickling import dumps_referring

# An AttributeError refers to the object that lacks the attribute, whatever its size; a larger one is not sent.
_MOST_OBJECT = 1 << 20  # bytes
_MOST_DEPTH = 5  # of lists, tuples and dicts that are searched for what cannot be sent
# Numbers of what is not among the exceptions.
_NOTHING = -1
_OWN_CLASS = -2


class Portable:
    """Pickles to an exception: what is unpickled is that exception, in any process.

    Args:
        error: the exception.
    """

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        error = self._error
        # One that could not be put together here may be where it came from.
        parts = ATTRIBUTES.__get__(error).get("_parts") if type(error) is RemoteError else None
        return put_together, (parts or _Taking(error).parts(),)


def dumps(error: BaseException) -> bytes:
    """Pickle an exception; `pickle.loads` of the result returns it, or a `RemoteError` in its place."""
    return pickle.dumps(Portable(error), protocol=5)


def is_kind(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    """Tell whether an exception that a task raised is an instance of one of these classes.

    Classes that cannot be imported (of a script, made in a function) are compared by name as well, since each process
    may have its own.
    """
    if isinstance(error, kinds):
        return True
    if not isinstance(error, Exception) and issubclass(TaskExited, kinds):
        return True  # a workflow has a TaskExited in its place
    if type(error) is RemoteError:
        return any(name_of(kind) in error.bases for kind in kinds)
    names = names_of(type(error))
    return any(name_of(kind) in names and not is_importable(kind) for kind in kinds)


class _Part(NamedTuple):
    """One exception; it travels as a plain tuple.

    Attributes:
        names: qualified names of its class and that class's bases.
        text: what ``str`` of it was.
        notes: its notes as text.
        place: where else than under its name its class may be found, see `place_of`.
        kind: its class, pickled; None if it cannot be.
        is_whole: whether it is pickled by its own means.
        content: pickled: the exception and its notes, or its args, attributes and fields; None: it cannot be sent.
        message: of a group.
        members: numbers of the members of a group.
        cause: number of its cause.
        context: number of its context.
        is_suppressed: its ``__suppress_context__``.
        keeps_text: whether it can say ``text`` only if that is given to it.
    """

    names: tuple[str, ...]
    text: str
    notes: tuple[str, ...]
    place: tuple[str, str] | None
    kind: bytes | None = None
    is_whole: bool = False
    content: bytes | None = None
    message: str = ""
    members: tuple[int, ...] = ()
    cause: int = _NOTHING
    context: int = _NOTHING
    is_suppressed: bool = False
    keeps_text: bool = False


class _Taking:
    """Takes exceptions apart, and sees whether each can be put together again.

    Args:
        error: the first; those that it refers to are found as it is taken apart.
    """

    def __init__(self, error: BaseException) -> None:
        self._errors = [error]
        self._numbers = {id(error): 0}
        self._has_lost = False
        self._kept: BaseException | None = None  # is pickled by its own means
        self._kind: type[BaseException] | None = None  # travels apart

    def parts(self) -> list[tuple[Any, ...]]:
        """Return a part for each exception, as plain tuples."""
        return [tuple(self._part(error)) for error in self._errors]  # which grows meanwhile

    def _number(self, error: BaseException | None) -> int:
        if error is None:
            return _NOTHING
        number = self._numbers.setdefault(id(error), len(self._errors))
        if number == len(self._errors):
            self._errors.append(error)
        return number

    def _part(self, error: BaseException) -> _Part:
        kind = real_class(type(error))
        part = _Part(
            names_of(kind),
            text_of(error),
            tuple(notes_of(error)),
            place_of(kind),
            self._pickled_class(kind),
            cause=self._number(CAUSE.__get__(error)),
            context=self._number(CONTEXT.__get__(error)),
            is_suppressed=IS_SUPPRESSED.__get__(error),
            keeps_text=kind is not type(error),
        )
        if part.kind is None and part.place is None:
            return part
        self._kind, self._has_lost = kind, False
        if isinstance(error, BaseExceptionGroup):
            message = str.__str__(MESSAGE.__get__(error))  # it may be of a subclass of str
            part = part._replace(message=message, members=tuple(map(self._number, MEMBERS.__get__(error))))
        elif not part.keeps_text and pickles_itself(kind):
            if (content := self._whole(error)) is not None:
                return part._replace(is_whole=True, content=content)
            if refuses(error):
                return part
        return self._in_pieces(error, part)

    def _pickled_class(self, kind: type[BaseException]) -> bytes | None:
        self._kind = None
        try:
            return self._dumps(kind)
        except BaseException:
            return None

    def _whole(self, error: BaseException) -> bytes | None:
        """Pickle an exception by its own means; return None if that does not restore it exactly."""
        self._kept = error
        try:
            content = self._dumps((error, ATTRIBUTES.__get__(error).get("__notes__", ())))
            return content if is_same(self._loads(content)[0], error) else None
        except BaseException:
            return None
        finally:
            self._kept = None

    def _in_pieces(self, error: BaseException, part: _Part) -> _Part:
        args, attributes, fields = ARGS.__get__(error), dict(ATTRIBUTES.__get__(error)), fields_of(error)
        if isinstance(error, AttributeError) and "obj" in fields:
            fields["obj"] = self._sifted(fields["obj"], _MOST_OBJECT)
        try:
            content = self._dumps((args, attributes, fields))
            self._loads(content)
        except BaseException:
            args = tuple(map(self._sifted, args))
            attributes = {name: self._sifted(value) for name, value in attributes.items()}
            fields = {name: self._sifted(value) for name, value in fields.items()}
            try:
                content = self._dumps((args, attributes, fields))
            except BaseException:
                return part
        return self._checked(error, part._replace(content=content))

    def _checked(self, error: BaseException, part: _Part) -> _Part:
        """Put an exception together here, and note whether it can be, and says what it said."""
        try:
            made = create(type(error), part.message, [self._errors[member] for member in part.members])
            furnish(made, *self._loads(part.content or b""))
        except BaseException:
            return part._replace(content=None)
        is_lost = self._has_lost or (speaks(error) and not speaks(made))
        # If nothing was lost, a text can only differ by an address or an order, which are others each time.
        return part._replace(keeps_text=True) if is_lost and text_of(made) != part.text else part

    def _sifted(self, value: Any, most: int | None = None, depth: int = 0) -> Any:
        """Return a value, with a `NotSent` in place of what of it cannot travel."""
        if self._travels(value, most):
            return value
        if most is None and depth < _MOST_DEPTH:
            if type(value) in (list, tuple):
                return type(value)(self._sifted(part, None, depth + 1) for part in value)
            if type(value) is dict and all(map(self._travels, value)):
                return {key: self._sifted(part, None, depth + 1) for key, part in value.items()}
        self._has_lost = True
        return NotSent(value)

    def _travels(self, value: Any, most: int | None = None) -> bool:
        try:
            self._loads(self._dumps(value, most))
        except BaseException:
            return False
        return True

    def _dumps(self, value: Any, most: int | None = None) -> bytes:
        return dumps_referring(value, self._refer, most)

    def _refer(self, value: Any) -> int | None:
        """Return the number of what the current exception refers to, None for what is pickled."""
        if value is self._kind and value is not None:
            return _OWN_CLASS
        if value is self._kept or not issubclass(type(value), BaseException):
            return None
        return self._number(value)

    def _loads(self, data: bytes) -> Any:
        return _Referring(data, self._errors.__getitem__, self._kind).load()


class _Referring(pickle.Unpickler):
    """Unpickles what refers to exceptions by their numbers."""

    def __init__(self, data: bytes, find: Callable[[int], BaseException], kind: type[BaseException] | None) -> None:
        super().__init__(io.BytesIO(data))
        self._find = find
        self._kind = kind

    def persistent_load(self, number: int) -> Any:
        return self._kind if number == _OWN_CLASS else self._find(number)


def put_together(parts: Sequence[tuple[Any, ...]]) -> BaseException:
    """Return the first of some exceptions, with all that it refers to.

    It raises nothing: an exception that cannot be put together here is a `RemoteError`.
    """
    faults = dict[int, BaseException]()
    while True:
        making = _Making(parts, faults)
        try:
            return making.made()
        except BaseException as fault:
            if making.current in faults:  # it was none of its code
                return _stand_in(_Part._make(parts[0]), fault)
            faults[making.current] = fault  # others may refer to it by now, so all are made anew


class _Making:
    """Makes exceptions of parts.

    Args:
        parts: the parts.
        faults: by number, why an exception cannot be put together.

    Attributes:
        current: the number of the exception that is at hand.
    """

    def __init__(self, parts: Sequence[tuple[Any, ...]], faults: dict[int, BaseException]) -> None:
        self._parts = [_Part._make(part) for part in parts]
        self._faults = faults
        self._kinds: dict[int, type[BaseException]] = {}
        self._made: dict[int, BaseException] = {}
        self.current = 0

    def made(self) -> BaseException:
        """Return the first exception."""
        for number in range(len(self._parts)):
            self._find(number)
        for number, part in enumerate(self._parts):
            self.current = number
            if part.content is not None and not part.is_whole and not self._is_lost(number):
                furnish(self._made[number], *self._loads(part.content, number))
        for number, part in enumerate(self._parts):
            error = self._made[number]
            CAUSE.__set__(error, self._made.get(part.cause))
            CONTEXT.__set__(error, self._made.get(part.context))
            IS_SUPPRESSED.__set__(error, part.is_suppressed)
            if part.keeps_text and real_class(type(error)) is type(error) and not self._is_lost(number):
                add_note(error, f"its text in the worker: {part.text}")
        first = self._made[0]
        if 0 in self._faults:
            ATTRIBUTES.__get__(first)["_parts"] = [tuple(part) for part in self._parts]
        return first

    def _is_lost(self, number: int) -> bool:
        return number in self._faults or self._parts[number].content is None

    def _find(self, number: int) -> BaseException:
        """Return an exception, made if it is not yet; there may be nothing in it until all are made."""
        if number not in self._made:
            before, self.current = self.current, number
            if self._is_lost(number):
                self._made[number] = _stand_in(self._parts[number], self._faults.get(number))
            else:
                self._made[number] = self._begun(self._parts[number], number)
            self.current = before
        return self._made[number]

    def _begun(self, part: _Part, number: int) -> BaseException:
        if number in self._kinds:
            raise RecursionError("it is needed to make itself")
        kind = self._kinds[number] = self._class_of(part)
        if part.is_whole:
            error: BaseException
            error, notes = self._loads(part.content or b"", number)
            if type(error) is not kind:
                raise TypeError(f"it became a {name_of(type(error))}")
            if notes != ():
                ATTRIBUTES.__get__(error)["__notes__"] = notes
            return error
        members = [self._find(member) for member in part.members]
        return create(with_text(kind, part.text) if part.keeps_text else kind, part.message, members)

    def _class_of(self, part: _Part) -> type[BaseException]:
        kind: Any = None
        if part.place is not None:
            try:
                kind = class_at(part.place)
            except BaseException:
                if part.kind is None:
                    raise
        if kind is None and part.kind is not None:
            kind = self._loads(part.kind)
        if not isinstance(kind, type) or not issubclass(kind, BaseException):
            raise TypeError(f"there is no exception class {part.names[0]} here")
        return kind

    def _loads(self, data: bytes, number: int = _NOTHING) -> Any:
        return _Referring(data, self._find, self._kinds.get(number)).load()


def _stand_in(part: _Part, fault: BaseException | None) -> RemoteError:
    """Return what stands for an exception that cannot travel, or (because of a fault) not be put together here."""
    why = "cannot be pickled"
    if fault is not None:
        why = f"cannot be unpickled here: {type(fault).__name__}: {text_of(fault)}"
    message = f"{part.names[0]}: {part.text} (the exception itself {why})"
    error = RemoteError(message, type_name=part.names[0], text=part.text, bases=part.names)
    for note in part.notes:
        add_note(error, note)
    return error
