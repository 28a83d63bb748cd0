"""Check an installed package that has its core dependencies alone: python -P .ci/check_installed.py README.md.

It must not be the checkout that is imported, so this runs in an empty folder, with that folder's Python.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib import resources
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # for readme_block
from readme_block import block

DATA = ["py.typed", "__init__.pyi", "report/html/page.html", "report/html/page.css", "report/html/page.js"]
EXTRAS = ["bokeh", "rich", "shtab", "joblib", "distributed", "dask", "loky", "scipy", "pytest"]
PIPELINE = """
import forgepar as fp

flow = fp.Workflow("flow")
total = flow.add(sum, flow.map(abs, [-1, -2]))
"""
OF_FLOW = ["pipe.py:flow"]
# Of each subcommand: arguments, the exit code, and a text that it must print. Those that need an extra must say so.
CALLS = {
    "run": ([*OF_FLOW, "-w", "2", "--summary", "--store", "runs.db"], 0, "3"),
    "check": (OF_FLOW, 0, ""),
    "layers": (OF_FLOW, 0, "sum"),
    "graph": ([*OF_FLOW, "-o", "graph.svg"], 0, ""),
    "runs": (["runs.db"], 0, "flow"),
    "show": (["runs.db"], 0, "sum"),
    "values": (["runs.db"], 0, "sum"),
    "export": (["runs.db"], 0, "{"),
    "gc": (["runs.db", "--keep", "5"], 0, ""),
    "report": (["runs.db", "-o", "run.html"], 2, "forgepar[report]"),
    "plan": (["runs.db"], 0, "workers"),
    "top": (["runs.db"], 0, "completed"),
    "completion": (["bash"], 2, "forgepar[cli]"),
}


def check_surroundings() -> None:
    """Check that the wheel is what is imported, with its data files, and that no extra is installed."""
    import forgepar

    place = Path(forgepar.__file__).parent
    assert "site-packages" in place.parts, f"{place} is not where a wheel is installed"
    files = resources.files("forgepar")
    missing = [name for name in DATA if not files.joinpath(name).is_file()]
    assert not missing, f"the installed package lacks {missing}"
    assert all(hasattr(forgepar, name) for name in forgepar.__all__)
    there = [name for name in EXTRAS if importlib.util.find_spec(name)]
    assert not there, f"core dependencies alone should be installed, but {there} can be imported"
    loaded = sorted(set(sys.modules) & set(EXTRAS))
    assert not loaded, f"the core imports extras: {loaded}"


def call(what: str, command: list[str], code: int = 0, contained: str = "") -> str:
    """Run a command and check its exit code and what it prints; return its standard output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    told = done.stdout + done.stderr
    if done.returncode != code or contained not in told or "Traceback" in told:
        sys.exit(f"{what}: exit code {done.returncode}, expected {code} with {contained!r} in:\n{told}")
    return done.stdout


def check_program(readme: str) -> None:
    """Run the README's first program, which must print what the README says."""
    Path("diamond.py").write_text(block(readme, "program"), encoding="utf-8")
    told = call("the README's program", [sys.executable, "diamond.py"])
    assert f"```text\n{told}```" in readme, f"the README says something else than {told!r}"


def check_subcommands() -> int:
    """Run every subcommand that the parser has."""
    from forgepar.cli import main

    commands = main._parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    Path("pipe.py").write_text(PIPELINE, encoding="utf-8")
    unknown = sorted(commands.keys() ^ CALLS.keys())
    if unknown:
        sys.exit(f"{unknown} are subcommands that CALLS in .ci/check_installed.py and the parser do not both have.")
    for name in CALLS:
        arguments, code, contained = CALLS[name]
        program = [str(Path(sys.executable).with_name("forgepar"))]
        call(f"forgepar {name}", [*program, name, *arguments], code, contained)
        call(f"forgepar {name} --help", [*program, name, "--help"], 0, f"usage: forgepar {name}")
    return len(CALLS)


if __name__ == "__main__":
    check_surroundings()
    check_program(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(f"Python {sys.version.split()[0]}: the README's program and {check_subcommands()} subcommands run")
