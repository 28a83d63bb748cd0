"""Random workflows and jobs under random faults, run by seed: `python tests/chaos.py SEED ...`, or FIRST:LAST.

    conductor ── starts ──> program ── runs ──> workflows and jobs of `chaos_graphs`, one seed after the other
        │                      └─ "begin SEED", "end SEED" ──┐
        └── kills and stops its workers, it itself, fills and removes its folders <──┘

A program checks each of its runs (`chaos_checks`), and what is left of it: children, threads, descriptors, files,
memory. The conductor sees whether it ends in time, and what it leaves behind. A program that is to be interrupted or
killed has one seed to itself, and a second one goes on with its store.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import chaos_checks as checks
import chaos_graphs as graphs
import psutil

import forgepar as fp
from forgepar.values import folders

WITH_LIMITS = False  # whether some programs may have few descriptors or processes only
PATIENCE = 90.0  # seconds after which a seed hangs
GROWTH = 64 << 20  # bytes that the memory of a program may grow by over its runs, but for the first few
_MARK = "CHAOS_PROGRAM"  # environment variable by which all processes of a program are found
_MEMORY_FOLDER = Path("/dev/shm")
_SETTLED = 4  # runs after which a program has loaded what it needs


class Blow(NamedTuple):
    """What the conductor does: seconds from the start of the run or from the blow before, and what."""

    delay: float
    what: str


ENGINES = {"run": 30, "warm": 34, "pool": 14, "warm pool": 14, "both": 8}
PLACES = {"": 88, "small": 6, "tight": 4, "fragile": 2}
BROKEN = (OSError, RuntimeError, fp.ForgeparError)  # what a run ends with where there is no room for it
ENDS = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM, "kill": signal.SIGKILL}
# What blows hit, and how often each is drawn.
BLOWS = {"kill": 5, "stop": 3, "kill any": 2, "pause": 1}


class Scenario:
    """What is to happen, by seed.

    Attributes:
        engine: "run" (workers of its own), "warm", "pool", "warm pool", or "both" ("run" beside "pool", in a thread).
        nodes: the workflow.
        jobs: what the pool gets, where there is one.
        rules: how to run it.
        place: "", "small" (shared memory is a small file system), "tight" (the temporary folder as well), or "fragile"
            (folders of executors are removed while they run).
        blows: what the conductor does while it runs.
        end: what the conductor does to the program: "", "interrupt", "terminate" or "kill".
        is_kept: it runs twice with a store, the second time without faults.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.chance = chance = random.Random(f"chaos {seed}")
        self.end = chance.choices(["", "interrupt", "terminate", "kill"], [86, 6, 2, 6])[0]
        self.place = chance.choices(list(PLACES), list(PLACES.values()))[0] if not self.end else ""
        self.engine = chance.choices(list(ENGINES), list(ENGINES.values()))[0]
        if self.place == "fragile":
            self.engine = self.engine.replace("warm pool", "pool").replace("warm", "run").replace("both", "run")
        self.method = chance.choices(["fork", "forkserver", "spawn"], [5, 4, 1])[0]
        self.workers = chance.choice([1, 2, 2, 3])
        if WITH_LIMITS and not self.end:
            self._limit(random.Random(f"limits {seed}"))
        self.is_kept = not self.is_pool and self.engine != "both" and (bool(self.end) or chance.random() < 0.25)
        self.blows = self._blows()
        hurts = sum(blow.what in ("kill", "kill any") for blow in self.blows)
        survives = chance.random() < 0.5
        grower = partial(
            graphs.Grower,
            chance,
            permanent=chance.choice([0.0, 0.0, 0.02, 0.06, 0.15]) if not self.end else 0.0,
            transient=chance.choice([0.0, 0.04, 0.1]),
            slow=chance.choice([0.0] * 4 + [0.15 if self.method != "spawn" else 0.0]),  # each takes a new worker
            more_retries=hurts * (4 if self.method == "forkserver" else 1) if survives else 0,
            seconds=chance.uniform(0.02, 0.06)
            if self.end
            else 0.03
            if self.blows
            else chance.choice([0.0, 0.0, 0.004]),
            wide=bool(self.place),
        )
        n_tasks = chance.choice([5, 10, 20, 30] if self.end else [5, 10, 20, 40, 60])
        self.nodes = () if self.is_pool else grower().nodes(n_tasks)
        self.jobs = grower(is_pool=True).nodes(n_tasks) if self.is_pool or self.engine == "both" else ()
        self.fail_fast = chance.random() < 0.35 and not self.end
        self.rules: dict[str, Any] = {
            "schedule": chance.choice(["layers", "eager"]),
            "fail_fast": self.fail_fast,
            "rollback": chance.choice(["all", "all", "upstream", "none"]),
            "outputs": chance.choice(["all", "all", "leaves"]),
            "seed": seed,
        }
        self.is_called_off = not self.is_pool and not self.end and chance.random() < 0.08
        self.is_late = not self.is_pool and not self.end and not self.is_called_off and chance.random() < 0.04
        self.is_audited = chance.random() < 0.4
        self.breaks = self.place in ("tight", "fragile", "few descriptors", "few processes")
        self.judged = checks.Rules(
            halts=(self.fail_fast and not self.is_pool) or self.is_called_off or self.is_late,
            is_disturbed=hurts > 0,
            survives=survives,
            others=BROKEN if self.breaks else (),
        )

    @property
    def is_pool(self) -> bool:
        return self.engine.endswith("pool")

    def _limit(self, chance: random.Random) -> None:
        """Let the program have few descriptors or processes, in one of ten."""
        if chance.random() < 0.1:
            self.place = chance.choice(["few descriptors", "few processes"])
            self.engine = self.engine.replace("warm pool", "pool").replace("warm", "run").replace("both", "run")

    def _blows(self) -> list[Blow]:
        chance = self.chance
        if self.end or self.place.startswith("few"):
            return []
        if self.place == "fragile":
            return [Blow(chance.uniform(0.0, 0.15), "remove")]
        if self.place:
            return [Blow(chance.uniform(0.0, 0.15), "fill")] if chance.random() < 0.8 else []
        if chance.random() > 0.3:
            return []
        kinds = chance.choices(list(BLOWS), list(BLOWS.values()), k=chance.randint(1, 2))
        return [Blow(chance.uniform(0.0, 0.15), chance.choice(kinds)) for _ in range(chance.randint(1, 3))]

    def __repr__(self) -> str:
        blows = ", ".join(f"{blow.what} after {blow.delay:.3f} s" for blow in self.blows)
        n_nodes = len(self.nodes) + len(self.jobs)
        return (
            f"seed {self.seed}: {self.engine}, {self.method}, {self.workers} workers, {n_nodes} nodes, "
            f"{self.rules}, place {self.place!r}, blows: {blows or 'none'}, end {self.end!r}, kept {self.is_kept}, "
            f"called off {self.is_called_off}, late {self.is_late}"
        )


