"""Scheduling: pure state machines that decide which task runs next. They do no I/O and read no clock.

They receive the outcomes of tasks and return effects, such as `LayerStarted` or `Retried`.

    run_state      task states, retries, skipping and branches
    layers         the ready queue of the schedule "layers", with a barrier between layers
    eager          the ready queue of the schedule "eager": the longest remaining path first
    ready_queue    the protocol of ready queues, and their common base class
    effects        the effects that the state machine returns
    rollback       which tasks are undone after a failure, and in which order
    durations      moving averages of task durations, and batch sizes
"""
