"""Pictures of workflows.

In: a `Plan`, and a `RunTable` for its colours. Out: text of an SVG file, a Mermaid chart or a Graphviz graph.

    diagram   `Workflow.diagram`
    boxes     the boxes of a picture, and their tasks
    layout    the places of boxes and arrows
    svg       the SVG file
    colours   the colours of callables and statuses
"""