# The program


class Program:
    """Runs seeds, and checks each.

    Args:
        folder: its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warm: dict[tuple[str, str], Any] = {}
        self.seen: set[str] = set()
        self.counts: Counter[str] = Counter()

    def run(self, seed: int) -> None:
        """Run a seed, and see what it comes to and what it leaves."""
        scenario = Scenario(seed)
        is_fresh = not scenario.engine.startswith("warm")
        before = self.holdings()
        try:
            if scenario.engine == "both":
                self._run_both(scenario)
            elif scenario.is_pool:
                self._run_pool(scenario, self._notes(seed))
            else:
                self._run_workflow(scenario)
        except BROKEN as error:
            if not scenario.breaks:
                raise
            self.counts[f"ended_by_{type(error).__name__}"] += 1
        is_alone = not (self.warm and any(blow.what == "kill any" for blow in scenario.blows))
        if is_fresh and is_alone and scenario.method in self.seen:  # else a warm pool may have replaced a worker
            self._check_holdings(before)
        if is_fresh:
            self.seen.add(scenario.method)
        self.counts[scenario.engine] += 1

    def close(self, first: dict[str, Any]) -> None:
        """Close what is warm, and see that nothing is left."""
        for executor in self.warm.values():
            executor.shutdown() if isinstance(executor, fp.ForgeExecutor) else executor.close()
        self.warm.clear()
        now = self.holdings()
        assert now["threads"] == first["threads"], now["threads"]
        assert now["files"] == [], now["files"]
        _wait_for_end(self._workers())
        n_more = len(now["descriptors"]) - len(first["descriptors"])
        assert n_more <= 6, f"{n_more} descriptors more: {now['descriptors']}"  # of the fork server and the tracker

    def holdings(self) -> dict[str, Any]:
        """Return what this process has, but for memory."""
        gc.collect()
        return {
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "descriptors": sorted(_links()),
            "files": sorted(left_in(self.folder)),
            "children": self._workers(),
        }

    def _check_holdings(self, before: dict[str, Any]) -> None:
        _wait_for_end(child for child in self._workers() if child not in before["children"])
        until = time.monotonic() + 10
        while left := {kind: new for kind, what in self.holdings().items() if (new := _more(what, before[kind]))}:
            assert time.monotonic() < until, f"left: {left}"
            self.counts["looks again"] += 1
            time.sleep(0.02)  # threads of the standard library's executors end a moment after their processes

    def _workers(self) -> list[psutil.Process]:
        """Return descendants of this process but for what it keeps for good: a fork server, a resource tracker."""
        me = psutil.Process()
        found = []
        for child in me.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                line = " ".join(child.cmdline())
                keeps = "multiprocessing.forkserver" in line or "multiprocessing.resource_tracker" in line
                if not (keeps and child.ppid() == me.pid) and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
        return found

    def _executor(self, scenario: Scenario, kind: Callable[..., Any]) -> Any:
        """Return an executor of its own, or the warm one."""
        if not scenario.engine.startswith("warm"):
            return kind(scenario.workers, start_method=scenario.method)
        key = scenario.engine, scenario.method
        if key not in self.warm:
            self.warm[key] = kind(scenario.workers, start_method=scenario.method)
        return contextlib.nullcontext(self.warm[key])

    def _run_both(self, scenario: Scenario) -> None:
        """Run a workflow, and a pool in another thread."""
        notes, faults = self._notes(scenario.seed), []

        def run_pool() -> None:
            try:
                self._run_pool(scenario, notes)
            except BaseException as error:
                faults.append(error)

        thread = threading.Thread(target=run_pool)
        thread.start()
        try:
            self._run_workflow(scenario, notes)
        finally:
            thread.join()
        if faults:
            raise faults[0]

    def _run_pool(self, scenario: Scenario, notes: Path) -> None:
        with self._executor(scenario, fp.ForgeExecutor) as pool:
            futures = graphs.submit(pool, scenario.jobs)
            for future in futures.values():
                future.exception()
            checks.check_jobs(futures, scenario.jobs, checks.Notes.read(notes), scenario.judged)
        self.counts["tasks"] += len(futures)
        for error in filter(None, [future.exception() for future in futures.values()]):
            self.counts[type(error).__name__] += 1

    def _run_workflow(self, scenario: Scenario, notes: Path | None = None) -> None:
        wf = fp.Workflow(f"chaos-{scenario.seed}")
        graphs.declare(wf, scenario.nodes)
        store = self.folder / f"store-{scenario.seed}.db"
        rules = dict(scenario.rules)
        if scenario.is_kept:
            rules |= {"store": store, "resume": bool(scenario.end)}
        judged, known = scenario.judged, set()
        if scenario.end and store.exists():
            judged, known = judged._replace(is_resumed=True), checks.must_be_cached(stored_tasks(store), scenario.nodes)
        if scenario.is_called_off:
            rules["cancel"] = fp.CancellationToken.with_timeout(scenario.chance.uniform(0.01, 0.3))
        if scenario.is_late:
            rules["timeout"] = scenario.chance.uniform(0.05, 0.3)
        first = self._one_run(scenario, wf, rules, judged, notes)
        self._check_cached(first, known, scenario)
        if scenario.is_kept:
            with fp.Store.open(store) as opened:
                *before, last = [run.status for run in opened.runs()]
            assert last == first.status, f"the store tells of a run that is {last}, not {first.status}"
            assert set(before) <= {"interrupted", "completed"}, f"runs of interrupted programs are {before}"
        if scenario.is_kept and not scenario.end:
            self._run_mended(scenario, wf, store, checks.must_be_cached(checks.kept_by(first), scenario.nodes))

    def _run_mended(self, scenario: Scenario, wf: fp.Workflow, store: Path, known: set[str]) -> None:
        """Go on with a store once tasks meet no faults any more."""
        tell("mended", scenario.seed)
        rules = {name: scenario.rules[name] for name in ("schedule", "seed")}
        judged = checks.Rules(
            is_disturbed=bool(scenario.blows),
            halts=bool(scenario.blows),
            others=scenario.judged.others,
            is_mended=True,
            is_resumed=True,
        )
        os.environ[graphs.MENDED] = "1"
        try:
            result = self._one_run(scenario, wf, {**rules, "store": store, "resume": True, "outputs": "all"}, judged)
        finally:
            del os.environ[graphs.MENDED]
        self._check_cached(result, known, scenario)
        self.counts["resumed"] += 1

    def _check_cached(self, result: Any, known: set[str], scenario: Scenario) -> None:
        wrong = {name for name in known if result.record(name).status != "cached"}
        if scenario.judged.halts or scenario.blows:  # it may have ended before it came to them
            wrong = {name for name in wrong if result.record(name).worker >= 0}
        assert not wrong, f"{sorted(wrong)} had been done, and were not taken from the store"
        self.counts["cached"] += len(known)

    def _one_run(
        self,
        scenario: Scenario,
        wf: fp.Workflow,
        rules: dict[str, Any],
        judged: checks.Rules,
        notes: Path | None = None,
    ) -> Any:
        notes = notes or self._notes(scenario.seed)
        audit = self.folder / "audit.jsonl"
        if scenario.is_audited:
            rules["audit"] = audit
        with self._executor(scenario, fp.WorkflowExecutor) as executor:
            try:
                result = executor.run(wf, **rules)
            except fp.WorkflowFailed as failure:
                result = failure.result
                others = [e for e in failure.exceptions if e not in result.errors.values()]
                checks.check_end(result, others, is_late=scenario.is_late)
            else:
                assert result.ok or (scenario.is_called_off and result.status == "cancelled"), result
        checks.check_run(result, scenario.nodes, checks.Notes.read(notes), judged)
        if scenario.is_audited:
            log = fp.AuditLog.load(audit)
            assert log.run_id == result.run_id
            assert log.replay() == result.standing()
            for run_id in log.run_ids:  # of programs that were killed as well
                fp.AuditLog.load(audit, run_id).replay()
        self.counts["tasks"] += len(result.records)
        self.counts.update(result.status_counts())
        self.counts.update(type(error).__name__ for error in result.errors.values())
        return result

    def _notes(self, seed: int) -> Path:
        """Have tasks write their notes to a file of their own."""
        self.n_notes = getattr(self, "n_notes", 0) + 1
        path = self.folder / f"notes-{seed}-{os.getpid()}-{self.n_notes}"
        os.environ[graphs.LOG] = str(path)
        return path


def stored_tasks(store: Path) -> set[str]:
    """Return the names of the tasks whose values the last run of a store has left there."""
    try:
        with fp.Store.open(store) as opened:
            return {value.name for value in opened.run().stored_values()}
    except fp.StoreError as error:
        if "no run" not in str(error):  # the program was killed before it had written of one
            raise
        return set()


def left_in(folder: Path, kept: str = "pymp-") -> Iterator[str]:
    """Yield what is in the folders of a program, but for the one that multiprocessing has until its process ends."""
    for name in ("memory", "tmp"):
        yield from (f"{name}/{path.name}" for path in (folder / name).iterdir() if not path.name.startswith(kept))


def _links() -> Iterator[str]:
    """Yield what this process has open; of pipes and sockets only that, as one may take the place of another."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
            yield path if path.startswith("/") else path.partition(":")[0]


