"""`ForgeExecutor`: a `concurrent.futures.Executor` on forgepar's workers.

Callers submit callables and get futures.

    executor        `ForgeExecutor`
    scheduler       the thread that sends jobs to workers
    batches         `PoolSource`: the jobs as work for slots, and their batches
    job_table       the state of each open job
    jobs            jobs, templates, futures and the queue of ready jobs
    submissions     pickles callables and arguments, and makes jobs of them
    shared_arrays   large arrays that several jobs take
    errors          the errors of jobs
"""
