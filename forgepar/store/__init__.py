"""Runs on disk, to be inspected and resumed.

In: a run while it runs. Out: an SQLite database and files of large values; for a run that resumes, the values of
earlier runs.

    schema         the SQL tables, and migrations
    database       opens the database, and checks that no other user can write to it
    columns        encoding of rows and columns
    blobs          files of large values
    lock           locks: one run at a time per workflow
    writer         writes a run while it runs
    rows           the rows that the writer writes
    reader         `Store`, `StoredRun`: the runs and values of a store
    run_facts      `RunFacts`: each run as a whole
    stored_plan    the tasks of a stored run
    resume         `Resume`: which values of earlier runs are used
    gc             `collect`: removes old runs, and values that no run uses
    moved_names    reads pickles that name former modules
    fingerprint/   a digest of everything that a task's value depends on
"""
