"""Command lines with fields: split into words before the fields are filled in, so that a value is always one word.

    "convert {src} -o {dst}"  --parse-->  convert | {src} | -o | {dst}  --fill-->  ["convert", "a b.png", "-o", "c.png"]

A script, which a shell reads, is not split; each value in it is quoted.
"""

from __future__ import annotations

import os
import re
import shlex
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Number
from typing import Any, NamedTuple

from forgepar._validate import checked_by, refusal
from forgepar.errors import WorkflowError
from forgepar.workflow.handles import TaskHandle, TaskHandles

# Places where quoting does not protect a value from the shell; \0 stands for a field. After a backslash or a dollar;
# in quotes, which the value's own quotes would end; in backquotes, comments, here-documents and arithmetic, where
# quotes have no effect. Places that are not closed, or that shells parse differently, extend to the end of the script.
_UNSAFE = re.compile(
    r"""\\. | \$\x00 | \$'.*\Z | '[^']*(?:'|\Z) | "(?:\\(?:.|\Z)|[^"\\])*(?:"|\Z) | `.*\Z"""
    r""" | (?<![^\s;&|()<>])\#[^\n]* | <<.*\Z | \(\(.*\Z | \$\[.*\Z""",
    re.DOTALL | re.VERBOSE,
)

# Words as written in the line, and words that are operators of a shell unless they are quoted.
_WRITTEN = re.compile(r"""(?:\\. | '[^']*' | "(?:\\.|[^"\\])*" | [^\s'"\\])+""", re.DOTALL | re.VERBOSE)
_OPERATOR = re.compile(r"""\|\|? | \|& | &&? | ;;? | &>.* | \d*[<>].*""", re.VERBOSE)


class Part(NamedTuple):
    """A piece of a word: literal text, then the value of a field unless ``field`` is empty."""

    text: str
    field: str


