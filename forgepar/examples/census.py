"""A census of the standard library: the size, the complexity and the imports of its modules.

One task per module parses a file and measures it. A few tasks at the end combine the measures::

    find_modules --> measure_module, per module --+--> import_graph --> strongly_connected --+--> render
    (while declaring)                             +--> summarise_packages -------------------+
                                                  +--> most_complex -------------------------+
                                                  +--> list_unparsed ------------------------+

Measure the standard library of the running Python, then again with one worker; both print the same report. Or measure
another folder::

    forgepar run forgepar.examples.census
    forgepar run forgepar.examples.census --workers 1
    forgepar run forgepar.examples.census -p root=path/to/folder
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import forgepar as fp

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
N_FUNCTIONS, N_PACKAGES, N_NAMES = 10, 12, 4  # functions, packages and names per cycle in the report

Graph = Mapping[str, Sequence[str]]  # the name of each module, and the names of the modules that it imports


class Function(NamedTuple):
    """A function, its complexity and the line where it begins."""

    complexity: int
    module: str
    name: str
    line: int


class Module(NamedTuple):
    """The measures of a module: a few KiB, however long its file. Only these are sent between processes."""

    path: str  # its file, relative to the folder from which it is imported
    n_lines: int = 0
    complexities: Sequence[int] = ()  # of all functions
    most_complex: Sequence[Function] = ()
    imports: Sequence[str] = ()  # absolute names, each once
    error: str = ""  # why the file was not parsed


def find_modules(root: Path) -> tuple[Path, list[str]]:
    """Return the folder from which modules below ``root`` are imported, and their paths relative to it.

    The largest files come first: a long task that starts last would run while the other workers are idle.
    """
    if not root.is_dir():
        raise ValueError(f"root must be a folder, got {str(root)!r}.")
    base = root = root.resolve()
    while (base / "__init__.py").is_file():
        base = base.parent
    sizes: dict[str, int] = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        sizes |= {path.relative_to(base).as_posix(): path.stat().st_size for path in paths if path.is_file()}
    if not sizes:
        raise ValueError(f"root must be a folder with .py files, got {str(root)!r}.")
    return base, sorted(sizes, key=lambda path: (-sizes[path], path))


def module_name(path: str) -> str:
    """Return the name under which a module is imported, from its path."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def measure_module(path: str, *, base: str, count: int) -> Module:
    """Parse the module at ``base/path`` and measure it; keep its ``count`` most complex functions."""
    try:
        source = Path(base, path).read_bytes()
        with warnings.catch_warnings():  # such as those about invalid escapes in literals
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Module(path, error=describe(error))
    functions = measure_functions(tree, module_name(path))
    complexities = tuple(function.complexity for function in functions)
    return Module(path, len(source.splitlines()), complexities, functions[:count], find_imports(tree, path))


def describe(error: Exception) -> str:
    """Return why a file was not parsed, on one line and without its path, so that reports can be compared."""
    text = error.strerror if isinstance(error, OSError) else str(error)
    if isinstance(error, SyntaxError):
        text = error.msg + (f" (line {error.lineno})" if error.lineno else "")
    return f"{type(error).__name__}: {text or 'no details'}"


