"""How exceptions are pickled: with their type, their data, and the exceptions that they refer to.

    worker:  exception ──dumps──> one state per exception that it refers to ──> bytes
    parent:  bytes ──pickle.loads──> put_together ──> exception

Plain pickling makes an exception by calling its class with ``args``. That fails for constructors with another
signature, and drops ``__cause__``, ``__context__`` and most fields that are kept in C. Here the constructor is not
called: the object is made empty, and then gets its ``args``, attributes and fields. A class that defines its own
pickling uses it if that restores the exception exactly.

As little as possible is left out. An attribute that cannot be pickled becomes a `NotSent`. An exception becomes a
`RemoteError` if it refuses to be pickled, if it cannot be put together in the other process, or if its class cannot be
pickled; a `RemoteError` has the names of the exception's classes, for `is_kind`.

`put_together` raises nothing, whatever the code of the exception's classes does.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from forgepar.errors import RemoteError, TaskExited, add_note, text_of
from forgepar.values import exception_fields as fields
from forgepar.values.pickling import dumps_referring

_MOST_OBJECT = 1 << 20  # bytes; an AttributeError refers to the object that lacks the attribute, of any size
_MOST_DEPTH = 5  # levels of lists, tuples and dicts that are searched for what cannot be pickled
# Special numbers in place of an exception's.
_NOTHING = -1
_OWN_CLASS = -2


class PicklableException:
    """Wrapper that pickles an exception: unpickling it returns the exception, in any process.

    Args:
        error: the exception.
    """

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        error = self._error
        # A `RemoteError` keeps the states: where it came from, the exception can be put together again.
        parts = fields.ATTRIBUTES.__get__(error).get("_parts") if type(error) is RemoteError else None
        return put_together, (parts or _ExceptionPickler(error).parts(),)


def dumps(error: BaseException) -> bytes:
    """Pickle an exception; `pickle.loads` returns it, or a `RemoteError` in its place."""
    return pickle.dumps(PicklableException(error), protocol=5)


def is_kind(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    """Return whether an exception that a task raised is an instance of one of these classes.

    Classes that cannot be imported (of a script, or made in a function) are also compared by name, since each process
    may have its own.
    """
    if isinstance(error, kinds):
        return True
    if not isinstance(error, Exception) and issubclass(TaskExited, kinds):
        return True  # a workflow raises TaskExited in its place
    if type(error) is RemoteError:
        return any(fields.name_of(kind) in error.bases for kind in kinds)
    names = fields.names_of(type(error))
    return any(fields.name_of(kind) in names and not fields.is_importable(kind) for kind in kinds)


class _ExceptionState(NamedTuple):
    """State of one exception; it is sent as a plain tuple.

    Attributes:
        names: qualified names of its class and that class's bases.
        text: its ``str``.
        notes: its notes as text.
        place: where its class may be found other than under its name, see `place_of`.
        kind: its class, pickled; None if it cannot be.
        is_whole: whether its own pickling is used.
        content: pickle of the exception and its notes, or of its args, attributes and fields; None if it cannot be
            pickled.
        message: message of a group.
        members: numbers of the members of a group.
        cause: number of its cause.
        context: number of its context.
        is_suppressed: its ``__suppress_context__``.
        keeps_text: whether its ``str`` needs ``text``, as what it is made from was lost.
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


