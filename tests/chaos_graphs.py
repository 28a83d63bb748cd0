"""Random workflows for the chaos test: as plain data, as forgepar gets them, and what their tasks do and compute.

Node      a task (or a branching, a subflow, a fan-out, a command line) as plain data
declare   declares them in a `Workflow`
submit    submits them to a `ForgeExecutor`
work      what every task runs: notes its start, meets its fault, computes its value, notes its end
build     computes a value from a node's number and its inputs; the expected values are made by it alone
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import forgepar as fp

LOG, MENDED = "CHAOS_LOG", "CHAOS_MENDED"  # environment variables: the file of notes; whether faults are left out
SHORT_SECONDS = 0.4  # the timeout of a task that hangs
LONG_SECONDS = 30.0  # that of one that does not: a machine may be slow
MEMORY = 160 << 20  # bytes that a task declares; a worker has some 60 MiB
LARGE = np.arange(20_000)  # a constant that goes through shared memory


class ChaosError(Exception):
    """What a task raises as its fault."""


class Stubborn(Exception):
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("no")


# What a fault ends an attempt with; harmless ones do not.
ERRORS: dict[str, tuple[type[BaseException], ...]] = {
    "raise": (ChaosError,),
    "unpicklable": (fp.RemoteError,),
    "exit": (fp.WorkerDied,),
    "kill": (fp.WorkerDied,),
    "crash": (fp.WorkerDied,),
    "sys.exit": (fp.TaskExited,),
    "unpicklable value": (fp.UnpicklableResult,),
    "stop": (fp.TaskTimeout,),
    "hang": (fp.TaskTimeout,),
    "memory": (fp.TaskMemoryExceeded,),
}
SLOW = ("stop", "hang", "memory")
HARMLESS = ("fork and return", "fork and raise", "fork and exit", "fork and leave", "close stdout", "print")
SHAPES = ["number"] * 6 + ["text", "bytes", "array", "fresh", "nested", "same", "part", "none", "bit"]
COMMON = [fault for fault in ERRORS if fault not in SLOW]


class Spec(NamedTuple):
    """What a task is told: its number, the shape of its value, its faults by attempt, the fault of all others."""

    number: int
    shape: str
    faults: tuple[str, ...] = ()
    always: str = ""
    seconds: float = 0.0


class Node(NamedTuple):
    """A step of a workflow.

    Attributes:
        kind: "task", "map" (a task of a group that is declared at once), "when", "subflow", "fan" or "shell".
        spec: what its tasks are told.
        inputs: numbers of the nodes whose values it takes; those of a subflow's nodes may be negative: -1 - k is the
            k-th value that the subflow gets.
        after: numbers of nodes that it waits for besides.
        options: options of its task, but for functions.
        fallback: "", "value", "call", "skip" or "again, call".
        undone: whether it has a compensation.
        group: number of its group.
        parts: nodes of a subflow; the branches of a branching.
    """

    kind: str
    spec: Spec
    inputs: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    fallback: str = ""
    undone: bool = False
    group: int = 0
    parts: tuple[tuple[Node, ...], ...] = ()

    @property
    def number(self) -> int:
        return self.spec.number

    @property
    def is_rushed(self) -> bool:
        """Whether it has so little time that it may fail on a busy machine."""
        return ("timeout", SHORT_SECONDS) in self.options


# Tasks


def note(*words: object) -> None:
    """Append a line to the notes: one write, so that it is whole or not there."""
    descriptor = os.open(os.environ[LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())
    os.close(descriptor)


def work(spec: Spec, inputs: Any = (), large: Any = None) -> Any:
    context = fp.context()
    note("begun", context.task, context.attempt, os.getpid())
    if spec.seconds:
        time.sleep(spec.seconds)
    fault = fault_of(spec, context.attempt)
    if fault.startswith("fork") and os.fork() == 0:
        return end_child(fault)
    if fault == "unpicklable value":
        return threading.Lock()
    meet(fault, spec)
    value = build(spec, values_in(inputs, large), fp.empty)
    note("ended", context.task, context.attempt, os.getpid())
    return value


def fault_of(spec: Spec, attempt: int) -> str:
    if MENDED in os.environ:
        return ""
    return spec.faults[attempt - 1] if attempt <= len(spec.faults) else spec.always


def end_child(fault: str) -> Any:
    """Be the child that a task forked, and end in one way or another."""
    if fault == "fork and raise":
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
        raise ValueError("of a child")
    if fault == "fork and exit":
        sys.exit(3)
    if fault == "fork and leave":
        os._exit(3)
    return "a child's"


def meet(fault: str, spec: Spec) -> None:
    if fault == "raise":
        raise ChaosError(spec.number)
    if fault == "unpicklable":
        raise Stubborn(spec.number)
    if fault == "exit":
        os._exit(3)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "crash":
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "sys.exit":
        sys.exit(4)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "hang":
        time.sleep(600)
    if fault == "memory":
        held = []
        for _ in range(100):
            held.append(bytes(10 << 20).replace(b"\0", b"\1"))
            time.sleep(0.01)
    if fault == "close stdout":
        os.close(1)
        os.open(os.devnull, os.O_WRONLY)  # the lowest number that is free: 1
    if fault == "print":
        print("said by", spec.number)  # noqa: T201


def values_in(inputs: Any, large: Any) -> list[Any]:
    found = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    return found if large is None else [*found, large]


def expand(spec: Spec, nodes: Sequence[Node], inputs: Sequence[Any]) -> Any:
    """Return a subflow of these nodes."""
    context = fp.context()
    note("begun", context.task, context.attempt, os.getpid())
    meet(fault_of(spec, context.attempt), spec)
    inner = fp.Workflow()
    handles = declare(inner, nodes, list(inputs))
    note("ended", context.task, context.attempt, os.getpid())
    return fp.Subflow(inner, handles[nodes[-1].number])


def item(value: int, spec: Spec) -> Any:
    """Run as a task of a fan-out; the first one has the faults."""
    return work(spec if value % 100 == 0 else spec._replace(faults=(), always=""), [value])


def undo(value: Any, context: fp.TaskContext) -> None:
    note("undone", context.task, brief(value), os.getpid())


def stand_in(error: Exception, *args: Any, **more: Any) -> str:
    note("stands in for", type(error).__name__)
    return "stands in"


# Values


def build(spec: Spec, inputs: Sequence[Any], empty: Callable[..., Any] = np.empty) -> Any:
    """Compute a value."""
    words = [spec.number, *map(brief, inputs)]
    h = int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=7).digest(), "little")
    n = 5_000 + h % 20_000
    match spec.shape:
        case "bit":
            return h & 1
        case "text":
            return f"{h:x}" * (1 + h % 400)
        case "bytes":
            return h.to_bytes(8, "little") * n
        case "array":
            return np.arange(n, dtype=np.int64) * (h | 1)
        case "wide":
            return np.full(n * 16, h, np.int64)
        case "fresh":
            made = empty(n, np.int64)
            made[:] = h
            return made
        case "nested":
            return {"a": np.full(n, h, np.int64), "b": [h, str(h)], "c": (h, None)}
        case "list":
            return [place * 100 + h % 100 * bool(place) for place in range(h % 6)]
        case "same":
            return inputs[0] if inputs else None
        case "part":
            arrays = [value for value in inputs if isinstance(value, np.ndarray)]
            return arrays[0][1:-1] if arrays else h
        case "none":
            return None
    return h % 1_000_003


def brief(value: Any) -> str:
    """Return a digest of all that a value holds."""
    return _digest(value).hex()


def _digest(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value).tobytes()
        return hashlib.blake2b(data + str((value.dtype, value.shape)).encode(), digest_size=8).digest()
    if isinstance(value, (list, tuple, dict)):
        parts = value.items() if isinstance(value, dict) else value
        data = b"".join(map(_digest, parts)) + type(value).__name__.encode()
    elif isinstance(value, fp.ToolResult):
        data = value.stdout.encode()
    else:
        data = repr(value).encode()
    return hashlib.blake2b(data, digest_size=8).digest()


# Declaring


def task_of(node: Node, name: str, fn: Callable[..., Any] = work) -> Any:
    options: dict[str, Any] = {"name": name, **dict(node.options)}
    if node.undone:
        options["compensate"] = undo
    if node.fallback:
        options["fallback"] = {
            "value": "a value instead",
            "call": stand_in,
            "skip": fp.SkipFallback(),
            "again, call": fp.ChainFallback(fp.RetryFallback(1), stand_in),
        }[node.fallback]
    return fp.task(fn).options(**options)


def declare(wf: fp.Workflow, nodes: Sequence[Node], given: Sequence[Any] = (), handles: Any = None) -> dict[int, Any]:
    """Declare nodes; return their handles by number."""
    handles = {-1 - k: value for k, value in enumerate(given)} if handles is None else handles
    for node in nodes:
        if node.number in handles:
            continue  # with its group
        inputs = [handles[number] for number in node.inputs]
        after = [handles[number] for number in node.after]
        if node.kind == "map":
            group = [other for other in nodes if other.kind == "map" and other.group == node.group]
            fn = task_of(node, f"m{node.group}").options(after=after)
            sources = [[handles[number] for number in other.inputs] for other in group]
            more = {"large": LARGE} if node.group % 3 == 0 else {}
            for other, handle in zip(group, wf.map(fn, [o.spec for o in group], sources, **more), strict=True):
                handles[other.number] = handle
        elif node.kind == "when":
            branches = [
                (lambda part=part: declare(wf, part, (), handles)[part[-1].number]) if part else None
                for part in node.parts
            ]
            handles[node.number] = fp.when(wf, inputs[0], *branches)
        elif node.kind == "subflow":
            fn = task_of(node, f"t{node.number}", expand).options(after=after)
            handles[node.number] = wf.add(fn, node.spec, node.parts[0], inputs)
        elif node.kind == "fan":
            fn = task_of(node, f"t{node.number}", item).options(after=after)
            handles[node.number] = wf.map(fn, inputs[0], spec=node.spec)
        elif node.kind == "shell":
            fn = fp.task(fp.shell(line_of(node))).options(name=f"t{node.number}", after=after, **dict(node.options))
            handles[node.number] = wf.add(fn, value=inputs[0] if inputs else 0)
        else:
            fn = task_of(node, f"t{node.number}").options(after=after)
            handles[node.number] = wf.add(fn, node.spec, arranged(node, inputs))
    return handles


def arranged(node: Node, inputs: list[Any]) -> Any:
    """Return inputs in one of several places in which handles are found."""
    if node.number % 3 == 0:
        return {f"k{place}": value for place, value in enumerate(inputs)}
    return inputs if node.number % 3 == 1 else tuple(inputs)


def line_of(node: Node) -> str:
    return "sh -c 'exit 7' {value}" if node.spec.always else f"echo {node.number} {{value}}"


def submit(pool: fp.ForgeExecutor, nodes: Sequence[Node]) -> dict[int, Any]:
    """Submit nodes as jobs; return their futures by number."""
    futures: dict[int, Any] = {}
    for node in nodes:
        inputs = [futures[number] for number in node.inputs]
        futures[node.number] = pool.submit(task_of(node, f"p{node.number}"), node.spec, arranged(node, inputs))
    return futures
