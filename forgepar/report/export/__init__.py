"""Exports of runs for other programs.

In: a `RunTable`. Out: files in formats that other programs define.

    trace      traces for Perfetto and chrome://tracing
    slices     the data of a trace
    wfformat   WfFormat, which workflow simulators read
    writing    files that are written completely or not at all
"""
