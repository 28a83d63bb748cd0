"""A census of the standard library: how large, how complex and how entangled are its modules?

One task a module parses its file and measures it; a few tasks at the end put the measures together::

    find_modules --> measure_module, once a module --+--> import_graph --> strongly_connected --+--> render
    (declaring)                                      +--> summarise_packages -------------------+
                                                     +--> most_complex -------------------------+
                                                     +--> list_unparsed ------------------------+

Every ``.py`` file below the root is a module, tests and test data included; folders named ``site-packages``,
``dist-packages`` and ``__pycache__`` are left out. A file that cannot be parsed is reported, with the reason.

Run it on the running Python's standard library, then with one worker to compare; the report is the same::

    forgepar run forgepar.examples.census
    forgepar run forgepar.examples.census --workers 1

or on any folder with ``-p root=path/to/folder``; ``python -m forgepar.examples.census path/to/folder`` does the
same. The report, abridged::

    Census of python3.11: 1,790 modules, 1,781 of them parsed, 9,119 imports among them

    package     modules    lines  functions  mean  max
    ----------  -------  -------  ---------  ----  ---
    test            816  464,671     36,630  1.56   55
    idlelib         125   34,537      2,349  2.07   56
    190 more        308  183,345      9,964  3.31  123
    total         1,781  857,247     58,754  1.97  123

    The most complex functions
    function                                line  complexity
    --------------------------------------  ----  ----------
    re._parser:_parse                        516         123
    _strptime:_strptime                      309          77
    shlex:shlex.read_token                   133          72

    Import cycles: 15
      252 modules: _aix_support, _bootsubprocess, _collections_abc, _compression and 248 more
        4 modules: distutils.cmd, distutils.config, distutils.core, distutils.dist

    Not parsed: 9
      test/tokenizedata/bad_coding.py: SyntaxError: unknown encoding: uft-8

Complexity is the cyclomatic number of T. J. McCabe, "A Complexity Measure", IEEE Transactions on Software
Engineering SE-2 (4), 1976: one more than a function's decisions, where each condition of a compound predicate
counts. Decisions are:

- ``if``, ``elif``, a conditional expression, ``for``, ``while``, ``except``, ``assert``: one each;
- ``and`` and ``or``: one for each operand after the first; likewise for the ``|`` of a pattern;
- a comprehension: one for each ``for`` and for each ``if``;
- ``case``: one, unless its pattern matches anything, and one for its guard.

``else``, ``finally`` and ``with`` decide nothing; a chained comparison is one condition. A nested function is
a function of its own; a lambda, or the body of a nested class, belongs to the function around it. Names are
as in ``__qualname__``. An import counts wherever it stands, in a function or an ``if`` too.
"""

from __future__ import annotations

import ast
import os
import sys
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import forgepar as fp

SKIPPED_FOLDERS = frozenset(("site-packages", "dist-packages", "__pycache__"))
N_COMPLEX = 10  # functions in the report
N_PACKAGES = 12  # packages with a row of their own in the report
N_NAMES = 4  # members of a cycle that the report names

Graph = Mapping[str, Sequence[str]]  # each module's name, and the names of the modules it imports


class Function(NamedTuple):
    """A function and its complexity; ``module`` is the name of its module, ``line`` where it begins."""

    complexity: int
    module: str
    name: str
    line: int


class Import(NamedTuple):
    """What one statement imports: a module by its absolute name, or ``names`` from it."""

    module: str
    names: tuple[str, ...] = ()


class Size(NamedTuple):
    """How much code there is, in one module or in several together."""

    n_modules: int = 0
    n_lines: int = 0
    n_functions: int = 0
    total_complexity: int = 0
    max_complexity: int = 0

    @property
    def mean_complexity(self) -> float:
        """The mean complexity of a function."""
        return self.total_complexity / max(self.n_functions, 1)


class Module(NamedTuple):
    """The measures of a module: all that travels of it, a few KiB however long its file.

    Attributes:
        path: its file, below the import folder.
        size: how much code it holds.
        functions: its most complex functions.
        imports: what it imports, each once.
    """

    path: str
    size: Size
    functions: tuple[Function, ...]
    imports: tuple[Import, ...]


class Unparsed(NamedTuple):
    """A file that could not be parsed, and why."""

    path: str
    reason: str


