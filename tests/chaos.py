"""Random workflows and jobs under random faults, run by seed: `python tests/chaos.py SEED ...`, or FIRST:LAST.

    conductor ── starts ──> program ── runs ──> workflows and jobs, one seed after the other
        │                      └─ "begin SEED", "end SEED" ──┐
        └── kills and stops its workers, it itself, fills and removes its folders <──┘

chaos_scenarios   what is to happen, by seed
chaos_growing     makes random workflows and jobs, as plain data
chaos_graphs      that data, as forgepar gets it, and what its tasks do
chaos_program     a program that runs them
chaos_checks      what they may come to

A program checks each of its runs, and what is left of it: children, threads, descriptors, files, memory. The conductor
sees whether it ends in time, and what it leaves behind. A program that is to be interrupted or killed has one seed to
itself, and a second one goes on with its store.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import chaos_program
import psutil
from chaos_program import left_in, wait_for_end
from chaos_scenarios import ENDS, PLACES, Scenario

PATIENCE = 90.0  # seconds after which a seed hangs
_MARK = "CHAOS_PROGRAM"  # environment variable by which all processes of a program are found
_MEMORY_FOLDER = Path("/dev/shm")


class Failed(Exception):
    """A seed failed."""


class Conductor:
    """Starts programs, and does to them what seeds say."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.seconds: dict[int, float] = {}  # that each seed took

    def run(self, seeds: Iterable[int]) -> None:
        """Run seeds; those of programs that live to their end share one."""
        scenarios = [Scenario(seed) for seed in seeds]
        for place in PLACES:
            together = [scenario for scenario in scenarios if not scenario.end and scenario.place == place]
            if together:
                self._run_program(together)
        for scenario in scenarios:
            if scenario.place.startswith("few"):
                self._run_program([scenario])
            if scenario.end:
                began = time.monotonic()
                self._run_alone(scenario)
                self.seconds[scenario.seed] = time.monotonic() - began
        self.counts["seeds"] += len(scenarios)

    @contextlib.contextmanager
    def _folder(self, place: str = "") -> Iterator[Path]:
        """Make a folder for a program; see that its processes and files are gone behind it."""
        folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        memory = Path(tempfile.mkdtemp(prefix="chaos-", dir=_MEMORY_FOLDER))
        disk = folder / "disk"
        disk.mkdir()
        small = {"small": [memory], "tight": [memory, disk]}.get(place, []) if os.geteuid() == 0 else []
        mounted = [path for path in small if _mount(path)]
        for name, path in (("memory", memory), ("tmp", disk)):
            (path / name).mkdir(mode=0o700)
            (folder / name).symlink_to(path / name)
        try:
            yield folder
            wait_for_end(_processes_of(folder))
            left = list(left_in(folder))
            assert not left, f"left: {left}"
        finally:
            for process in _processes_of(folder):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            for path in mounted:
                subprocess.run(["umount", "-l", str(path)], check=True)
            shutil.rmtree(folder)
            shutil.rmtree(memory)

    def _start(self, folder: Path, scenarios: Sequence[Scenario]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "TMPDIR": str(folder / "tmp"), _MARK: str(folder)}
        as_user = _become_another(folder, scenarios[0].seed) if scenarios[0].place == "few processes" else []
        command = [*as_user, sys.executable, chaos_program.__file__, str(folder), *(str(s.seed) for s in scenarios)]
        with (folder / "errors").open("ab") as errors:
            return subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, env=environment, cwd=folder, start_new_session=True
            )

    def _run_program(self, scenarios: Sequence[Scenario]) -> None:
        """Run seeds in one program; those of its pool last, whose thread may replace a worker at any time."""
        scenarios = sorted(scenarios, key=lambda scenario: scenario.engine == "warm pool")
        by_seed = {scenario.seed: scenario for scenario in scenarios}
        current: Scenario | None = None
        with self._folder(scenarios[0].place) as folder:
            try:
                program = self._start(folder, scenarios)
                blows: list[tuple[int, float, str]] = []
                strike = partial(self._strike, folder, program, blows)
                for words in self._hear(program, strike, lambda: bool(blows)):
                    if words[0] == "begin":
                        current = by_seed[int(words[1])]
                        began = now = time.monotonic()
                        blows.clear()
                        for delay, what in current.blows:
                            now += delay
                            blows.append((current.seed, now, what))
                    elif words[0] == "mended":
                        _drain(folder)
                    elif words[0] == "end":
                        blows.clear()
                        _drain(folder)
                        self.seconds[current.seed] = time.monotonic() - began
                    elif words[0] == "counts":
                        self._count(words[1:])
                        current = None
                assert program.returncode == 0, f"exit code {program.returncode}"
            except Exception as error:
                self._fail(error, current or scenarios[-1], folder, [s.seed for s in scenarios])

    def _count(self, words: Sequence[str]) -> None:
        for word in words:
            name, _, number = word.partition("=")
            if number.isdigit():
                self.counts[name] += int(number)

    def _hear(
        self, program: subprocess.Popen[bytes], act: Callable[[], None], is_acting: Callable[[], bool]
    ) -> Iterator[list[str]]:
        """Yield what a program tells until it ends, and act meanwhile."""
        assert program.stdout is not None
        descriptor, rest = program.stdout.fileno(), b""
        os.set_blocking(descriptor, False)
        heard_at = time.monotonic()
        try:
            while True:
                is_over = program.poll() is not None
                if select.select([descriptor], [], [], 0 if is_over else 0.01 if is_acting() else 0.1)[0]:
                    data = os.read(descriptor, 1 << 16)
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        if line.startswith(b"@ "):
                            heard_at = time.monotonic()
                            yield line.decode().split()[1:]
                    if not data and is_over:
                        return
                elif is_over:
                    return
                act()
                if time.monotonic() > heard_at + PATIENCE:
                    program.send_signal(signal.SIGUSR1)
                    time.sleep(1)
                    raise Failed(f"hangs for {PATIENCE} s; its stacks are below")
        finally:
            program.kill()
            program.wait()
            program.stdout.close()

    def _strike(self, folder: Path, program: subprocess.Popen[bytes], blows: list[tuple[int, float, str]]) -> None:
        """Strike, if it is time."""
        if not blows or blows[0][1] > time.monotonic():
            return
        seed, _, what = blows[0]
        if what in ("kill", "stop"):
            pids = _pids_of(folder, seed)
        elif what == "kill any":
            pids = _descendants(program.pid)
        else:
            pids = [program.pid]
        is_early = what == "remove" and not any(left_in(folder))
        if is_early or not pids:
            return
        del blows[0]
        self.counts[what] += 1
        if what == "fill":
            _fill(folder)
        elif what == "remove":
            for name in left_in(folder):
                shutil.rmtree(folder / name, ignore_errors=True)
        else:
            _hit(random.Random(f"{seed} {len(blows)}").choice(pids), what)

    def _run_alone(self, scenario: Scenario) -> None:
        """Interrupt or kill a program at a random moment, and have others go on with its store."""
        with self._folder() as folder:
            try:
                for _ in range(scenario.chance.choice([1, 1, 1, 2])):
                    self._end_early(scenario, folder)
                program = self._start(folder, [scenario])
                for words in self._hear(program, lambda: None, lambda: False):
                    if words[0] == "counts":
                        self._count(words[1:])
                assert program.returncode == 0, f"exit code {program.returncode}"
            except Exception as error:
                self._fail(error, scenario, folder, [scenario.seed])

    def _end_early(self, scenario: Scenario, folder: Path) -> None:
        program, chance = self._start(folder, [scenario]), scenario.chance
        end_at: list[float] = []

        def act() -> None:
            if end_at and time.monotonic() >= end_at[0]:
                end_at.pop(0)
                program.send_signal(ENDS[scenario.end])
                self.counts[scenario.end] += 1

        for words in self._hear(program, act, lambda: bool(end_at)):
            if words[0] == "begin":
                end_at.append(time.monotonic() + chance.uniform(0.0, 0.8))
                if scenario.end != "kill":
                    end_at.append(end_at[0] + chance.uniform(0.01, 0.2))
        number = ENDS[scenario.end]
        assert program.returncode in (0, -number, 128 + number), f"exit code {program.returncode}"
        wait_for_end(_processes_of(folder))
        if scenario.end == "interrupt":  # only while a run goes does a SIGTERM do the same
            left = list(left_in(folder))
            assert not left, f"an interrupted program left {left}"

    def _fail(self, error: Exception, scenario: Scenario, folder: Path, seeds: Sequence[int]) -> None:
        errors = (folder / "errors").read_text(errors="replace")[-6000:]
        raise Failed(
            f"{error}\n{scenario!r}\nits programs' errors:\n{errors}\n"
            f"Run it alone: python tests/chaos.py {scenario.seed}\n"
            f"or with those before it: python tests/chaos.py {' '.join(map(str, seeds))}"
        ) from error


