"""A program whose first result forgepar computes: ``python -m benchmarks.startup.cold_forgepar METHOD WORKERS``."""

import time

begin = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402

import forgepar as fp  # noqa: E402

Workflow, WorkflowExecutor = fp.Workflow, fp.WorkflowExecutor  # names load when they are first used

imported = time.perf_counter()

if __name__ == "__main__":
    wf = Workflow("cold")
    first = wf.add(abs, -1)
    with WorkflowExecutor(workers=int(sys.argv[2]), start_method=sys.argv[1]) as executor:
        assert executor.run(wf)[first] == 1
        done = time.perf_counter()
    closed = time.perf_counter()
    print(json.dumps({"imports": imported - begin, "first": done - imported, "close": closed - done}))