def find_modules(root: Path) -> tuple[Path, list[str]]:
    """Find the modules below a folder without reading any.

    The largest come first: a long task begun last would keep one worker busy while the others are idle.

    Args:
        root: a folder; it may be a package or lie in one.

    Returns:
        The folder from which the modules are imported, and the paths of the modules below it.

    Raises:
        ValueError: ``root`` is no folder, or no file in it ends in ``.py``.
    """
    mend = "Give the path of a folder with .py files."
    if not root.is_dir():
        raise ValueError(f"root={str(root)!r} is no folder. {mend}")
    folder = root.resolve()
    base = import_folder(folder)
    sizes = {Path(file.path).relative_to(base).as_posix(): file.stat().st_size for file in _scan(folder)}
    if not sizes:
        raise ValueError(f"root={str(root)!r} has no .py file in it. {mend}")
    return base, sorted(sizes, key=lambda path: (-sizes[path], path))


def import_folder(folder: Path) -> Path:
    """Return the nearest folder, this one or around it, that is no package."""
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


def _scan(root: Path) -> Iterator[os.DirEntry[str]]:
    folders = [os.fspath(root)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders += [entry.path] if entry.name not in SKIPPED_FOLDERS else []
                elif entry.name.endswith(".py") and entry.is_file():
                    yield entry


def module_name(path: str) -> str:
    """Turn the path of a module into the name under which it is imported."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def measure_module(path: str, *, base: str, count: int) -> Module | Unparsed:
    """Parse a module and measure it.

    Args:
        path: its file, below ``base``.
        base: the folder from which it is imported.
        count: how many of its most complex functions to keep.
    """
    try:
        source = Path(base, path).read_bytes()
        tree = parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Unparsed(path, explain(error))
    functions = measure_functions(tree, module_name(path))
    counts = [function.complexity for function in functions]
    size = Size(1, len(source.splitlines()), len(counts), sum(counts), max(counts, default=0))
    return Module(path, size, tuple(functions[:count]), find_imports(tree, path))


def parse(source: bytes) -> ast.Module:
    """Parse source text, whatever encoding it declares, without warnings about dubious literals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def explain(error: Exception) -> str:
    """Say in one line why a file was not parsed, without naming the place of the file."""
    if isinstance(error, SyntaxError):
        line = f" (line {error.lineno})" if error.lineno else ""
        return f"{type(error).__name__}: {error.msg}{line}"
    fault = error.strerror if isinstance(error, OSError) else str(error)
    return f"{type(error).__name__}: {fault or 'no details'}"


def _one(_: ast.AST) -> int:
    return 1


def _decisions_of_case(case: ast.match_case) -> int:
    matches_anything = isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None
    return (not matches_anything) + (case.guard is not None)


_SINGLE = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert)
_DECISIONS: Mapping[type[ast.AST], Callable[[Any], int]] = {
    **dict.fromkeys(_SINGLE, _one),
    ast.BoolOp: lambda node: len(node.values) - 1,
    ast.MatchOr: lambda node: len(node.patterns) - 1,
    ast.comprehension: lambda node: 1 + len(node.ifs),
    ast.match_case: _decisions_of_case,
}