def _processes_of(folder: Path) -> list[psutil.Process]:
    """Return all processes of a program, however they were started."""
    mark, found = f"{_MARK}={folder}".encode(), []
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdecimal():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    found.append(psutil.Process(int(name)))
    return found


def _pids_of(folder: Path, seed: int) -> list[int]:
    """Return the workers that began the last tasks of a seed, the latest last, as far as they live."""
    files = sorted(folder.glob(f"notes-{seed}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if not files:
        return []
    lines = [line.split() for line in files[-1].read_text().splitlines() if line.startswith("begun")]
    pids = dict.fromkeys(int(words[3]) for words in lines[-6:])
    return [pid for pid in pids if psutil.pid_exists(pid)]


def _descendants(pid: int) -> list[int]:
    """Return the processes that a program started, but for the standard library's resource tracker.

    Those that are as new as that may be it, under another name.
    """
    oldest = time.time() - 0.1
    with contextlib.suppress(psutil.NoSuchProcess):
        children = [child for child in psutil.Process(pid).children(recursive=True) if child.create_time() < oldest]
        return [child.pid for child in children if "multiprocessing.resource_tracker" not in " ".join(child.cmdline())]
    return []


def _hit(pid: int, what: str) -> None:
    """Kill a process, or stop it for a moment."""
    with contextlib.suppress(ProcessLookupError):
        if what.startswith("kill"):
            os.kill(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.1)
            os.kill(pid, signal.SIGCONT)


def _become_another(folder: Path, seed: int) -> list[str]:
    """Return what runs a command as a user who has no other processes, to whom a folder of this user is given."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return []
    user = 60_000 + seed % 5_000  # no account has the number
    for path in (folder, *(folder / name for name in ("memory", "tmp"))):
        for place in (path, path.resolve(), path.resolve().parent):
            if place != Path(tempfile.gettempdir()):
                os.chown(place, user, user)
    # It may read this Python, wherever that is.
    rights = [
        "--inh-caps=-all,+dac_read_search",
        "--ambient-caps=-all,+dac_read_search",
        "--bounding-set=-all,+dac_read_search",
    ]
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *rights, "--"]


def _mount(path: Path) -> bool:
    """Have a small file system at a path, if that can be."""
    command = ["mount", "-t", "tmpfs", "-o", "size=24m,mode=700", "tmpfs", str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _fill(folder: Path) -> None:
    """Leave no room in the small file systems of a program."""
    for name in ("memory", "tmp"):
        place = (folder / name).resolve().parent
        if place.is_mount():
            with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(1 << 12))


def _drain(folder: Path) -> None:
    for name in ("memory", "tmp"):
        (folder / name).resolve().parent.joinpath("filler").unlink(missing_ok=True)


def seeds_in(words: Iterable[str]) -> list[int]:
    found: list[int] = []
    for word in words:
        first, _, last = word.partition(":")
        found += range(int(first), int(last)) if last else [int(first)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunk", type=int, default=20, help="how many seeds share programs")
    parser.add_argument("--show", action="store_true", help="what would be run")
    parser.add_argument("seeds", nargs="+")
    arguments = parser.parse_args()
    seeds = seeds_in(arguments.seeds)
    if arguments.show:
        for seed in seeds:
            scenario = Scenario(seed)
            print(scenario, *scenario.nodes, *scenario.jobs, sep="\n  ")  # noqa: T201
        return 0
    conductor, n_failed = Conductor(), 0
    for first in range(0, len(seeds), arguments.chunk):
        began = time.monotonic()
        chunk = seeds[first : first + arguments.chunk]
        try:
            conductor.run(chunk)
        except Failed as failure:
            n_failed += 1
            print(failure, file=sys.stderr, flush=True)  # noqa: T201
        except Exception:
            n_failed += 1
            traceback.print_exc()
        slowest = sorted(conductor.seconds.items(), key=lambda pair: -pair[1])[:5]
        conductor.seconds.clear()
        print(f"{chunk[0]}-{chunk[-1]}: {time.monotonic() - began:.1f} s", dict(conductor.counts), flush=True)  # noqa: T201
        print("  slowest:", *(f"{seed}: {seconds:.1f} s" for seed, seconds in slowest), flush=True)  # noqa: T201
    return int(n_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
