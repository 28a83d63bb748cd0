"""A program of the chaos test: `python chaos_program.py FOLDER SEED ...` runs seeds in turn, and checks each.

It tells what it is at in lines that begin with "@ ", as tasks print as well.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import random
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import chaos_checks as checks
import chaos_graphs as graphs
import psutil
from chaos_scenarios import BROKEN, Scenario
from checked_states import check_states

import forgepar as fp
from forgepar.values import arena_folders as folders

GROWTH = 64 << 20  # bytes that the memory of a program may grow by over its runs, but for the first few
_SETTLED = 4  # runs after which a program has loaded what it needs


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
        before = self.value_table()
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
        now = self.value_table()
        assert now["threads"] == first["threads"], now["threads"]
        assert now["files"] == [], now["files"]
        wait_for_end(self._workers())
        n_more = len(now["descriptors"]) - len(first["descriptors"])
        assert n_more <= 6, f"{n_more} descriptors more: {now['descriptors']}"  # of the fork server and the tracker

    def value_table(self) -> dict[str, Any]:
        """Return what this process has, but for memory."""
        gc.collect()
        return {
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "descriptors": sorted(_links()),
            "files": sorted(left_in(self.folder)),
            "children": self._workers(),
        }

    def _check_holdings(self, before: dict[str, Any]) -> None:
        wait_for_end(child for child in self._workers() if child not in before["children"])
        until = time.monotonic() + 10
        while left := {kind: new for kind, what in self.value_table().items() if (new := _more(what, before[kind]))}:
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
                keeps = "fork_server import main" in line or "multiprocessing.resource_tracker" in line
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
        rules = {"store": store, "resume": True, "outputs": "all", "fail_fast": False, "rollback": "none"}
        rules |= {name: scenario.rules[name] for name in ("schedule", "seed")}
        judged = checks.Rules(
            is_disturbed=bool(scenario.blows),
            others=scenario.judged.others,
            is_mended=True,
            is_resumed=True,
        )
        os.environ[graphs.MENDED] = "1"
        try:
            result = self._one_run(scenario, wf, rules, judged)
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


def left_in(folder: Path) -> Iterator[str]:
    """Yield what is in the folders of a program, but for that of multiprocessing, whose end an interrupt may hit."""
    for name in ("memory", "tmp"):
        yield from (f"{name}/{path.name}" for path in (folder / name).iterdir() if not path.name.startswith("pymp-"))


def _links() -> Iterator[str]:
    """Yield what this process has open; of pipes and sockets only that, as one may take the place of another."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
            yield path if path.startswith("/") else path.partition(":")[0]


def _more(these: Sequence[Any], those: Sequence[Any]) -> list[Any]:
    return list((Counter(these) - Counter(those)).elements())


def wait_for_end(processes: Iterable[psutil.Process]) -> None:
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
    check_states()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    folders._MEMORY = folder / "memory"
    program = Program(folder)
    if Scenario(seeds[0]).end:
        first = program.value_table()
    else:
        wf = fp.Workflow()
        wf.map(abs, range(4))
        wf.run(workers=2, start_method="fork")  # it loads what later runs need, and looks where the temporary folder is
        first = program.value_table()
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


if __name__ == "__main__":
    serve(Path(sys.argv[1]), list(map(int, sys.argv[2:])))
