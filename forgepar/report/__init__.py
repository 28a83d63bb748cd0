"""Displays, pictures, reports and exports of runs.

In: `RunTable`, or a display's view of a run. Out: text, pictures, HTML, files for other programs.

    text         names in pictures
    forecast     expected wall times with other numbers of workers
    simulate     the same, with the scheduler of the run
    progress/    displays while a run is in progress: bars, lines, notebooks
    graph/       pictures of workflows
    html/        the report as one HTML file
    export/      traces and WfFormat
"""
