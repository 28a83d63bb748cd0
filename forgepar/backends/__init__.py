"""Where batches of tasks run.

Batches enter as messages; results, failures and output leave as messages. All backends have the same contract.

    base                the protocol of a backend
    messages            the messages, and how they are sent
    inline              the backend that runs batches in the caller's process
    process             the backend that runs batches in worker processes
    futures/            the backend that runs batches on any `concurrent.futures.Executor`
    dask/               the backend that runs batches on a Dask cluster

Running batches:
    worker              runs batches and replies
    run_cache           what a worker keeps of a run, and how it makes calls of tasks
    task_failure        turns a task's exception into a message
    worker_process      the process around a worker: its start, its connection, its end
    hosted_worker       a worker in a process that forgepar did not start

Starting and ending worker processes:
    process_slots       slots of the process backend: executor, process, pipes, connection
    worker_starter      starts workers, tries again, continues with fewer
    open_backends       closes backends of executors that were garbage collected, and all when the program ends
    starting            starts processes without changing the caller's process
    executor_internals  operations on private parts of a `ProcessPoolExecutor`
    exit_hooks          functions that run when this process ends
    start_state         umask, affinity, niceness and limits that a worker starts with
    fork_server         the main function of forgepar's fork server
    limits              the system's limits for workers
    addresses           sockets with paths of any length
    dummy_lock          the lock of queues with one user at each end
    orphans             starts the program that ends workers when their parent has ended
    orphan_watch        that program

What a worker sees and reports:
    surroundings        environment, working directory, search path and settings of the caller
    output_capture      output, log records and warnings of tasks
    hosted_output       the same, by thread, in a process that forgepar did not start
    worker_board        shared memory in which a worker writes its current task and reads where to stop
    joblib_name         registers the `joblib` backend in workers
"""