def _more(these: Sequence[Any], those: Sequence[Any]) -> list[Any]:
    return list((Counter(these) - Counter(those)).elements())


def _wait_for_end(processes: Iterable[psutil.Process]) -> None:
    """Wait until processes have ended, though whoever is their parent by now may not have taken note."""
    until = time.monotonic() + 10
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < until, f"left: {process.cmdline()}"
                time.sleep(0.005)


def tell(*words: object) -> None:
    os.write(1, f"@ {' '.join(map(str, words))}\n".encode())


def serve(folder: Path, seeds: Sequence[int]) -> None:
    """Be the program."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    folders._MEMORY = folder / "memory"
    program = Program(folder)
    if Scenario(seeds[0]).end:
        first = program.holdings()
    else:
        wf = fp.Workflow()
        wf.map(abs, range(4))
        wf.run(workers=2, start_method="fork")  # it loads what later runs need, and looks where the temporary folder is
        first = program.holdings()
        live_within_limits(Scenario(seeds[0]), folder)
    rss = 0
    for place, seed in enumerate(seeds):
        tell("begin", seed)
        program.run(seed)
        tell("end", seed)
        if place == _SETTLED:
            rss = psutil.Process().memory_info().rss
    program.close(first)
    growth = psutil.Process().memory_info().rss - rss if rss else 0
    assert growth < GROWTH, f"memory grew by {growth >> 20} MiB"
    tell("counts", *(f"{name}={n}" for name, n in program.counts.items()), f"growth={growth >> 10}KiB")


def live_within_limits(scenario: Scenario, folder: Path) -> None:
    """Take from this process what it is to have little of."""
    chance = random.Random(f"few {scenario.seed}")
    if scenario.place == "few descriptors":
        most = len(list(_links())) + chance.randint(2, 60)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, chance.choice([most, most + 20, 4096])))
    if scenario.place == "few processes" and os.geteuid() != 0:  # root's are not counted
        most = 1 + chance.randint(0, 8)
        resource.setrlimit(resource.RLIMIT_NPROC, (most, most))


# The conductor


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
            _wait_for_end(_processes_of(folder))
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
        command = [*as_user, sys.executable, __file__, "--serve", str(folder), *(str(s.seed) for s in scenarios)]
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
        _wait_for_end(_processes_of(folder))
        if scenario.end == "interrupt":  # only while a run goes does a SIGTERM do the same
            left = list(left_in(folder, "nothing"))
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
    parser.add_argument("--serve", metavar="FOLDER", type=Path)
    parser.add_argument("--chunk", type=int, default=20)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("seeds", nargs="+")
    arguments = parser.parse_args()
    seeds = seeds_in(arguments.seeds)
    if arguments.serve:
        serve(arguments.serve, seeds)
        return 0
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
