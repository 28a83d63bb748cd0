"""`ToolRegistry`: programs by name, with their paths, fixed arguments and environment variables."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from forgepar._validate import as_list, check_instance, check_path, check_text, shown
from forgepar.errors import ToolNotFound, WorkflowError
from forgepar.version import public
from forgepar.workflow.shell.command import Command, shared, shell
from forgepar.workflow.shell.template import listed


@public
@dataclass(frozen=True)
class Tool:
    """A program in a `ToolRegistry`.

    Attributes:
        name: its name in the registry.
        program: the name or path to look for.
        arguments: arguments that precede all others.
        env: environment variables that are always set.
        path: where it was found; None if it was not.
        searched: where it was looked for: the folders of PATH, or the path itself.
    """

    name: str
    program: str
    arguments: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    path: str | None = None
    searched: str = ""


@public
class ToolRegistry:
    r"""Programs by name, with their paths, fixed arguments and environment variables. Tasks may contain a registry.

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
        """Add a tool, which need not exist yet.

        Args:
            name: its name in the registry.
            path: its path, or another name to look for; None for ``name``.
            arguments: arguments that precede all others.
            env: environment variables that are always set.

        Returns:
            The tool, as `find` returns it.

        Raises:
            WorkflowError: the registry has a tool of that name.
        """
        check_text("name", name, WorkflowError)
        if path is not None:
            check_path("path", path, WorkflowError)
        if env is not None:
            check_instance("env", env, Mapping, "a dict of variables, or None", WorkflowError)
        given = (arguments,) if isinstance(arguments, str) else tuple(as_list("arguments", arguments))
        for word in (*given, *(env or {}), *(env or {}).values()):
            name_of_word = "arguments" if word in given else "env"
            check_instance(name_of_word, word, str, "strings, as all arguments and variables of env", WorkflowError)
        if name in self._tools:
            raise WorkflowError(f"The registry already has a tool {shown(name)}. Use another name.")
        program = name if path is None else os.fspath(path)
        if os.sep in program:  # a relative path would be another file for a program that runs in another folder
            program = os.path.abspath(program)  # noqa: PTH100
        self._tools[name] = Tool(name, program, given, dict(env or {}))
        return self.find(name)

    def find(self, name: str) -> Tool:
        """Look for a tool on this machine.

        Returns:
            The tool; its ``path`` is None if it does not exist.

        Raises:
            WorkflowError: the registry has no tool of that name.
        """
        check_instance("name", name, str, "a string", WorkflowError)
        if name not in self._tools:
            raise self._unknown(name)
        tool = self._tools[name]
        searched = tool.program if os.sep in tool.program else os.pathsep.join(os.get_exec_path())
        path = shutil.which(tool.program)
        return replace(tool, path=path and os.path.abspath(path), searched=searched)  # noqa: PTH100

    def missing(self) -> list[str]:
        """Return the names of the tools that do not exist on this machine."""
        return [name for name in self._tools if self.find(name).path is None]

    def check(self) -> None:
        """Raise an error if a tool does not exist on this machine.

        Raises:
            ToolNotFound: names all tools that do not exist, and where they were looked for.
        """
        tools = [self.find(name) for name in self.missing()]
        if tools:
            faults = "; ".join(f"{tool.name!r}: no program {tool.program!r} in {tool.searched}" for tool in tools)
            raise ToolNotFound(
                f"{len(tools)} of {len(self._tools)} tools are missing. {faults}. "
                "Install them, or add them with path=.",
                program=", ".join(tool.program for tool in tools),
                searched=", ".join(dict.fromkeys(tool.searched for tool in tools)),
            )

    def shell(self, line: str, /, **arguments: Any) -> Command:
        """Make a task of a tool, as the function `shell` does of any program.

        Args:
            line: the tool's name and its arguments.
            **arguments: those of `shell`, except ``through_shell``. Variables in ``env`` override the tool's.

        Raises:
            WorkflowError: as `shell`, or the line does not begin with the name of a tool.
        """
        command = shell(line, **arguments)
        plain = command.program
        first = plain.line.words[0]
        if plain.line.is_script:
            raise WorkflowError(f"through_shell= must be left out for tools, as a shell reads the {plain.line}.")
        if len(first) != 1 or first[0].field:
            raise WorkflowError(f"The {plain.line} must begin with a tool, not a field: {listed(self._tools)}.")
        if first[0].text not in self._tools:
            raise self._unknown(first[0].text, f", which is the first word of the {plain.line}")
        tool = self.find(first[0].text)
        front = (tool.path or tool.program, *tool.arguments)
        return Command(shared(replace(plain, front=front, env=tuple(tool.env.items()))), command.given)

    def _unknown(self, name: str, place: str = "") -> WorkflowError:
        return WorkflowError(
            f"The registry has no tool {shown(name)}{place}; it has {listed(self._tools)}. "
            f"Add it with ToolRegistry.add({shown(name)})."
        )
