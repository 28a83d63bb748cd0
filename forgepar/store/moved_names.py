"""Reading pickles that were written before modules of forgepar were moved into packages.

Stores keep values as pickles, and a pickle names each class by its module. `with_new_names` replaces the names of
moved modules without unpickling anything, because a resumed run sends stored values to workers as they are.
"""

from __future__ import annotations

import pickletools
import re
import struct

# Former names of modules, and their present ones.
_MOVED = {
    "adapters": "workflow.adapters",
    "arguments": "workflow.arguments",
    "audit": "records.audit_log",
    "backends.board": "backends.worker_board",
    "backends.dask": "backends.dask.backend",
    "backends.daskcluster": "backends.dask.cluster",
    "backends.daskoutput": "backends.hosted_output",
    "backends.daskparts": "backends.dask.values",
    "backends.dasksite": "backends.dask.worker_site",
    "backends.daskslots": "backends.dask.slots",
    "backends.exception_fields": "values.exception_fields",
    "backends.exceptions": "values.exceptions",
    "backends.futures": "backends.futures.backend",
    "backends.joblibname": "backends.joblib_name",
    "backends.output": "backends.output_capture",
    "backends.parcel": "backends.futures.run_batch",
    "backends.wire": "backends.messages",
    "batching": "scheduling.durations",
    "binding": "workflow.binding",
    "books": "engine.recorder",
    "branching": "workflow.branching",
    "bytecode": "values.bytecode",
    "byvalue": "values.by_value",
    "cancellation": "engine.cancellation",
    "checks": "workflow.checks",
    "claims": "engine.work_stealing",
    "collecting": "store.gc",
    "columns": "workflow.taskset",
    "combinators": "workflow.combinators",
    "console": "engine.console",
    "contexts": "workflow.context",
    "current": "system.thread_scope",
    "daskgraphs": "integrations.dask_graphs",
    "daskstep": "integrations.dask_step",
    "digest_classes": "store.fingerprint.classes",
    "digest_code": "store.fingerprint.code",
    "digest_data": "store.fingerprint.data",
    "digest_guests": "store.fingerprint.third_party",
    "digest_source": "store.fingerprint.source",
    "digests": "store.fingerprint.digester",
    "dispatch": "engine.dispatcher",
    "displays": "records.display",
    "effects": "scheduling.effects",
    "escaping": "system.escaping",
    "events": "records.events",
    "executor": "engine.executor",
    "fallbacks": "workflow.fallbacks",
    "faults": "engine.worker_failures",
    "feeder": "pool.scheduler",
    "fingerprint": "store.fingerprint.tasks",
    "flight": "engine.in_flight",
    "forecast": "report.forecast",
    "forking": "system.forking",
    "fromgraph": "workflow.from_graph",
    "handles": "workflow.handles",
    "holdings": "engine.value_table",
    "inputs": "workflow.file",
    "jobs": "pool.jobs",
    "journal": "records.event_log",
    "keeping": "records.keeper",
    "libraries": "values.modules",
    "lifelocks": "system.life_locks",
    "lines": "workflow.shell.template",
    "memory": "engine.memory",
    "merkle": "store.fingerprint.merkle",
    "orders": "scheduling.layers",
    "pickling": "values.pickling",
    "plan": "workflow.plan",
    "pool": "pool.executor",
    "poolerrors": "pool.errors",
    "priors": "store.resume",
    "programs": "workflow.shell.process",
    "recipes": "pool.submissions",
    "recording": "store.writer",
    "result": "records.result",
    "roll": "pool.job_table",
    "rollback": "scheduling.rollback",
    "runlock": "store.lock",
    "runstate": "scheduling.run_state",
    "runtable": "records.table",
    "sharing": "pool.shared_arrays",
    "shipping": "engine.batches",
    "simulate": "report.simulate",
    "sinks": "records.sinks",
    "snapshot": "engine.snapshot",
    "standing": "records.run_status",
    "startstate": "backends.start_state",
    "store": "store.reader",
    "storefile": "store.database",
    "subflow": "workflow.subflow",
    "supply": "pool.batches",
    "tasks": "workflow.tasks",
    "toolbox": "workflow.shell.registry",
    "tools": "workflow.shell.command",
    "trust": "system.trust",
    "validation": "_validate",
    "valuefiles": "store.blobs",
    "values.baggage": "backends.futures.message_arena",
    "values.current": "values.unchanged",
    "values.files": "values.segment_files",
    "values.folders": "values.arena_folders",
    "values.fresh": "workflow.fresh_values",
    "values.inplace": "values.in_place",
    "values.meter": "values.usage_meter",
    "values.modulestate": "values.module_state",
    "values.segment": "values.segments",
    "watch": "engine.deadlines",
    "workflow": "workflow.workflow",
}
_NEW_NAMES = {f"forgepar.{old}": f"forgepar.{new}" for old, new in _MOVED.items()}
FORMER_NAMES = {new: old for old, new in _NEW_NAMES.items()}
_FRAME_BYTES = 9  # opcode and length, which are left out because the length of the frame changes
_STRINGS = ("SHORT_BINUNICODE", "BINUNICODE")


def with_new_names(pickled: bytes | memoryview) -> bytes | memoryview:
    """Return a pickle with the present names of moved modules.

    Args:
        pickled: protocol 4 or 5; returned unchanged if it names no module of forgepar.
    """
    if re.search(rb"forgepar\.", pickled) is None:
        return pickled
    pickled = bytes(pickled)
    kept, begin = list[bytes](), 0
    operations = [(code.name, argument, at or 0) for code, argument, at in pickletools.genops(pickled)]
    for i, (name, argument, at) in enumerate(operations):
        if name == "FRAME":
            kept.append(pickled[begin:at])
            begin = at + _FRAME_BYTES
        elif name in _STRINGS and argument in _NEW_NAMES and _is_module(operations, i):
            text = _NEW_NAMES[argument].encode()
            kept += [pickled[begin:at], b"\x8c", struct.pack("<B", len(text)), text]
            begin = operations[i + 1][2]
    return b"".join([*kept, pickled[begin:]])


def _is_module(operations: list[tuple[str, object, int]], i: int) -> bool:
    """Return whether a string is the module name of a global."""
    following = [name for name, _, _ in operations[i + 1 : i + 6] if name != "MEMOIZE"]
    return following[1:2] == ["STACK_GLOBAL"]
