"""What Neighbor2Neighbor.check found out about the noise: as lines, as a picture, and for the report."""

import json
from pathlib import Path

from utils.files import atomic_path
from utils.images import read_image
from utils.report.data import denoiser_name
from utils.report.plots import data_uri
from utils.text import count_of


def format_figures(check: dict) -> list[str]:
    """The correlations as lines of text."""
    looked_at = f"{check['patches']} flat patches of {count_of(check['images'], 'image')}"
    lines = [f"{looked_at}; correlation of pixels 1, 2, 3, 4 apart:"]
    for kind, remark in (("correlation", ""), ("residual_correlation", "  (residuals)")):
        for name, values in (check[kind] or {}).items():
            lines.append(f"  {name:<10} " + "  ".join(f"{value:6.3f}" for value in values) + remark)
    return lines


def draw(check: dict, path: Path) -> None:
    """check.png: correlation over distance, and the noise's deviation over the brightness."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for kind, style in (("correlation", "-"), ("residual_correlation", "--")):
        for number, (name, values) in enumerate((check[kind] or {}).items()):
            label = name if style == "-" else f"{name}, residuals"
            left.plot(range(1, len(values) + 1), values, style, marker="os^"[number], color=f"C{number}", label=label)
    left.axhspan(-0.1, 0.1, color="0.9", zorder=0)
    left.set(xlabel="pixels apart", title="Correlation of the noise", xticks=range(1, 5), ylim=(-0.4, 1))
    left.legend(frameon=False)
    right.plot(check["brightness"], check["deviation"], "o")
    right.set(xlabel="mean of the patch, of 1", title="Standard deviation of the noise, of 1", ylim=(0, None))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def noise_check(folder: Path) -> dict | None:
    """Verdict and picture of the denoiser's folder; None where there was no check."""
    if not (folder / "check.json").is_file():
        return None
    verdict, drawn = json.loads((folder / "check.json").read_text())["verdict"], folder / "check.png"
    picture = data_uri(read_image(drawn), 1200) if drawn.is_file() else None
    return {"name": denoiser_name(folder), "verdict": verdict, "picture": picture}
