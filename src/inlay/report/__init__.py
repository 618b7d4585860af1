"""Measured results as one HTML file that needs nothing else, and the plots in it."""

from inlay.report.canvas import Plot, save_png
from inlay.report.document import (
    Code,
    Figure,
    Headline,
    Report,
    ReportError,
    Section,
    Table,
    Text,
    render_report,
    write_report,
)
from inlay.report.heatmap import heatmap
from inlay.report.plots import (
    accuracy_by_distance,
    bars,
    line_plot,
    loss_by_position,
    training_curves,
)
from inlay.report.series import Series

__all__ = [
    "Code",
    "Figure",
    "Headline",
    "Plot",
    "Report",
    "ReportError",
    "Section",
    "Series",
    "Table",
    "Text",
    "accuracy_by_distance",
    "bars",
    "heatmap",
    "line_plot",
    "loss_by_position",
    "render_report",
    "save_png",
    "training_curves",
    "write_report",
]
