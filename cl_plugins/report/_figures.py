"""The charts, as Bokeh figures over empty sources.

The page's script fills the sources from the counts and reacts to the reader. No name of a run, task or class ever
reaches Bokeh: axes show numbers, and the page itself writes names as text.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from bokeh.document import Document
from bokeh.embed.util import standalone_docs_json_and_render_items
from bokeh.models import BasicTicker, ColumnDataSource, FixedTicker, LinearColorMapper, NumeralTickFormatter, Range1d
from bokeh.palettes import Cividis256
from bokeh.plotting import figure

from ._text import embedded_json

_ANCHORS = ("#7f3b08", "#b15c12", "#d98d4d", "#f3c9ac", "#f3f1ee", "#b8cfe4", "#7aa4cb", "#2e6399", "#0c2e5a")


def _blend(anchors: tuple[str, ...], steps: int) -> list[str]:
    """``steps`` colors along the anchors, evenly spaced."""
    channels = [[int(color[k : k + 2], 16) for k in (1, 3, 5)] for color in anchors]
    colors = []
    for step in range(steps):
        at = step * (len(anchors) - 1) / (steps - 1)
        low = min(int(at), len(anchors) - 2)
        mixed = (round(a + (at - low) * (b - a)) for a, b in zip(channels[low], channels[low + 1], strict=True))
        colors.append("#" + "".join(f"{c:02x}" for c in mixed))
    return colors


CHANGE = _blend(_ANCHORS, 129)
"""Losses in orange, gains in blue, nothing in the middle."""

ACCENT = "#d1495b"
_INK = "#5b6672"


def _source(*columns: str) -> ColumnDataSource:
    return ColumnDataSource({c: [] for c in columns})


def _whole_numbers() -> BasicTicker:
    return BasicTicker(mantissas=[1, 2, 5], min_interval=1, num_minor_ticks=0, desired_num_ticks=10)


def _figure(name: str, height: int, x_title: str, y_title: str, *, tools: str = "", percent: bool = True) -> Any:
    plot = figure(
        name=name,
        height=height,
        min_width=200,
        sizing_mode="stretch_width",
        tools=tools,
        toolbar_location="above" if tools else None,
        x_range=Range1d(start=-0.5, end=1.5),
        y_range=Range1d(start=0, end=1),
        x_axis_label=x_title,
        y_axis_label=y_title,
        active_drag=None,
        active_scroll=None,
        min_border_left=52,
        min_border_right=14,
        min_border_top=6,
        min_border_bottom=44,
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
        lod_threshold=None,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    for axis in plot.axis:
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = "12px"
        axis.major_label_text_font_size = "12px"
        axis.minor_tick_line_color = None
        axis.major_tick_in = 0
        axis.major_tick_out = 4
        axis.axis_label_standoff = 8
    plot.xaxis.ticker = _whole_numbers()
    plot.xaxis.formatter = NumeralTickFormatter(format="0")
    plot.xgrid.grid_line_color = None
    plot.ygrid.grid_line_alpha = 0.6
    if percent:
        plot.yaxis.formatter = NumeralTickFormatter(format="0.0[0]")
    return plot


def _mark(plot: Any, kind: str, **options: Any) -> None:
    """The highlight that follows the reader's task through all charts."""
    if kind == "box":
        plot.quad(
            "left", "right", "bottom", "top", source=_source("left", "right", "bottom", "top"), name="mark",
            fill_color=None, line_color=ACCENT, line_width=2.5,
        )  # fmt: skip
    elif kind == "line":
        plot.line("x", "y", source=_source("x", "y"), name="mark", line_color=ACCENT, line_width=3)
        plot.scatter("x", "y", source=_source("x", "y"), name="mark_points", size=7, color=ACCENT)
    else:
        plot.scatter(
            "x", "y", source=_source("x", "y"), name="mark", size=13, fill_color=None, line_color=ACCENT,
            line_width=2.5, **options,
        )  # fmt: skip


def _segments(plot: Any, name: str, **options: Any) -> None:
    plot.segment("x0", "y0", "x1", "y1", source=_source("x0", "y0", "x1", "y1"), name=name, **options)


def _image(plot: Any, name: str, mapper: LinearColorMapper) -> None:
    plot.quad(
        "left", "right", "bottom", "top", source=_source("left", "right", "bottom", "top"), name="blank",
        fill_color=None, line_color=None, hatch_pattern="/", hatch_scale=9, hatch_weight=1, hatch_color="#cfcbc1",
    )  # fmt: skip
    plot.image(
        image="image", x="x", y="y", dw="dw", dh="dh", source=_source("image", "x", "y", "dw", "dh"),
        color_mapper=mapper, name=name,
    )  # fmt: skip
    _segments(plot, "gaps", line_color="#ffffff", line_width=1.5)
    plot.text(
        "x", "y", text="text", text_color="color", source=_source("x", "y", "text", "color"), name="labels",
        text_align="center", text_baseline="middle", text_font_size="11px",
    )  # fmt: skip


