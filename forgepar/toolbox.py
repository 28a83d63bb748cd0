"""Programs by name: where they are, whether they are there at all, and what they are always given."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from forgepar.errors import ToolNotFound, WorkflowError
from forgepar.lines import listed
from forgepar.tools import Command, shared, shell
from forgepar.validation import as_list, check_instance, check_path, check_text


@dataclass(frozen=True)
class Tool:
    """A program that a `ToolRegistry` knows.

    Attributes:
        name: what it is called there.
        program: the name or path by which it is looked for.
        arguments: what it is always given, before all else.
        env: variables that it always has.
        path: where it was found; None: it was not.
        searched: where it was looked for: the folders of PATH, or the path itself.
    """

    name: str
    program: str
    arguments: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    path: str | None = None
    searched: str = ""


class ToolRegistry:
    r"""Programs by name, with where they are and what they are always given; tasks may hold one.

    Example:
        >>> tools = ToolRegistry()
        >>> tools.add("sort", arguments=["-u"], env={"LC_ALL": "C"}).name
        'sort'
        >>> tools.missing()
        []
        >>> tools.shell("sort", stdin="b\na\nb\n")().stdout
        'a\nb\n'
    """

    def __init__(self) -> None:
        self._tools: dict[str, Tool] = {}

    def __repr__(self) -> str:
        return f"<ToolRegistry of {listed(self._tools)}>"

    def add(
        self,
        name: str,
        path: str | os.PathLike[str] | None = None,
        *,
        arguments: Iterable[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Tool:
        """Add a tool; it need not be there yet.

        Args:
            name: what to call it.
            path: its path, or another name by which to look for it; None: ``name``.
            arguments: what it is always given, before all else.
            env: variables that it always has.

        Returns:
            The tool, as `find` has it.

        Raises:
            WorkflowError: there is one of that name.
        """
        check_text("name", name, WorkflowError)
        if path is not None:
            check_path("path", path, WorkflowError)
        if env is not None:
            check_instance("env", env, Mapping, "a dict of variables, or None", WorkflowError)
        given = (arguments,) if isinstance(arguments, str) else tuple(as_list("arguments", arguments))
        for word in (*given, *(env or {}), *(env or {}).values()):
            what = "arguments and variables of env"
            check_instance("arguments" if word in given else "env", word, str, f"text, as all {what}", WorkflowError)
        if name in self._tools:
            raise WorkflowError(f"a tool {name!r} is there already. Give this one another name.")
        program = name if path is None else os.fspath(path)
        if os.sep in program:  # else it would be another file for a program that runs in another folder
            program = os.path.abspath(program)  # noqa: PTH100
        self._tools[name] = Tool(name, program, given, dict(env or {}))
        return self.find(name)

    def find(self, name: str) -> Tool:
        """Look for a tool, on the machine where this is called.

        Returns:
            The tool; its ``path`` is None if it is not there.

        Raises:
            WorkflowError: no tool of that name was added.
        """
        check_instance("name", name, str, "text", WorkflowError)
        if name not in self._tools:
            raise WorkflowError(
                f"there is no tool {name!r}; there are {listed(self._tools)}. Add it by ToolRegistry.add({name!r})."
            )
        tool = self._tools[name]
        searched = tool.program if os.sep in tool.program else os.pathsep.join(os.get_exec_path())
        path = shutil.which(tool.program)
        return replace(tool, path=path and os.path.abspath(path), searched=searched)  # noqa: PTH100

    def missing(self) -> list[str]:
        """Return the names of the tools that are not there."""
        return [name for name in self._tools if self.find(name).path is None]

    def check(self) -> None:
        """Raise if a tool is not there.

        Raises:
            ToolNotFound: naming all that are not, and where they were looked for.
        """
        tools = [self.find(name) for name in self.missing()]
        if tools:
            told = "; ".join(f"{tool.name!r}: no program {tool.program!r} in {tool.searched}" for tool in tools)
            raise ToolNotFound(
                f"{len(tools)} of {len(self._tools)} tools are missing. {told}. Install them, or add them with path=.",
                program=", ".join(tool.program for tool in tools),
                searched=", ".join(dict.fromkeys(tool.searched for tool in tools)),
            )

    def shell(self, line: str, /, **arguments: Any) -> Command:
        """Make a task of a tool, as the function `shell` does of any program.

        Args:
            line: the tool's name and its arguments.
            **arguments: those of `shell`, but ``through_shell``. Variables of ``env`` go before the tool's own.

        Raises:
            WorkflowError: as from `shell`, or the line does not begin with the name of a tool.
        """
        command = shell(line, **arguments)
        plain = command.program
        first = plain.line.words[0]
        if plain.line.is_script:
            raise WorkflowError(f"{plain.line} is for a shell, which knows nothing of tools. Take away through_shell=.")
        if len(first) != 1 or first[0].field:
            raise WorkflowError(f"{plain.line} begins with a field. Begin it with a tool: {listed(self._tools)}.")
        tool = self.find(first[0].text)
        front = (tool.path or tool.program, *tool.arguments)
        return Command(shared(replace(plain, front=front, env=tuple(tool.env.items()))), command.given)