class _ExceptionPickler:
    """Pickles exceptions and checks whether each can be put together again.

    Args:
        error: the first one; those that it refers to are found while it is pickled.
    """

    def __init__(self, error: BaseException) -> None:
        self._errors = [error]
        self._numbers = {id(error): 0}
        self._has_lost = False
        self._own_means: BaseException | None = None  # the exception that is pickled by its own means
        self._kind: type[BaseException] | None = None  # its class, which is pickled separately

    def parts(self) -> list[tuple[Any, ...]]:
        """Return the state of each exception as a plain tuple."""
        return [tuple(self._part(error)) for error in self._errors]  # the list grows meanwhile

    def _number(self, error: BaseException | None) -> int:
        if error is None:
            return _NOTHING
        number = self._numbers.setdefault(id(error), len(self._errors))
        if number == len(self._errors):
            self._errors.append(error)
        return number

    def _part(self, error: BaseException) -> _ExceptionState:
        kind = fields.real_class(type(error))
        part = _ExceptionState(
            fields.names_of(kind),
            text_of(error),
            tuple(fields.notes_of(error)),
            fields.place_of(kind),
            self._pickled_class(kind),
            cause=self._number(fields.CAUSE.__get__(error)),
            context=self._number(fields.CONTEXT.__get__(error)),
            is_suppressed=fields.IS_SUPPRESSED.__get__(error),
            keeps_text=kind is not type(error),
        )
        if part.kind is None and part.place is None:
            return part
        self._kind, self._has_lost = kind, False
        if isinstance(error, BaseExceptionGroup):
            message = str.__str__(fields.MESSAGE.__get__(error))  # it may be an instance of a subclass of str
            part = part._replace(message=message, members=tuple(map(self._number, fields.MEMBERS.__get__(error))))
        elif not part.keeps_text and fields.pickles_itself(kind):
            if (content := self._whole(error)) is not None:
                return part._replace(is_whole=True, content=content)
            if fields.refuses(error):
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
        self._own_means = error
        try:
            content = self._dumps((error, fields.ATTRIBUTES.__get__(error).get("__notes__", ())))
            return content if fields.is_same(self._loads(content)[0], error) else None
        except BaseException:
            return None
        finally:
            self._own_means = None

    def _in_pieces(self, error: BaseException, part: _ExceptionState) -> _ExceptionState:
        args, attributes = fields.ARGS.__get__(error), dict(fields.ATTRIBUTES.__get__(error))
        own = fields.fields_of(error)
        if isinstance(error, AttributeError) and "obj" in own:
            own["obj"] = self._sifted(own["obj"], _MOST_OBJECT)
        try:
            content = self._dumps((args, attributes, own))
            self._loads(content)
        except BaseException:
            args = tuple(map(self._sifted, args))
            attributes = {name: self._sifted(value) for name, value in attributes.items()}
            own = {name: self._sifted(value) for name, value in own.items()}
            try:
                content = self._dumps((args, attributes, own))
            except BaseException:
                return part
        return self._checked(error, part._replace(content=content))

    def _checked(self, error: BaseException, part: _ExceptionState) -> _ExceptionState:
        """Put an exception together here, and note whether that works and gives the same text."""
        try:
            made = fields.create(type(error), part.message, [self._errors[member] for member in part.members])
            fields.furnish(made, *self._loads(part.content or b""))
        except BaseException:
            return part._replace(content=None)
        is_lost = self._has_lost or (fields.has_text(error) and not fields.has_text(made))
        # If nothing was lost, the text can only differ by an address or an order, which vary anyway.
        return part._replace(keeps_text=True) if is_lost and text_of(made) != part.text else part

    def _sifted(self, value: Any, most: int | None = None, depth: int = 0) -> Any:
        """Return a value, with a `NotSent` for each part that cannot be pickled."""
        if self._can_pickle(value, most):
            return value
        if most is None and depth < _MOST_DEPTH:
            if type(value) in (list, tuple):
                return type(value)(self._sifted(part, None, depth + 1) for part in value)
            if type(value) is dict and all(map(self._can_pickle, value)):
                return {key: self._sifted(part, None, depth + 1) for key, part in value.items()}
        self._has_lost = True
        return fields.NotSent(value)

    def _can_pickle(self, value: Any, most: int | None = None) -> bool:
        try:
            self._loads(self._dumps(value, most))
        except BaseException:
            return False
        return True

    def _dumps(self, value: Any, most: int | None = None) -> bytes:
        return dumps_referring(value, self._refer, most)

    def _refer(self, value: Any) -> int | None:
        """Return the number of an exception that the current one refers to; None to pickle the value."""
        if value is self._kind and value is not None:
            return _OWN_CLASS
        if value is self._own_means or not issubclass(type(value), BaseException):
            return None
        return self._number(value)

    def _loads(self, data: bytes) -> Any:
        return _Referring(data, self._errors.__getitem__, self._kind).load()


class _Referring(pickle.Unpickler):
    """Unpickler of states that refer to exceptions by number."""

    def __init__(self, data: bytes, find: Callable[[int], BaseException], kind: type[BaseException] | None) -> None:
        super().__init__(io.BytesIO(data))
        self._find = find
        self._kind = kind

    def persistent_load(self, number: int) -> Any:
        return self._kind if number == _OWN_CLASS else self._find(number)


