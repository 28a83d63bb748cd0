"""Displays of a run in progress.

In: the columns of the run, read at intervals. Out: bars, lines or HTML.

    display     the display for a terminal, a file or a notebook
    bars        bars on a terminal
    live        the full screen of `--watch` and `top`
    plain       lines in a file
    notebook    a notebook's output
    figures     counts, rates and time left, for all of them
    wording     formats of numbers, times and failures
    processes   CPU time and memory of processes
    terminal    drawing on a terminal together with the output of tasks
"""
