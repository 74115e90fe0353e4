"""Figures and pictures of the report: inline SVGs that follow the page's light or dark colours, PNGs as data URIs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

POINTS = 300  # of one curve at most: a long log is averaged in bins, a phone can't show more
MARKERS = "os^Dv*PX"
# Matplotlib writes colours as hex; each of these stands for a variable of the page's style, for light and dark.
INK, MUTED, GRID = "#010203", "#010204", "#010205"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"}
_SERIES = [f"#0203{i:02d}" for i in range(10, 18)]
_VARIABLES |= {colour: f"var(--s{i})" for i, colour in enumerate(_SERIES)}


@dataclass
class Series:
    """One curve; `slot` chooses colour and marker, the same for one method in every figure."""

    label: str
    slot: int
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def thin(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most `points` bins of consecutive samples; values that are not finite are left out."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) <= points:
        return x, y
    edges = np.linspace(0, len(x), points + 1).astype(int)
    return np.add.reduceat(x, edges[:-1]) / np.diff(edges), np.add.reduceat(y, edges[:-1]) / np.diff(edges)


def line_chart(
    series: list[Series],
    x_label: str,
    title: str,
    marks: Sequence[tuple[float, str]] = (),
    markers: bool = False,
    x_ticks: Sequence[float] | None = None,
    levels: Sequence[tuple[float, str]] = (),
) -> str:
    """An SVG of curves, 400 x 260 points; "" when none has two points.

    `marks` are vertical lines with a word at their top, `levels` horizontal ones with a word above their end.
    """
    series = [one for one in series if len(thin(one.x, one.y)[0]) > 1]
    if not series:
        return ""
    figure = Figure(figsize=(400 / 72, 260 / 72), layout="constrained")
    axes = figure.add_subplot()
    for one in series:
        x, y = thin(one.x, one.y)
        axes.plot(
            x, y,
            color=_SERIES[one.slot % len(_SERIES)],
            linewidth=1.8,
            linestyle="--" if one.dashed else "-",
            marker=MARKERS[one.slot % len(MARKERS)] if markers else None,
            markersize=5,
        )  # fmt: skip
    for x, word in marks:
        axes.axvline(x, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
        axes.annotate(
            word, (x, 1), xycoords=("data", "axes fraction"), xytext=(4, -2), textcoords="offset points",
            va="top", fontsize=11, color=MUTED,
        )  # fmt: skip
    for y, word in levels:
        axes.axhline(y, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
        axes.annotate(
            word, (1, y), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points",
            ha="right", fontsize=11, color=MUTED,
        )  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if x_ticks is not None:
        axes.set_xticks(list(x_ticks))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_title(title, parse_math=False, fontsize=13, color=INK, loc="left", pad=10)
    axes.set_xlabel(x_label, fontsize=12, color=MUTED)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=11, length=0, which="both")
    axes.margins(x=0.03)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    return to_svg(figure, title)


def to_svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element that scales with its column and takes colours and font from the page."""
    import matplotlib

    buffer = io.StringIO()
    # Text stays text: smaller, in the page's font, and it can be searched.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        FigureCanvasSVG(figure)
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style type=\"text/css\">.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(?<=font-size: )([\d.]+px); font-family: [^;\"]*", r"\1", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    svg = re.sub(r"<svg([^>]*?) width=\"[^\"]*\"", r"<svg\1", svg, count=1)
    svg = re.sub(r"<svg([^>]*?) height=\"[^\"]*\"", r'<svg role="img"\1', svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg


def data_uri(image: np.ndarray, max_side: int = 224) -> str:
    """uint8 [H, W, 3 or 1] → data URI of a PNG of at most `max_side` pixels; noise never goes through JPEG."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of images of values 0..255 in dB; infinite for equal ones."""
    error = np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
