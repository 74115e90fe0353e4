"""Figures of the report: inline SVGs that follow the page's light or dark colours, PNGs as data URIs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

POINTS = 300  # of one curve at most: a long log is averaged in bins, a phone can't show more
SPOTS = 2000  # points of a scatter at most
MARKERS = "os^Dv*PX"
# Matplotlib writes colours as hex; each of these stands for a variable of the page's style, for light and dark.
INK, MUTED, GRID = "#010203", "#010204", "#010205"
SERIES = [f"#0203{i:02d}" for i in range(10, 10 + len(MARKERS))]
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line"} | {colour: f"--s{i}" for i, colour in enumerate(SERIES)}
STYLE = {
    "svg.fonttype": "none",  # text stays text: smaller, in the page's font, and it can be searched
    "text.parse_math": False, "font.size": 11, "text.color": MUTED, "figure.constrained_layout.use": True,
    "figure.facecolor": "none", "axes.facecolor": "none",
    "axes.titlesize": 13, "axes.titlelocation": "left", "axes.titlepad": 10, "axes.titlecolor": INK,
    "axes.labelsize": 12, "axes.labelcolor": MUTED, "axes.edgecolor": GRID, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.xmargin": 0.03,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 1, "lines.linewidth": 1.8,
    "lines.markersize": 5, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 0, "ytick.major.size": 0,
}  # fmt: skip
CLEANED = {  # patterns in an SVG, and what replaces them: metadata has no use, a <style> holds for the whole page
    r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->": "",
    r"font: ([\d.]+px) [^;\"]*": r"font-size: \1",
    r"(font-size: [\d.]+px); font-family: [^;\"]*": r"\1",
    r"\s*\n\s*": " ",
    r"^.*?<svg ": '<svg role="img" ',
}


class Chart(NamedTuple):
    """A drawn plot and its line of explanation."""

    svg: Markup
    note: str


@dataclass
class Series:
    """One curve; `slot` chooses colour and marker, the same for one method in every figure."""

    label: str
    slot: int
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most POINTS bins of consecutive samples; values that are not finite are left out."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    xs, ys = xs[np.isfinite(ys)], ys[np.isfinite(ys)]
    if len(xs) <= POINTS:
        return xs, ys
    edges = np.linspace(0, len(xs), POINTS + 1).astype(int)
    return np.add.reduceat(xs, edges[:-1]) / np.diff(edges), np.add.reduceat(ys, edges[:-1]) / np.diff(edges)


def line_chart(
    series: list[Series],
    x_label: str,
    title: str,
    note: str = "",
    marks: Sequence[tuple[float, str]] = (),
    markers: bool = False,
    x_ticks: Sequence[float] | None = None,
    levels: Sequence[tuple[float, str]] = (),
) -> list[Chart]:
    """The chart of curves, 400 x 260 points; none when no curve has two points.

    `marks` are vertical lines with a word at their top, `levels` horizontal ones with a word above their end.
    """
    drawn = [(one, x, y) for one in series for x, y in [thin(one.x, one.y)] if len(x) > 1]
    if not drawn:
        return []
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(400 / 72, 260 / 72))
        axes = figure.add_subplot(title=title, xlabel=x_label)
        for one, x, y in drawn:
            marker = MARKERS[one.slot % len(MARKERS)] if markers else None
            axes.plot(x, y, "--" if one.dashed else "-", color=SERIES[one.slot % len(SERIES)], marker=marker)
        faint = {"color": MUTED, "linewidth": 1, "linestyle": (0, (3, 3)), "zorder": 0}
        for x, word in marks:
            axes.axvline(x, **faint)
            axes.annotate(word, (x, 1), (4, -2), ("data", "axes fraction"), "offset points", va="top")
        for y, word in levels:
            axes.axhline(y, **faint)
            axes.annotate(word, (1, y), (-2, 3), ("axes fraction", "data"), "offset points", ha="right")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if x_ticks is not None:
            axes.set_xticks(list(x_ticks))
        return [Chart(to_svg(figure), note)]


def scatter(points: list[tuple[float, float, str]], note: str) -> Chart:
    """The chart of points (x, y, label) in the colours of their labels, where there are no more labels than colours."""
    points = points[:: -(-len(points) // SPOTS)]
    labels = sorted({label for _, _, label in points})
    labels = labels if len(labels) <= len(SERIES) else [""]
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": note, "axes.grid": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(400 / 72, 400 / 72))
        axes = figure.add_subplot(xticks=[], yticks=[])
        for i, label in enumerate(labels):
            x, y = zip(*[(x, y) for x, y, own in points if own == label or len(labels) == 1], strict=True)
            axes.plot(x, y, MARKERS[i], color=SERIES[i], markersize=3, label=label)
        if len(labels) > 1:
            axes.legend(frameon=False, fontsize=10, markerscale=2)
        return Chart(to_svg(figure), note)


def to_svg(figure: Figure) -> Markup:
    """The figure as an <svg> element that scales with its column and takes colours and font from the page."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    for pattern, text in CLEANED.items():
        svg = re.sub(pattern, text, svg, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg)


def data_uri(image: np.ndarray, max_side: int = 224) -> str:
    """uint8 [H, W, 3 or 1] → data URI of a PNG of at most `max_side` pixels; noise never goes through JPEG."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
