"""Running a plan: slots, batches, values, deadlines, records.

In: a `Plan` and a backend. Out: a `RunResult`, or `WorkflowFailed`.

    executor          `WorkflowExecutor`; a run from its start to its end
    run_options       the arguments of a run and their checks
    dispatcher        the loop of a run, and what ends it
    run_source        the tasks of a run, and what becomes of each: values, retries, fallbacks, subflows; the rollback
    slots             the slot scheduler, for runs and pools: hands out batches, takes in replies, handles lost workers
    work_source       what the slot scheduler asks of runs and pools
    services          what a run reports to and listens to
    batches           makes the messages of batches
    worker_cache      what each worker holds
    in_flight         a batch that a slot has
    work_stealing     reclaims from busy workers what they have not begun, for idle ones
    value_table       values of a run, each freed after its last consumer
    deadlines         time limits of tasks and layers
    memory            memory limits, and waiting while memory is low
    cancellation      `CancellationToken`
    worker_failures   what happens when a worker dies: which tasks fail, and which run again
    console           shows what tasks print
    recorder          writes down what happens
    snapshot          `RunSnapshot`: a run at one moment
"""