@dataclass(frozen=True)
class Line:
    """A parsed command line.

    Attributes:
        text: the line as written.
        words: its words, part by part; a script is one word.
        is_script: whether a shell reads it.
    """

    text: str
    words: tuple[tuple[Part, ...], ...]
    is_script: bool

    def __str__(self) -> str:
        return f"command line {self.text!r}"

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields, in order of first appearance."""
        return tuple(dict.fromkeys(part.field for word in self.words for part in word if part.field))

    @cached_property
    def _inner_fields(self) -> frozenset[str]:
        """The fields that are only a part of some word."""
        words = () if self.is_script else self.words
        return frozenset(part.field for word in words if len(word) > 1 or word[0].text for part in word)

    @property
    def name(self) -> str:
        """The task name: the program without its folder; for a script, its first word."""
        written = "".join(part.text + part.field for part in self.words[0])
        return os.path.basename(written.split()[0]) or written  # noqa: PTH119  (a Path drops more than the folder)

    def check(self, name: str, value: Any) -> None:
        """Raise an error for an invalid value of a field. Handles are not checked, as their values are not known yet.

        Args:
            name: the field.
            value: its value.

        Raises:
            WorkflowError: the line has no such field, or the value cannot be part of it.
        """
        self.refuse_unknown(name)
        if isinstance(value, TaskHandle):
            return
        if isinstance(value, (list, tuple, TaskHandles)):
            value = [part for part in value if not isinstance(part, TaskHandle)]
        try:
            self._texts(name, value)
        except ValueError as error:
            raise WorkflowError(str(error)) from None

    def refuse_unknown(self, name: str) -> None:
        """Raise an error if the line has no such field.

        Raises:
            WorkflowError: names the fields of the line.
        """
        if name not in self.fields:
            raise WorkflowError(f"The {self} has no field {name!r}. Its fields are {listed(self.fields)}.")

    def fill(self, values: Mapping[str, Any]) -> list[str]:
        """Return the words with the values of the fields; for a script, one word.

        Args:
            values: one per field: a string, a number, a path, or a list of these, which becomes several words.

        Raises:
            ValueError: a value cannot be part of a command line.
        """
        texts: dict[str, list[str]] = {"": []}
        texts |= {name: self._texts(name, values[name]) for name in self.fields}
        if self.is_script:
            quoted = {name: [" ".join(map(shlex.quote, given))] for name, given in texts.items()}
            return [_joined(self.words[0], quoted)]
        return [text for word in self.words for text in self._filled(word, texts)]

    def _filled(self, word: tuple[Part, ...], texts: Mapping[str, list[str]]) -> list[str]:
        is_field = len(word) == 1 and not word[0].text and word[0].field
        return texts[word[0].field] if is_field else [_joined(word, texts)]

    def _texts(self, name: str, value: Any) -> list[str]:
        if not isinstance(value, (list, tuple)):
            return [as_word(value, f"field {name!r} of {self}")]
        if name in self._inner_fields:
            raise ValueError(
                f"Field {name!r} of {self} is only part of a word, so its value must not be a list. Separate the field "
                "with blanks, or pass a single value."
            )
        return [as_word(part, f"an item of field {name!r} of {self}") for part in value]


def as_word(value: Any, what: str) -> str:
    """Return a value as an argument of a program.

    Args:
        value: a string, a number or a path.
        what: the value's name in errors.

    Raises:
        ValueError: it is none of these, or contains a NUL character.
    """
    if isinstance(value, str):
        text = str.__str__(value)  # an enum's own __str__ returns its name
    elif isinstance(value, (bytes, os.PathLike)):
        text = checked_by(what, lambda: os.fsdecode(value), "a path", value)
    elif isinstance(value, (int, float, Number)) and not isinstance(value, bool):
        text = checked_by(what, lambda: str(value), "a number with a text", value)
    else:
        raise refusal(what, "a string, a number or a path, as programs take no other arguments", value)
    if "\0" in text:
        raise refusal(what, "free of NUL characters", text)
    return text


def parse(text: str, *, is_script: bool) -> Line:
    """Parse a command line.

    Args:
        text: words, quoted as for a POSIX shell, with fields such as ``{src}`` in them; ``{{`` and ``}}`` stand for
            braces.
        is_script: whether a shell splits it into words.

    Raises:
        WorkflowError: it is not a string or is empty, quotes or braces are not closed, the text in braces is not a
            name, a word would be an operator for a shell though no shell reads it, or a field of a script is where
            quoting does not protect its value from the shell.

    Example:
        >>> parse("tar cf {archive} {files}", is_script=False).fill({"archive": "a b.tar", "files": ["x", "-y"]})
        ['tar', 'cf', 'a b.tar', 'x', '-y']
    """
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise refusal(
            "line", "a command line: a non-empty string with a program and its arguments", text, WorkflowError
        )
    try:
        words = [text] if is_script else shlex.split(text)
        line = Line(text, tuple(tuple(_parts(word)) for word in words), is_script)
    except ValueError as error:
        raise WorkflowError(
            f"The command line {text!r} cannot be parsed: {error}. Double braces that are not a field: {{{{ and }}}}."
        ) from None
    if is_script:
        _refuse_unsafe(line)
    else:
        _refuse_operators(line)
    return line


def listed(names: Iterable[str]) -> str:
    """Format names for messages; "none" if there are none."""
    return ", ".join(map(repr, names)) or "none"


def _parts(word: str) -> Iterator[Part]:
    text = ""
    for literal, field, form, conversion in string.Formatter().parse(word):
        text += literal  # a doubled brace ends a literal
        if field is None:
            continue
        if not field.isidentifier() or form or conversion:
            raise ValueError(f"'{{{field}}}' is not a field, which is a name in braces")
        yield Part(text, field)
        text = ""
    if text or not word:
        yield Part(text, "")


def _joined(word: Iterable[Part], texts: Mapping[str, list[str]]) -> str:
    return "".join(part.text + "".join(texts[part.field]) for part in word)


def _refuse_operators(line: Line) -> None:
    """Raise an error if a word would be an operator for a shell: the program would get it as an argument."""
    for match in _WRITTEN.finditer(line.text):
        if _OPERATOR.fullmatch(match[0]):
            raise WorkflowError(
                f"The {line} has the word {match[0]}, which the program would get as an argument, as no shell reads "
                "the line. Pass through_shell=True to use a shell, or put the word in quotes if it is an argument."
            )


def _refuse_unsafe(line: Line) -> None:
    marked = "".join(part.text + ("\0" if part.field else "") for part in line.words[0])
    for match in _UNSAFE.finditer(marked):
        if "\0" in match[0]:
            field = line.words[0][marked.count("\0", 0, match.start())].field
            raise WorkflowError(
                f"Field {field!r} of {line} is where quoting does not protect its value from the shell: in quotes, "
                "backquotes, a comment, a here-document or arithmetic, or after a backslash or dollar. Write the field "
                'without quotes, as its value is quoted; or pass the value by env= and write "$NAME".'
            )