def measure_functions(tree: ast.AST, module: str) -> list[Function]:
    """Measure all functions of a module, the most complex first.

    Args:
        tree: the parsed module.
        module: its name.
    """
    found = [Function(1, module, "", 0)]  # code outside of functions is counted here, and dropped
    decisions = [0]
    # Each node with what the names in it begin with, and the number of the function that it belongs to.
    pending: list[tuple[ast.AST, str, int]] = [(tree, "", 0)]
    while pending:
        node, prefix, owner = pending.pop()
        if count := _DECISIONS.get(type(node)):
            decisions[owner] += count(node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(Function(1, module, prefix + node.name, node.lineno))
            decisions.append(0)
            own, inner = len(decisions) - 1, f"{prefix}{node.name}.<locals>."
            pending += [(part, inner, own) for part in node.body]
            # Decorators and defaults run in the function around.
            pending += [(part, prefix, owner) for part in (*node.decorator_list, node.args)]
            continue
        inside = f"{prefix}{node.name}." if isinstance(node, ast.ClassDef) else prefix
        pending += [(part, inside, owner) for part in ast.iter_child_nodes(node)]
    counted = zip(found, decisions, strict=True)
    return rank(function._replace(complexity=1 + count) for function, count in counted if function.line)


def rank(functions: Iterable[Function]) -> list[Function]:
    """Sort functions, the most complex first, those of equal complexity by place."""
    return sorted(functions, key=lambda each: (-each.complexity, each.module, each.line, each.name))


def find_imports(tree: ast.Module, path: str) -> tuple[Import, ...]:
    """Find all imports of a module, those inside functions and conditions included.

    Args:
        tree: the parsed module.
        path: its file, from which relative imports count.
    """
    found: set[Import] = set()
    for statement in _statements(tree):
        if isinstance(statement, ast.Import):
            found.update(Import(alias.name) for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            source = absolute_name(path, statement.level, statement.module or "")
            found.add(Import(source, tuple(sorted({alias.name for alias in statement.names}))))
    return tuple(sorted(found))


_HOLD_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        yield node
        pending += [part for part in ast.iter_child_nodes(node) if isinstance(part, _HOLD_STATEMENTS)]


def absolute_name(path: str, level: int, module: str) -> str:
    """Return the absolute name of the module in ``from ...module import``.

    Args:
        path: the file of the importing module.
        level: how many dots there are.
        module: what follows the dots.

    Returns:
        The name, "" if the dots lead out of all packages.
    """
    if level == 0:
        return module
    packages = path.split("/")[:-1]
    if level > len(packages):
        return ""
    around = packages[: len(packages) - level + 1]
    return ".".join((*around, module) if module else around)


def import_graph(modules: Iterable[Module | Unparsed]) -> dict[str, tuple[str, ...]]:
    """Resolve the imports among the modules.

    ``from package import name`` leads to ``package.name`` if that is a module, otherwise to ``package``; a
    name that is none of the modules, such as ``os.path``, to the longest part of it that is. Other imports
    are left out, and so are those of a module by itself.
    """
    edges: dict[str, set[str]] = {module_name(module.path): set() for module in modules}
    for module in _parsed(modules):
        name = module_name(module.path)
        for imported in module.imports:
            edges[name].update(target for target in _targets(imported, edges) if target not in ("", name))
    return {name: tuple(sorted(edges[name])) for name in sorted(edges)}


def _parsed(modules: Iterable[Module | Unparsed]) -> list[Module]:
    return [module for module in modules if isinstance(module, Module)]


def _targets(imported: Import, known: Mapping[str, object]) -> Iterator[str]:
    """Yield the known modules that an import leads to, and "" where it leads to none."""
    source = _longest_known(imported.module, known)
    if not imported.names:
        yield source
    for name in imported.names:
        submodule = f"{imported.module}.{name}"
        yield submodule if submodule in known else source


def _longest_known(name: str, known: Mapping[str, object]) -> str:
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def strongly_connected(graph: Graph) -> list[tuple[str, ...]]:
    """Find the cycles: sets of modules each of which imports all others of its set, directly or not.

    Args:
        graph: every module, and the modules it imports.

    Returns:
        Each set sorted, the largest first.
    """
    search = _CycleSearch(graph)
    for name in graph:
        search.visit(name)
    return sorted(search.cycles, key=lambda cycle: (-len(cycle), cycle))


class _CycleSearch:
    """R. Tarjan's algorithm (1972) without recursion: chains of imports may be longer than Python allows."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.cycles: list[tuple[str, ...]] = []
        self.order: dict[str, int] = {}
        self.lowest: dict[str, int] = {}  # the earliest module on the path that each leads back to
        self.unassigned: list[str] = []
        self.path: list[tuple[str, Iterator[str]]] = []

    def visit(self, start: str) -> None:
        if start not in self.order:
            self.enter(start)
        while self.path:
            name, targets = self.path[-1]
            target = next(targets, None)
            if target is None:
                self.leave(name)
            elif target not in self.order:
                self.enter(target)
            else:
                self.lowest[name] = min(self.lowest[name], self.lowest[target])

    def enter(self, name: str) -> None:
        self.order[name] = self.lowest[name] = len(self.order)
        self.unassigned.append(name)
        self.path.append((name, iter(self.graph[name])))

    def leave(self, name: str) -> None:
        self.path.pop()
        if self.lowest[name] == self.order[name]:
            self.close(name)
        if self.path:
            around = self.path[-1][0]
            self.lowest[around] = min(self.lowest[around], self.lowest[name])

    def close(self, first: str) -> None:
        """Take the set that begins with ``first`` out of the search."""
        members = [self.unassigned.pop()]
        while members[-1] != first:
            members.append(self.unassigned.pop())
        self.lowest.update(dict.fromkeys(members, len(self.graph)))  # leads back to nothing any more
        if len(members) > 1:
            self.cycles.append(tuple(sorted(members)))


def summarise_packages(modules: Iterable[Module | Unparsed]) -> list[tuple[str, Size]]:
    """Add up the modules of each top-level package or module, the one with most lines first."""
    sizes: dict[str, list[Size]] = defaultdict(list)
    for module in _parsed(modules):
        sizes[module_name(module.path.partition("/")[0])].append(module.size)
    packages = [(name, add_up(parts)) for name, parts in sizes.items()]
    return sorted(packages, key=lambda package: (-package[1].n_lines, package[0]))


def add_up(sizes: Iterable[Size]) -> Size:
    """Return the size of several parts together."""
    parts = [Size(), *sizes]
    return Size(
        n_modules=sum(part.n_modules for part in parts),
        n_lines=sum(part.n_lines for part in parts),
        n_functions=sum(part.n_functions for part in parts),
        total_complexity=sum(part.total_complexity for part in parts),
        max_complexity=max(part.max_complexity for part in parts),
    )


def most_complex(modules: Iterable[Module | Unparsed], *, count: int) -> list[Function]:
    """Return the most complex functions of all modules.

    Args:
        modules: the measures of the modules, each with as many of its functions.
        count: how many functions.
    """
    return rank(function for module in _parsed(modules) for function in module.functions)[:count]


def list_unparsed(modules: Iterable[Module | Unparsed]) -> list[Unparsed]:
    """Return the files that could not be parsed."""
    return sorted(module for module in modules if isinstance(module, Unparsed))


def render(
    title: str,
    *,
    packages: Sequence[tuple[str, Size]],
    functions: Sequence[Function],
    graph: Graph,
    cycles: Sequence[Sequence[str]],
    unparsed: Sequence[Unparsed],
) -> str:
    """Return the report.

    Args:
        title: what the census is of.
        packages: what `summarise_packages` returned.
        functions: what `most_complex` returned.
        graph: what `import_graph` returned.
        cycles: what `strongly_connected` returned.
        unparsed: what `list_unparsed` returned.
    """
    n_parsed = sum(size.n_modules for _, size in packages)
    n_imports = sum(map(len, graph.values()))
    counts = f"{n_parsed + len(unparsed):,} modules, {n_parsed:,} of them parsed, {n_imports:,} imports among them"
    parts = [
        [f"Census of {title}: {counts}"],
        _package_table(packages),
        ["The most complex functions", *_function_table(functions)],
        [f"Import cycles: {len(cycles)}", *map(_cycle_line, cycles)],
        [f"Not parsed: {len(unparsed)}", *(f"  {path}: {reason}" for path, reason in unparsed)],
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def _package_table(packages: Sequence[tuple[str, Size]]) -> list[str]:
    head, tail = packages[:N_PACKAGES], packages[N_PACKAGES:]
    rest = [(f"{len(tail)} more", add_up(size for _, size in tail))] if tail else []
    total = ("total", add_up(size for _, size in packages))
    titles = ("package", "modules", "lines", "functions", "mean", "max")
    return table(titles, [_package_row(*package) for package in (*head, *rest, total)])


def _package_row(name: str, size: Size) -> tuple[str, ...]:
    counts = (f"{count:,}" for count in (size.n_modules, size.n_lines, size.n_functions))
    return (name, *counts, f"{size.mean_complexity:.2f}", str(size.max_complexity))


def _function_table(functions: Iterable[Function]) -> list[str]:
    rows = [(f"{each.module}:{each.name}", str(each.line), str(each.complexity)) for each in functions]
    return table(("function", "line", "complexity"), rows)


def _cycle_line(cycle: Sequence[str]) -> str:
    named = ", ".join(cycle[:N_NAMES])
    more = f" and {len(cycle) - N_NAMES} more" if len(cycle) > N_NAMES else ""
    return f"  {len(cycle):>3} modules: {named}{more}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out rows of text in columns, the first flush left, the others flush right.

    Args:
        titles: one a column.
        rows: as many texts each.
    """
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    return [_line(row, widths) for row in (titles, rule, *rows)]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(row, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)])


def workflow(root: str | Path | None = None) -> fp.Workflow:
    """Declare the census of a folder.

    Args:
        root: the folder; None is the running Python's standard library.

    Returns:
        A workflow with one output, the report: the value of ``render``.

    Raises:
        ValueError: ``root`` is no folder, or no file in it ends in ``.py``.
    """
    folder = Path(sysconfig.get_path("stdlib") if root is None else root)
    base, paths = find_modules(folder)
    wf = fp.Workflow("census")
    # The most complex functions of all are among the most complex of their modules: more need not travel.
    modules = wf.map(measure_module, paths, base=str(base), count=N_COMPLEX)
    graph = wf.add(import_graph, modules)
    wf.add(
        render,
        folder.resolve().name,
        packages=wf.add(summarise_packages, modules),
        functions=wf.add(most_complex, modules, count=N_COMPLEX),
        graph=graph,
        cycles=wf.add(strongly_connected, graph),
        unparsed=wf.add(list_unparsed, modules),
    )
    return wf


if __name__ == "__main__":
    print(workflow(*sys.argv[1:2]).run()["render"])
