"""Command lines with fields: split into words first and filled in after, so that no value is ever more than a word.

    "convert {src} -o {dst}"  --parse-->  convert | {src} | -o | {dst}  --fill-->  ["convert", "a b.png", "-o", "c.png"]

A line that is meant for a shell, a script, stays one piece, and each value in it is quoted.
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

from forgepar.errors import WorkflowError
from forgepar.handles import TaskHandle, TaskHandles

# Where quoting does not keep a value from the shell; \0 stands for a field. Behind a backslash or a dollar; in quotes,
# where its own would end them; in backquotes, comments, here-documents and arithmetic, which know no quotes. What is
# not closed, or what shells read in different ways, counts to the end of the script.
_UNSAFE = re.compile(
    r"""\\. | \$\x00 | \$'.*\Z | '[^']*(?:'|\Z) | "(?:\\(?:.|\Z)|[^"\\])*(?:"|\Z) | `.*\Z"""
    r""" | (?<![^\s;&|()<>])\#[^\n]* | <<.*\Z | \(\(.*\Z | \$\[.*\Z""",
    re.DOTALL | re.VERBOSE,
)

# Words as they are written, and those that mean something to a shell alone, unless they are quoted.
_WRITTEN = re.compile(r"""(?:\\. | '[^']*' | "(?:\\.|[^"\\])*" | [^\s'"\\])+""", re.DOTALL | re.VERBOSE)
_OPERATOR = re.compile(r"""\|\|? | \|& | &&? | ;;? | &>.* | \d*[<>].*""", re.VERBOSE)


class Part(NamedTuple):
    """A piece of a word: text as it stands, then the value of a field, where it names one."""

    text: str
    field: str


@dataclass(frozen=True)
class Line:
    """A command line that was taken apart.

    Attributes:
        text: as it was written.
        words: its words, part by part; a script is one word.
        is_script: whether a shell is to read it.
    """

    text: str
    words: tuple[tuple[Part, ...], ...]
    is_script: bool

    def __str__(self) -> str:
        return f"command line {self.text!r}"

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields, in the order of their first appearance."""
        return tuple(dict.fromkeys(part.field for word in self.words for part in word if part.field))

    @cached_property
    def _inner_fields(self) -> frozenset[str]:
        """Those that are part of a word, at least once."""
        words = () if self.is_script else self.words
        return frozenset(part.field for word in words if len(word) > 1 or word[0].text for part in word)

    @property
    def name(self) -> str:
        """What to call it: its program, without the folder; of a script, the first word."""
        written = "".join(part.text + part.field for part in self.words[0])
        return os.path.basename(written.split()[0]) or written  # noqa: PTH119  (a Path drops more than the folder)

    def check(self, name: str, value: Any) -> None:
        """Raise what is wrong with a field's value, as far as that is known while a workflow is declared.

        Args:
            name: the field.
            value: its value. Handles, or a list with some, may become anything.

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
        """Raise if there is no field of this name.

        Raises:
            WorkflowError: naming the fields that there are.
        """
        if name not in self.fields:
            raise WorkflowError(
                f"{self} has no field {name!r}; it has {listed(self.fields)}. Give values of those only."
            )

    def fill(self, values: Mapping[str, Any]) -> list[str]:
        """Return the words with the fields' values in place; of a script, the one.

        Args:
            values: one for each field: text, a number, a path, or a list of them, which becomes several words.

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
                f"field {name!r} of {self} got a list but is only part of a word. Let it stand alone between blanks, "
                "or give one value."
            )
        return [as_word(part, f"an item of field {name!r} of {self}") for part in value]


def as_word(value: Any, what: str) -> str:
    """Return a value as a program is given it.

    Args:
        value: text, a number or a path.
        what: how to call it where it is none of these.

    Raises:
        ValueError: it is none of these, or has a NUL in it.
    """
    if isinstance(value, str):
        text = str.__str__(value)  # an enum's own would tell its name
    elif isinstance(value, (bytes, os.PathLike)):
        text = os.fsdecode(value)
    elif isinstance(value, (int, float, Number)) and not isinstance(value, bool):
        text = str(value)
    else:
        raise ValueError(
            f"{what} is a {type(value).__name__}. Give text, a number or a path, as programs take no other."
        )
    if "\0" in text:
        raise ValueError(f"{what} is {text!r}. No program can be given a NUL: take it out.")
    return text


def parse(text: str, *, is_script: bool) -> Line:
    """Take a command line apart.

    Args:
        text: words as a POSIX shell would have them, quotes included, with fields such as ``{src}`` in them; ``{{``
            and ``}}`` stand for braces.
        is_script: leave it to a shell to find the words.

    Raises:
        WorkflowError: it is no text or empty, quotes or braces are not closed, what stands in braces is no name, a
            word of what is no script would be an operator to a shell, or a field of a script stands where no quoting
            keeps its value from the shell.

    Example:
        >>> parse("tar cf {archive} {files}", is_script=False).fill({"archive": "a b.tar", "files": ["x", "-y"]})
        ['tar', 'cf', 'a b.tar', 'x', '-y']
    """
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise WorkflowError(f"line={text!r} is no command line. Give a program and its arguments, as text.")
    try:
        words = [text] if is_script else shlex.split(text)
        line = Line(text, tuple(tuple(_parts(word)) for word in words), is_script)
    except ValueError as error:
        raise WorkflowError(
            f"command line {text!r} cannot be read: {error}. Write braces that are no field's twice: {{{{ and }}}}."
        ) from None
    if is_script:
        _refuse_unsafe(line)
    else:
        _refuse_operators(line)
    return line


def listed(names: Iterable[str]) -> str:
    """Write names for people; "none" where there are none."""
    return ", ".join(map(repr, names)) or "none"


def _parts(word: str) -> Iterator[Part]:
    text = ""
    for literal, field, form, conversion in string.Formatter().parse(word):
        text += literal  # each brace that was written twice ends a literal
        if field is None:
            continue
        if not field.isidentifier() or form or conversion:
            raise ValueError(f"'{{{field}}}' is no field, which is a name in braces")
        yield Part(text, field)
        text = ""
    if text or not word:
        yield Part(text, "")


def _joined(word: Iterable[Part], texts: Mapping[str, list[str]]) -> str:
    return "".join(part.text + "".join(texts[part.field]) for part in word)


def _refuse_operators(line: Line) -> None:
    """Raise where a word would be an operator to a shell: a program would get it as an argument, and go on."""
    for match in _WRITTEN.finditer(line.text):
        if _OPERATOR.fullmatch(match[0]):
            raise WorkflowError(
                f"{line} has the word {match[0]}, but no shell reads it, so the program would get it as an argument. "
                "Say through_shell=True to have one read it, or put it in quotes if that is what is meant."
            )


def _refuse_unsafe(line: Line) -> None:
    marked = "".join(part.text + ("\0" if part.field else "") for part in line.words[0])
    for match in _UNSAFE.finditer(marked):
        if "\0" in match[0]:
            field = line.words[0][marked.count("\0", 0, match.start())].field
            raise WorkflowError(
                f"field {field!r} of {line} stands where quoting its value does not keep it from the shell: in quotes, "
                "backquotes, a comment, a here-document or arithmetic, or behind a backslash or dollar. Let it stand "
                'free, as it is quoted for you; or give the value by env= and write "$NAME".'
            )