def measure_functions(tree: ast.AST, module: str) -> list[Function]:
    """Measure all functions of a module, the most complex first.

    Complexity is the cyclomatic number (T. J. McCabe, "A Complexity Measure", IEEE Transactions on Software
    Engineering SE-2 (4), 1976): one more than the number of decisions. A nested function is measured by itself. A
    lambda and the body of a class belong to the enclosing function. Names are those of ``__qualname__``.
    """
    names: dict[ast.FunctionDef | ast.AsyncFunctionDef, str] = {}
    complexity = Counter[ast.AST | None]()
    # A stack, as code may be nested more deeply than Python allows functions to recurse. It has nodes, each with its
    # enclosing function and the prefix of the names that are defined in it.
    pending: list[tuple[ast.AST, ast.AST | None, str]] = [(tree, None, "")]
    while pending:
        node, function, prefix = pending.pop()
        complexity[function] += decisions(node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names[node] = prefix + node.name
            complexity[node] += 1
            pending += [(part, node, f"{prefix}{node.name}.<locals>.") for part in node.body]
            pending += [(part, function, prefix) for part in (*node.decorator_list, node.args)]
        else:
            inside = f"{prefix}{node.name}." if isinstance(node, ast.ClassDef) else prefix
            pending += [(part, function, inside) for part in ast.iter_child_nodes(node)]
    return sorted((Function(complexity[node], module, name, node.lineno) for node, name in names.items()), key=rank)


def decisions(node: ast.AST) -> int:
    """Count the decisions that a node takes by itself: each condition of a compound predicate counts.

    ``else``, ``finally`` and ``with`` decide nothing. A chained comparison is one condition.
    """
    match node:
        case ast.If() | ast.IfExp() | ast.For() | ast.AsyncFor() | ast.While() | ast.ExceptHandler() | ast.Assert():
            return 1
        case ast.BoolOp(values=operands) | ast.MatchOr(patterns=operands):
            return len(operands) - 1
        case ast.comprehension(ifs=conditions):
            return 1 + len(conditions)
        case ast.match_case(pattern=pattern, guard=guard):
            matches_anything = isinstance(pattern, ast.MatchAs) and pattern.pattern is None
            return (not matches_anything) + (guard is not None)
    return 0


def rank(function: Function) -> tuple[int, str, int, str]:
    """Sort functions by this key: the most complex first, those of equal complexity by place."""
    return -function.complexity, function.module, function.line, function.name


def find_imports(tree: ast.Module, path: str) -> tuple[str, ...]:
    """Return the absolute names that a module imports, also in functions and under conditions."""
    package = module_name(path.rpartition("/")[0])
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            try:
                source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:  # the dots lead out of the top-level package
                continue
            found.update(f"{source}.{alias.name}" for alias in node.names)
    return tuple(sorted(found))


def import_graph(modules: Iterable[Module]) -> dict[str, tuple[str, ...]]:
    """Return which modules import which others of them.

    An import leads to the longest part of its name that is a module: ``from package import name`` to ``package.name``
    or else to ``package``. Imports of other modules are left out, and imports of a module by itself.
    """
    edges: dict[str, set[str]] = {module_name(module.path): set() for module in modules}
    for module in modules:
        importer = module_name(module.path)
        for name in module.imports:
            while name and name not in edges:
                name = name.rpartition(".")[0]
            if name not in ("", importer):
                edges[importer].add(name)
    return {name: tuple(sorted(edges[name])) for name in sorted(edges)}


def strongly_connected(graph: Graph) -> list[tuple[str, ...]]:
    """Return the cycles, the largest first: sets of modules each of which imports all others, directly or not.

    This is Kosaraju's algorithm. A first search orders the modules; a second one, from the last of these and against
    the direction of the imports, reaches one cycle at a time.
    """
    importers: dict[str, list[str]] = {name: [] for name in graph}
    for name, targets in graph.items():
        for target in targets:
            importers[target].append(name)
    seen: set[str] = set()
    order = [name for start in graph for name in search(graph, start, seen)]
    seen.clear()
    components = [tuple(sorted(search(importers, start, seen))) for start in reversed(order)]
    return sorted((names for names in components if len(names) > 1), key=lambda names: (-len(names), names))


def search(graph: Graph, start: str, seen: set[str]) -> list[str]:
    """Return the modules that lead on from ``start`` and are not in ``seen``, in depth-first postorder; add them to it.

    The search does not recurse, as chains of imports may be longer than Python allows.
    """
    found: list[str] = []
    path = [(start, iter(graph[start]))] if start not in seen else []
    seen.add(start)
    while path:
        name, targets = path[-1]
        target = next((target for target in targets if target not in seen), None)
        if target is None:
            found.append(name)
            path.pop()
        else:
            seen.add(target)
            path.append((target, iter(graph[target])))
    return found


def summarise_packages(modules: Iterable[Module], *, count: int) -> list[tuple[str, ...]]:
    """Return a row for each of the ``count`` top-level packages with most lines, one for the others and a total."""
    parsed = [module for module in modules if not module.error]
    packages: dict[str, list[Module]] = defaultdict(list)
    for module in parsed:
        packages[module_name(module.path.partition("/")[0])].append(module)
    ordered = sorted(packages, key=lambda name: (-sum(module.n_lines for module in packages[name]), name))
    rows = [package_row(name, packages[name]) for name in ordered[:count]]
    if others := ordered[count:]:
        rows.append(package_row(f"{len(others)} more", [module for name in others for module in packages[name]]))
    return [*rows, package_row("total", parsed)]


def package_row(name: str, modules: Sequence[Module]) -> tuple[str, ...]:
    """Return a row of the table of packages: modules, lines, functions, mean and maximum of their complexity."""
    complexities = [complexity for module in modules for complexity in module.complexities]
    counts = (len(modules), sum(module.n_lines for module in modules), len(complexities))
    mean = sum(complexities) / max(len(complexities), 1)
    return (name, *(f"{n:,}" for n in counts), f"{mean:.2f}", str(max(complexities, default=0)))


def most_complex(modules: Iterable[Module], *, count: int) -> list[Function]:
    """Return the most complex functions of all modules."""
    return sorted((function for module in modules for function in module.most_complex), key=rank)[:count]


def list_unparsed(modules: Iterable[Module]) -> list[tuple[str, str]]:
    """Return the path of each file that could not be parsed, and the reason."""
    return sorted((module.path, module.error) for module in modules if module.error)


def render(
    title: str,
    *,
    packages: Iterable[Sequence[str]],
    functions: Iterable[Function],
    graph: Graph,
    cycles: Sequence[Sequence[str]],
    unparsed: Sequence[tuple[str, str]],
) -> str:
    """Return the report, from the values of the other tasks."""
    n_imports = sum(map(len, graph.values()))
    n_parsed = len(graph) - len(unparsed)
    counts = f"{len(graph):,} modules, {n_parsed:,} of them parsed, {n_imports:,} imports among them"
    places = [(f"{each.module}:{each.name}", str(each.line), str(each.complexity)) for each in functions]
    parts = [
        [f"Census of {title}: {counts}"],
        table(("package", "modules", "lines", "functions", "mean", "max"), packages),
        ["The most complex functions", *table(("function", "line", "complexity"), places)],
        [f"Import cycles: {len(cycles)}", *map(cycle_line, cycles)],
        [f"Not parsed: {len(unparsed)}", *(f"  {path}: {reason}" for path, reason in unparsed)],
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def cycle_line(cycle: Sequence[str]) -> str:
    """Return the report's line about a cycle."""
    more = f" and {len(cycle) - N_NAMES} more" if len(cycle) > N_NAMES else ""
    return f"  {len(cycle):>3} modules: {', '.join(cycle[:N_NAMES])}{more}"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table, its first column flush left and the others flush right."""
    texts = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    texts.insert(1, ["-" * width for width in widths])
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in texts]


def workflow(root: str | Path | None = None) -> fp.Workflow:
    """Declare the census of a folder; None is the standard library. Its only output is the value of ``render``."""
    folder = Path(sysconfig.get_path("stdlib") if root is None else root)
    base, paths = find_modules(folder)
    wf = fp.Workflow("census")
    # The most complex functions of all are among the most complex of each module, so no others need to be sent.
    modules = wf.map(measure_module, paths, base=str(base), count=N_FUNCTIONS)
    graph = wf.add(import_graph, modules)
    wf.add(
        render,
        folder.resolve().name,
        packages=wf.add(summarise_packages, modules, count=N_PACKAGES),
        functions=wf.add(most_complex, modules, count=N_FUNCTIONS),
        graph=graph,
        cycles=wf.add(strongly_connected, graph),
        unparsed=wf.add(list_unparsed, modules),
    )
    return wf


if __name__ == "__main__":
    print(workflow(*sys.argv[1:2]).run()["render"])
