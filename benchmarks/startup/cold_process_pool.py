"""The same with a bare pool: ``python -m benchmarks.startup.cold_process_pool METHOD WORKERS``."""

import time

begin = time.perf_counter()

import json  # noqa: E402
import multiprocessing  # noqa: E402
import sys  # noqa: E402
from concurrent.futures import ProcessPoolExecutor  # noqa: E402

imported = time.perf_counter()

if __name__ == "__main__":
    with ProcessPoolExecutor(int(sys.argv[2]), mp_context=multiprocessing.get_context(sys.argv[1])) as pool:
        assert pool.submit(abs, -1).result() == 1
        done = time.perf_counter()
    closed = time.perf_counter()
    print(json.dumps({"imports": imported - begin, "first": done - imported, "close": closed - done}))
