"""Change random places of the core packages, one at a time, and count the changes that the tests notice.

    python .ci/mutants.py --sample 40 --seed 1 --package store
    python .ci/mutants.py --module forgepar/store/gc.py --list
    python .ci/mutants.py --sample 200 --full --jobs 2

Each mutant is written to a copy of the checkout, because workers read the modules from disk. Stage 1 runs the test
files of the module: those with its name, else all of its package, and those that import it or name it. With ``--full``,
a mutant that passes stage 1 also meets the default suite. Both stages first run without a mutant: that shows that they
pass, and how long they take. A mutant with which they take four times as long, or one test takes a minute, counts as
noticed.

The tests run as root in namespaces of their own (`unshare`), as a mutant may remove or kill anything.

Exit code: 0 if the share of noticed mutants is at least ``--least``, else 1.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import functools
import itertools
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("scheduling", "engine", "values", "pool", "store", "backends")
_LEAST_LIMIT, _LIMIT_FACTOR = 60.0, 4.0  # seconds; times the duration without a mutant
_SLOW_TESTS = "tests/report/"  # browsers and drawings: stage 2 runs them
# A mutant may remove any file and kill any process. It sees no others, and can write to its copy and /dev/shm alone.
_UNSHARE = ("unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc")
_CONFINE = """
mount --make-rprivate /
mount --bind "$0" "$0"
cut -d " " -f 5 /proc/self/mountinfo | while read -r place; do
    case "$place" in "$0"|/proc|/proc/*|/sys|/sys/*|/dev|/dev/*) ;; *) mount -o remount,bind,ro "$place" ;; esac
done
mount -t tmpfs -o size=1g tmpfs /dev/shm
cd "$0/checkout"
touch /usr/mutant 2> /dev/null && exit 99
echo 5000 > /proc/sys/kernel/ns_last_pid  # tests make namespaces too, in which the first pids are others'
"$@"
"""
_NO_HANGS = ("-o", "faulthandler_timeout=60", "-o", "faulthandler_exit_on_timeout=true")  # of one test; pytest 9
_MOST_LINES = 60  # of the output that are kept, from its end
_LONGEST_BASELINE = 1800.0  # seconds

_COMPARISONS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: (r"is\s+not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: (r"not\s+in", "in"),
}  # fmt: skip
_ARITHMETIC = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "/"), ast.Pow: ("**", "*"), ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.BitXor: ("^", "&"),
}  # fmt: skip
_MESSAGES = {"report", "warn", "refusal", "add_note", "cast", "overload", "TypeVar"}  # their strings are for people
_WITHOUT_EFFECT = {"cast", "super"}


@functools.cache
def _text(path: str) -> bytes:
    return (ROOT / path).read_bytes()


@dataclass(frozen=True, order=True)
class Mutant:
    """A change of one place.

    Attributes:
        path: of the module, relative to the checkout.
        start: first byte that is replaced.
        end: the byte after the last one.
        new: replacement.
        line: line number.
        kind: what is changed.
    """

    path: str
    start: int
    end: int
    new: str
    line: int = field(compare=False)
    kind: str = field(compare=False)

    def source(self) -> bytes:
        """Return the text of the changed module."""
        text = _text(self.path)
        return text[: self.start] + self.new.encode() + text[self.end :]

    def changes(self) -> bool:
        """Return whether the module is still valid Python, and another program."""
        try:
            return ast.dump(ast.parse(self.source())) != ast.dump(ast.parse(_text(self.path)))
        except SyntaxError:
            return False

    def diff(self) -> str:
        """Return the change as a unified diff."""
        before, after = ((text.decode().splitlines()) for text in (_text(self.path), self.source()))
        return "\n".join(difflib.unified_diff(before, after, self.path, f"{self.path} ({self.kind})", "", "", 1, ""))


# Finding the places


class _Finder(ast.NodeVisitor):
    """Collects the mutants of one module."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._text = _text(path)
        lines = self._text.splitlines(keepends=True)
        self._line_starts = [sum(map(len, lines[:i])) for i in range(len(lines) + 1)]
        self.found: list[Mutant] = []
        self.visit(ast.parse(self._text))

    def _start(self, node: ast.expr | ast.stmt) -> int:
        return self._line_starts[node.lineno - 1] + node.col_offset

    def _end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._line_starts[node.end_lineno - 1] + node.end_col_offset

    def _of(self, node: ast.expr | ast.stmt) -> str:
        return self._text[self._start(node) : self._end(node)].decode()

    def _add(self, kind: str, start: int, end: int, new: str) -> None:
        line = self._text.count(b"\n", 0, start) + 1
        self.found.append(Mutant(self._path, start, end, new, line, kind))

    def _replace(self, kind: str, node: ast.expr | ast.stmt, new: str) -> None:
        self._add(kind, self._start(node), self._end(node), new)

    def _swap(self, kind: str, left: ast.expr, right: ast.expr, old: str, new: str) -> None:
        """Replace the operator between two operands."""
        start = self._end(left)
        place = re.search(old, self._text[start : self._start(right)].decode())
        if place:
            self._add(kind, start + place.start(), start + place.end(), new)

    # What is left out: annotations, docstrings, decorators, asserts, and text for people

    def generic_visit(self, node: ast.AST) -> None:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.visit(child)

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass  # nearly all are messages, and their parts have no positions of their own in Python 3.11

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in self._of(node.test):
            self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        pass  # what an error says is for `test_wordings.py`

    # Statements

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return
        if isinstance(node.value, ast.Call) and _called(node.value) not in _WITHOUT_EFFECT:
            self._replace("call deleted", node, "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self._replace("assigns None", node.value, "None")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        old, new = _ARITHMETIC.get(type(node.op), ("", ""))
        if old:
            self._swap("arithmetic", node.target, node.value, re.escape(old) + "=", new + "=")
        self._replace("assignment deleted", node, "pass")
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and self._of(node.value) != "None":
            self._replace("returns None", node.value, "None")
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        self._replace("loop", node, "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self._replace("loop", node, "break")

    # Expressions

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, op, right in zip([node.left, *node.comparators[:-1]], node.ops, node.comparators, strict=True):
            self._swap("comparison", left, right, *_COMPARISONS[type(op)])
        for part in (node.left, *node.comparators):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                self._replace("string", part, repr(part.value + "X"))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        old, new = _ARITHMETIC.get(type(node.op), ("", ""))
        is_text = any(isinstance(part, (ast.JoinedStr, ast.Constant)) and "'" in repr(getattr(part, "value", "'"))
                      for part in (node.left, node.right))  # fmt: skip
        if old and not is_text:
            self._swap("arithmetic", node.left, node.right, re.escape(old), new)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._swap("boolean", left, right, rf"\b{old}\b", new)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
            self._replace("negation deleted", node, f"({self._of(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._replace("constant", node, str(not node.value))
        elif isinstance(node.value, (int, float)):
            self._replace("constant", node, f"({self._of(node)} + 1)")

    def visit_Call(self, node: ast.Call) -> None:
        if _called(node) not in _MESSAGES:
            self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._replace("branch", node.test, f"not ({self._of(node.test)})")
        self.generic_visit(node)


def _called(node: ast.Call) -> str:
    function = node.func
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def mutants_of(path: str) -> list[Mutant]:
    """Return all mutants of a module, in the order of their places."""
    return sorted(set(_Finder(path).found))


# Running the tests


@functools.cache
def _texts(folder: str) -> dict[str, str]:
    return {str(file.relative_to(ROOT)): file.read_text() for file in sorted((ROOT / folder).rglob("*.py"))}


def _naming(path: str, texts: dict[str, str]) -> list[str]:
    """Return the files that import a module or name it."""
    module = ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")
    package, _, name = module.rpartition(".")
    patterns = rf"{re.escape(module)}\b", rf"from {re.escape(package)} import [^\n]*\b{name}\b", re.escape(path)
    names_it = re.compile("|".join(patterns))
    return [file for file, text in texts.items() if names_it.search(text)]


@functools.cache
def tests_of(path: str) -> tuple[str, ...]:
    """Return the test files of a module, those with its name first, else all of its package."""
    tests = {file: text for file, text in _texts("tests").items() if Path(file).name.startswith("test_")}
    naming = [file for file in _naming(path, tests) if not file.startswith(_SLOW_TESTS)]
    folder, stem = str(Path("tests", *Path(path).parts[1:-1])), Path(path).stem
    own = [
        file
        for file in tests
        if Path(file).stem == f"test_{stem}" or (str(Path(file).parent) == folder and file.endswith(f"_{stem}.py"))
    ]
    if not own:
        own = [file for file in tests if str(Path(file).parent) == folder]
    return tuple(dict.fromkeys(own + naming))


class Copy:
    """A copy of the checkout in which one mutant at a time is tested."""

    process: subprocess.Popen[bytes] | None = None  # of the test run

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._checkout = folder / "checkout"
        self._temporary = folder / "t"  # a short name, as paths of sockets are bounded
        found = subprocess.run(
            ["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True
        )
        names = found.stdout.decode().split("\0")
        self._files = {name: (ROOT / name).read_bytes() for name in names if name and (ROOT / name).is_file()}
        self._fill()

    def _fill(self) -> None:
        """Write all files anew: a mutant may have removed or changed any of them."""
        shutil.rmtree(self._checkout, ignore_errors=True)
        for name, content in self._files.items():
            target = self._checkout / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    def run(self, tests: tuple[str, ...], limit: float) -> tuple[int | None, str]:
        """Run test files; return pytest's exit code, or None if they took too long, and the end of its output."""
        self._temporary.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(self._checkout), "TMPDIR": str(self._temporary)}
        command = [*_UNSHARE, "sh", "-ec", _CONFINE, str(self._folder), sys.executable, "-m", "pytest"]
        options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", *_NO_HANGS, *tests]
        output = self._temporary / "output"
        try:
            with output.open("wb") as file:
                process = self.process = subprocess.Popen(
                    [*command, *options], env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
                )
                try:
                    code = process.wait(limit)
                except subprocess.TimeoutExpired:
                    code = None
                finally:
                    process.kill()  # and with it the whole namespace
                    process.wait()
            return code, "\n".join(output.read_text(errors="replace").splitlines()[-_MOST_LINES:])
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    @contextlib.contextmanager
    def changed(self, mutant: Mutant) -> Iterator[None]:
        """Have the copy contain a mutant."""
        (self._checkout / mutant.path).write_bytes(mutant.source())
        try:
            yield
        finally:
            self._fill()


@dataclass
class Examiner:
    """Tests mutants, and remembers how long the tests take without them."""

    full: bool
    tests: tuple[str, ...] = ()
    copies: queue.SimpleQueue[Copy] = field(default_factory=queue.SimpleQueue)
    _seconds: dict[tuple[str, ...], float] = field(default_factory=dict)

    def examine(self, mutant: Mutant) -> str:
        """Return what noticed a mutant; an empty string if nothing did."""
        copy = self.copies.get()
        try:
            own = self.tests or tests_of(mutant.path)
            stages = [own] if own else []
            if self.full:
                stages.append(("tests",))
            for tests in stages:
                limit = max(_LEAST_LIMIT, _LIMIT_FACTOR * self._baseline(copy, tests))
                with copy.changed(mutant):
                    code, output = copy.run(tests, limit)
                if code is None:
                    return "hangs"
                if code and "\nTimeout (" in f"\n{output}":
                    return "hangs"
                if code:
                    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
                    return failed[1] if failed else f"exit code {code}"
            return ""
        finally:
            self.copies.put(copy)

    def _baseline(self, copy: Copy, tests: tuple[str, ...]) -> float:
        """Return how long tests take without a mutant, seconds."""
        if tests not in self._seconds:
            began = time.monotonic()
            code, output = copy.run(tests, _LONGEST_BASELINE)
            if code:
                raise SystemExit(f"These tests fail without a mutant: {' '.join(tests)}\n{output}")
            self._seconds[tests] = time.monotonic() - began
        return self._seconds[tests]


# The command


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sample", type=int, default=20, help="number of mutants; 0 for all (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument("--package", action="append", choices=PACKAGES, help="only this package; may be repeated")
    parser.add_argument("--module", action="append", help="only this file, such as forgepar/store/gc.py")
    parser.add_argument("--tests", nargs="+", default=[], help="run these test files in stage 1")
    parser.add_argument("--full", action="store_true", help="run the default suite on what the module's tests miss")
    parser.add_argument("--jobs", type=int, default=1, help="test runs at a time (default: 1)")
    parser.add_argument("--least", type=float, default=0.0, help="share that must be noticed (default: 0)")
    parser.add_argument("--list", action="store_true", help="print the sample and test nothing")
    return parser.parse_args()


def _sample(options: argparse.Namespace) -> list[Mutant]:
    paths = options.module or [
        str(path.relative_to(ROOT))
        for package in options.package or PACKAGES
        for path in sorted((ROOT / "forgepar" / package).rglob("*.py"))
    ]
    every = [mutant for path in paths for mutant in mutants_of(str(Path(path)))]
    random.Random(options.seed).shuffle(every)
    sample = list(itertools.islice(filter(Mutant.changes, every), options.sample or None))
    print(f"{len(sample)} of about {len(every)} mutants in {len(paths)} modules, seed {options.seed}", flush=True)
    return sorted(sample)


def _report(verdicts: dict[Mutant, str]) -> float:
    """Print missed mutants and the share noticed per package; return the share of all."""
    total, noticed = Counter[str](), Counter[str]()
    for mutant, by in sorted(verdicts.items()):
        package = Path(mutant.path).parts[1]
        total[package] += 1
        noticed[package] += bool(by)
        if not by:
            print(f"\nmissed: {mutant.path}:{mutant.line}, {mutant.kind}\n{mutant.diff()}")
    print()
    for package, n in total.items():
        print(f"{package:12} {noticed[package]:4} of {n:4} noticed, {noticed[package] / n:.0%}")
    share = noticed.total() / max(1, total.total())
    print(f"{'all':12} {noticed.total():4} of {total.total():4} noticed, {share:.0%}")
    return share


def main() -> int:
    """Run the command; return its exit code."""
    options = _arguments()
    sample = _sample(options)
    if options.list:
        for mutant in sample:
            print(f"\n{mutant.path}:{mutant.line}, {mutant.kind}\n{mutant.diff()}")
        return 0
    examiner = Examiner(options.full, tuple(options.tests))
    verdicts: dict[Mutant, str] = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(options.jobs) as threads:
        copies = [Copy(Path(folder) / str(i)) for i in range(options.jobs)]
        for copy in copies:
            examiner.copies.put(copy)
        try:
            for mutant, by in zip(sample, threads.map(examiner.examine, sample), strict=True):
                verdicts[mutant] = by
                print(f"{mutant.path}:{mutant.line}, {mutant.kind}: {by or 'MISSED'}", flush=True)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            for copy in copies:
                if copy.process is not None:
                    copy.process.kill()
            raise
    return 0 if _report(verdicts) >= options.least else 1


if __name__ == "__main__":
    sys.exit(main())
