"""The report of a run in one HTML file.

In: a `RunTable`. Out: a file that opens in any browser, without a network.

    report     the file
    page       its text and tables
    charts     its charts
    analysis   the data of the charts
"""