def _matrix(name: str, height: int, x_title: str, y_title: str) -> Any:
    plot = _figure(name, height, x_title, y_title, tools="pan,box_zoom,wheel_zoom,reset,save", percent=False)
    plot.y_range = Range1d(start=1, end=0)
    plot.grid.grid_line_color = None
    plot.yaxis.ticker = _whole_numbers()
    plot.yaxis.formatter = NumeralTickFormatter(format="0")
    mapper = LinearColorMapper(palette=list(Cividis256), low=0, high=1, nan_color="rgba(0, 0, 0, 0)")
    _image(plot, "cells", mapper)
    _mark(plot, "box")
    return plot


def _retention() -> Any:
    plot = _figure("retention", 540, "after task", "accuracy", tools="pan,box_zoom,wheel_zoom,reset,save")
    bands = _source("x", "low", "q1", "median", "q3", "high")
    plot.varea("x", "low", "high", source=bands, name="band", fill_color=_INK, fill_alpha=0.16)
    plot.varea("x", "q1", "q3", source=bands, name="band", fill_color=_INK, fill_alpha=0.26)
    plot.line("x", "median", source=bands, name="median", line_color=_INK, line_width=2.5)
    plot.multi_line(
        "xs", "ys", source=_source("xs", "ys", "color", "dash", "width"), name="lines", line_color="color",
        line_dash="dash", line_width="width",
    )  # fmt: skip
    plot.scatter(
        "x", "y", source=_source("x", "y", "color", "marker"), name="starts", color="color", marker="marker", size=7
    )
    plot.text(
        "x", "y", text="text", text_color="color", source=_source("x", "y", "text", "color"), name="labels", x_offset=8,
        text_baseline="middle", text_font_size="11px",
    )  # fmt: skip
    _mark(plot, "line")
    return plot


def _vbars(plot: Any, width: float) -> None:
    """Bars, and the same bars once more where they are striped; a pattern per bar would take a minute."""
    columns = ("x", "top", "bottom", "color")
    plot.vbar(
        x="x", top="top", bottom="bottom", width=width, source=_source(*columns), fill_color="color", line_color=None,
        name="bars",
    )  # fmt: skip
    plot.vbar(
        x="x", top="top", bottom="bottom", width=width, source=_source(*columns), fill_color=None, line_color=None,
        hatch_pattern="/", hatch_color="#ffffff", hatch_alpha=0.55, hatch_scale=7, hatch_weight=1.5, name="stripes",
    )  # fmt: skip


def _waterfall() -> Any:
    plot = _figure("waterfall", 400, "", "accuracy, mean over tasks")
    _segments(plot, "joins", line_color=_INK, line_dash="dotted")
    _vbars(plot, 0.72)
    plot.text(
        "x", "y", text="text", text_color="color", source=_source("x", "y", "text", "color"), name="labels",
        text_align="center", text_baseline="bottom", y_offset=-3, text_font_size="11px",
    )  # fmt: skip
    plot.xaxis.ticker = FixedTicker(ticks=[])
    _mark(plot, "box")
    return plot


def _plane() -> Any:
    plot = _figure("plane", 380, "plasticity: accuracy when learned", "stability: accuracy now", tools="")
    plot.xaxis.ticker = BasicTicker()
    plot.xaxis.formatter = NumeralTickFormatter(format="0.0[0]")
    _segments(plot, "diagonal", line_color=_INK, line_dash="dashed")
    plot.step(
        "x", "y", source=_source("x", "y"), name="front", mode="before", line_color=_INK, line_dash="dotted",
        line_width=2,
    )  # fmt: skip
    plot.scatter("x", "y", source=_source("x", "y"), name="tasks", size=8, fill_alpha=0.28, line_width=1.5, color=_INK)
    _runs(plot)
    _mark(plot, "point")
    return plot


def _runs(plot: Any) -> None:
    plot.scatter(
        "x", "y", source=_source("x", "y", "color", "marker", "size", "alpha"), name="runs",
        marker="marker", size="size", fill_color="color", fill_alpha="alpha", line_color="color", line_width=2,
    )  # fmt: skip


def _cost() -> Any:
    plot = _figure("cost", 380, "training seconds so far", "average accuracy (row)", tools="")
    plot.xaxis.ticker = BasicTicker()
    plot.xaxis.formatter = NumeralTickFormatter(format="0.[0]a")
    plot.multi_line(
        "xs", "ys", source=_source("xs", "ys", "color", "width"), name="lines", line_color="color", line_width="width"
    )
    plot.step(
        "x", "y", source=_source("x", "y"), name="front", mode="after", line_color=_INK, line_dash="dashed",
        line_width=1.5,
    )  # fmt: skip
    _runs(plot)
    _mark(plot, "point")
    return plot


