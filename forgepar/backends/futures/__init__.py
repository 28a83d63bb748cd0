"""Workers of any `concurrent.futures.Executor`.

In: batches, as for any backend. Out: replies; each batch is one call of the executor.

    backend         `FuturesBackend`
    run_batch       runs a batch in a worker of the executor
    message_arena   large values that travel inside messages, as no memory is shared
"""
