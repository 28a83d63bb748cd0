"""The command line.

In: arguments of the `forgepar` command. Out: an exit code, and its output.

    main         the parser, streams, logging and exit codes
    base         what the commands share
    targets      loading a workflow by module or file
    run          run, check, layers
    graph        graph
    report       report, plan
    store        runs, show, values, export, gc
    watch        top
    completion   completion for shells
"""