def _stream() -> Any:
    plot = _figure("stream", 380, "after task", "average accuracy (row)")
    plot.patches(
        "xs", "ys", source=_source("xs", "ys", "color"), name="bands", fill_color="color", fill_alpha=0.16,
        line_color=None,
    )  # fmt: skip
    plot.multi_line(
        "xs", "ys", source=_source("xs", "ys", "color", "width"), name="lines", line_color="color", line_width="width"
    )
    _runs(plot)
    _mark(plot, "point")
    return plot


def _orders() -> Any:
    plot = _figure("orders", 300, "class order", "average accuracy (last row)")
    plot.multi_line(
        "xs", "ys", source=_source("xs", "ys", "color", "width"), name="lines", line_color="color", line_width="width"
    )
    _runs(plot)
    return plot


def _transfer() -> Any:
    plot = _figure("transfer", 340, "task", "accuracy")
    _segments(plot, "joins", line_color=_INK, line_dash="dotted")
    plot.scatter(
        "x", "y", source=_source("x", "y", "color", "marker", "size", "alpha"), name="runs", marker="marker",
        size="size", fill_color="color", fill_alpha="alpha", line_color="color", line_width=2,
    )  # fmt: skip
    _mark(plot, "point")
    return plot


def _recency() -> Any:
    plot = _figure("recency", 430, "after task", "task recency bias")
    _segments(plot, "diagonal", line_color=_INK, line_dash="dashed")
    plot.line("x", "y", source=_source("x", "y"), name="line", line_color=_INK, line_width=2)
    plot.scatter("x", "y", source=_source("x", "y"), name="dots", color=_INK, size=7)
    _mark(plot, "point")
    return plot


def _bars(name: str, y_title: str) -> Any:
    plot = _figure(name, 210, "task", y_title, percent=False)
    plot.yaxis.formatter = NumeralTickFormatter(format="0.[0]a")
    _vbars(plot, 0.76)
    _mark(plot, "box")
    return plot


def _panel(index: int, name: str = "panel") -> Any:
    plot = _figure(f"{name}{index}", 230, "", "", percent=False)
    plot.yaxis.formatter = NumeralTickFormatter(format="0.[000]a")
    mapper = LinearColorMapper(palette=list(Cividis256), low=0, high=1, nan_color="rgba(0, 0, 0, 0)")
    _image(plot, "cells", mapper)
    plot.multi_line(
        "xs", "ys", source=_source("xs", "ys", "color", "dash"), name="lines", line_color="color", line_dash="dash",
        line_width=2,
    )  # fmt: skip
    plot.scatter(
        "x", "y", source=_source("x", "y", "color", "marker"), name="points", color="color", marker="marker", size=6
    )
    _mark(plot, "box")
    return plot


def build_figures(
    panels: int, confusion: bool, transfer: bool = False, inside: bool = False, drift: int = 0
) -> list[Any]:
    """Every chart of the page.

    Args:
        panels: number of charts for what the methods report.
        confusion: whether any run recorded which tasks its predictions fell into.
        transfer: whether any run measured a task before it was learned.
        inside: whether any run was evaluated inside its tasks.
        drift: number of charts for what changed between task ends.
    """
    from ._inside import inside_figure  # it builds on the parts above

    plots = [_matrix("matrix", 520, "evaluated on task", "after task"), _retention(), _waterfall(), _plane(), _cost()]
    plots += [_stream(), _orders(), *([_transfer()] if transfer else []), *([inside_figure()] if inside else [])]
    plots += [_bars("seconds", "seconds"), _bars("parameters", "parameters"), _bars("memory", "MiB")]
    if confusion:
        plots += [_matrix("confusion", 430, "predicted task", "true task"), _recency()]
    return plots + [_panel(i) for i in range(panels)] + [_panel(i, "drift") for i in range(drift)]


@lru_cache(maxsize=8)
def figures_json(panels: int, confusion: bool, transfer: bool = False, inside: bool = False, drift: int = 0) -> str:
    """The charts of a page as embedded JSON, ready for a script element; they are the same for all runs."""
    documents, items = serialize(build_figures(panels, confusion, transfer, inside, drift))
    return embedded_json({"documents": documents, "items": items})


def serialize(plots: list[Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The document as JSON, and where each figure goes: the element ``plot-<name>``."""
    whole = Document()
    for plot in plots:
        whole.add_root(plot)
    documents, _ = standalone_docs_json_and_render_items(whole)
    ((identity, document),) = documents.items()
    roots = {plot.id: f"plot-{plot.name}" for plot in plots}
    return {identity: document}, [{"docid": identity, "roots": roots, "root_ids": list(roots)}]
