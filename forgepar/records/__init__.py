"""The records of a run, during the run and after it.

In: events and columns that the engine writes. Out: `RunResult`, `RunTable`, the audit log.

    events      the kinds of events, one class each
    event_log   the events of a run, made on access
    sinks       receivers of events: functions, loggers, files
    audit_log   events as lines of JSON, written and read
    ledger      the columns of a run: times, workers, errors
    outputs     the values that a result keeps
    result      `RunResult`: values, records, failures
    table       `RunTable`: a run as columns, for reports
    failures    the failed attempts of a run
    summary     the summary of a run as text
    run_status  the status of a run and its tasks
    keeper      the protocol of what stores a run (store/writer.py)
    time_left   the estimated time left of a run
    display     the protocol of what displays a run (report/progress)
"""