def put_together(parts: Sequence[tuple[Any, ...]]) -> BaseException:
    """Return the first of some exceptions, with all that it refers to.

    It raises nothing: an exception that cannot be put together here is replaced by a `RemoteError`. Stores have
    pickles that name this function.
    """
    faults = dict[int, BaseException]()
    while True:
        building = _ExceptionBuilder(parts, faults)
        try:
            return building.made()
        except BaseException as fault:
            if building.current in faults:  # the stand-in failed, not the exception's own code
                return _stand_in(_ExceptionState._make(parts[0]), fault)
            faults[building.current] = fault  # others may refer to it already, so make all again


class _ExceptionBuilder:
    """Makes exceptions from their states.

    Args:
        parts: the states.
        faults: by number, why an exception cannot be put together.

    Attributes:
        current: number of the exception that is being made.
    """

    def __init__(self, parts: Sequence[tuple[Any, ...]], faults: dict[int, BaseException]) -> None:
        self._parts = [_ExceptionState._make(part) for part in parts]
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
                fields.furnish(self._made[number], *self._loads(part.content, number))
        for number, part in enumerate(self._parts):
            error = self._made[number]
            fields.CAUSE.__set__(error, self._made.get(part.cause))
            fields.CONTEXT.__set__(error, self._made.get(part.context))
            fields.IS_SUPPRESSED.__set__(error, part.is_suppressed)
            if part.keeps_text and fields.real_class(type(error)) is type(error) and not self._is_lost(number):
                add_note(error, f"Its text in the worker: {part.text}")
        first = self._made[0]
        if 0 in self._faults:
            fields.ATTRIBUTES.__get__(first)["_parts"] = [tuple(part) for part in self._parts]
        return first

    def _is_lost(self, number: int) -> bool:
        return number in self._faults or self._parts[number].content is None

    def _find(self, number: int) -> BaseException:
        """Return an exception; make it on first use. It may stay empty until all are made."""
        if number not in self._made:
            before, self.current = self.current, number
            if self._is_lost(number):
                self._made[number] = _stand_in(self._parts[number], self._faults.get(number))
            else:
                self._made[number] = self._make(self._parts[number], number)
            self.current = before
        return self._made[number]

    def _make(self, part: _ExceptionState, number: int) -> BaseException:
        if number in self._kinds:
            raise RecursionError("the exception is needed to make itself")
        kind = self._kinds[number] = self._class_of(part)
        if part.is_whole:
            error: BaseException
            error, notes = self._loads(part.content or b"", number)
            if type(error) is not kind:
                raise TypeError(f"the exception became a {fields.name_of(type(error))}")
            if notes != ():
                fields.ATTRIBUTES.__get__(error)["__notes__"] = notes
            return error
        members = [self._find(member) for member in part.members]
        return fields.create(fields.with_text(kind, part.text) if part.keeps_text else kind, part.message, members)

    def _class_of(self, part: _ExceptionState) -> type[BaseException]:
        kind: Any = None
        if part.place is not None:
            try:
                kind = fields.class_at(part.place)
            except BaseException:
                if part.kind is None:
                    raise
        if kind is None and part.kind is not None:
            kind = self._loads(part.kind)
        if not isinstance(kind, type) or not issubclass(kind, BaseException):
            raise TypeError(f"this process has no exception class {part.names[0]}")
        return kind

    def _loads(self, data: bytes, number: int = _NOTHING) -> Any:
        return _Referring(data, self._find, self._kinds.get(number)).load()


def _stand_in(part: _ExceptionState, fault: BaseException | None) -> RemoteError:
    """Return the `RemoteError` for an exception that cannot be pickled, or because of a fault not be unpickled."""
    why = "cannot be pickled"
    if fault is not None:
        why = f"cannot be unpickled here: {type(fault).__name__}: {text_of(fault)}"
    message = f"{part.names[0]}: {part.text} (the exception itself {why})"
    error = RemoteError(message, type_name=part.names[0], text=part.text, bases=part.names)
    for note in part.notes:
        add_note(error, note)
    return error
