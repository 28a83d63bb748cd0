"""What is to happen in a run of the chaos test, by its seed."""

from __future__ import annotations

import random
import signal
from functools import partial
from typing import Any, NamedTuple

import chaos_checks as checks
from chaos_growing import Grower

import forgepar as fp

WITH_LIMITS = False  # whether some programs may have few descriptors or processes only


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
            Grower,
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
